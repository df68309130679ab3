"""The house rules that a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from shards.config_file import load_config
from tests.conftest import REPOSITORY
from trainer.config import RunConfig, load_run_config

PACKAGES = ("shards", "preprocess", "trainer")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
CODE_ROOTS = [*SOURCES, *sorted((REPOSITORY / "benchmarks").glob("*.py"))]

# Lower layers never import higher ones (a module may import its own layer and those below).
TRAINER_LAYERS = (
    {"config", "distributed", "seeding", "pytest_plugin", "stopping", "watchdog", "loader_processes",
     "parcel", "out_of_memory"},
    {"targets", "point_sampling", "point_losses", "mask_gradients", "transforms", "metrics", "sliding_window",
     "pixel_loss", "svg_chart"},
    {"matcher"},
    {"mask_classification_loss", "optimizer", "models", "data"},
    {"criterion", "checkpoint", "checkpoint_writer", "run_logger", "run_state", "wandb_run", "loader"},
    {"build", "run_folder", "run_identity", "plots", "report", "interop", "predictor"},
    {"evaluation", "run", "progress", "non_finite", "failures"},
    {"loop", "pretrained"},
    {"checkpoint_options", "exporting"},
    {"train", "eval", "predict", "export", "status"},
)
ENTRY_POINTS = {"trainer.train", "trainer.eval", "trainer.predict", "trainer.export", "trainer.status",
                "preprocess.make_shards"}


def imports(path: Path) -> Iterator[str]:
    """Every module name that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_packages_meet_only_in_the_format(path: Path) -> None:
    allowed = {"shards": {"shards"}, "preprocess": {"shards", "preprocess"}, "trainer": {"shards", "trainer"}}
    package = path.relative_to(REPOSITORY).parts[0]
    ours = {name.split(".")[0] for name in imports(path)} & set(PACKAGES)
    assert ours <= allowed[package]
    if package != "trainer":
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers", "webdataset"}
    assert not set(imports(path)) & ENTRY_POINTS, "entry points are imported by nobody"
    assert "pickle" not in set(imports(path)) and "torchvision" not in set(imports(path))


def layer(module: str) -> int:
    name = module.split(".")[1] if "." in module else ""
    return next((number for number, names in enumerate(TRAINER_LAYERS) if name in names), -1)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[-2] in ("trainer", "models")], ids=module_of)
def test_the_trainer_imports_downwards_only(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "trainer":
        return
    own = layer(module_of(path))
    assert own >= 0, f"{module_of(path)} has no layer: give it one above"
    for name in imports(path):
        if name.startswith("trainer."):
            assert layer(name) <= own, f"{module_of(path)} imports {name} from a higher layer"


@pytest.mark.parametrize("path", CODE_ROOTS, ids=module_of)
def test_json_is_written_in_one_place(path: Path) -> None:
    """By `shards.strict_json`, as Python's own writes NaN; the manifest's canonical form is hashed and refuses NaN."""
    if module_of(path) in ("shards.strict_json", "shards.manifest"):
        return
    written = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in ("json.dump", "json.dumps")]
    assert not written and not {"json.dump", "json.dumps", "json.encoder"} & set(imports(path))


def test_no_module_shadows_another() -> None:
    """`python trainer/x.py` puts trainer/ first on the path: its modules must not hide anybody's."""
    taken = set(sys.stdlib_module_names) | {"datasets", "evaluate", "utils", "transformers", "torch", "numpy"}
    for path in SOURCES:
        assert path.stem not in taken or path.stem == "__init__" or path.stem == "__main__", path
    assert not (REPOSITORY / "tests" / "shards").exists()


def fields_of(schema: type) -> Iterator[str]:
    for field in dataclasses.fields(schema):
        value = getattr(schema(), field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(type(value))
        else:
            yield field.name


@pytest.mark.parametrize(("schema", "package"), [(RunConfig, "trainer"), (PreprocessConfig, "preprocess")])
def test_every_setting_is_read_by_code(schema: type, package: str) -> None:
    readers = [path for path in SOURCES if path.parts[-2] in (package, "models") and path.name != "config.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*readers, REPOSITORY / package / "config.py"])
    for name in fields_of(schema):
        uses = re.findall(rf"\.{name}\b", text)
        assert uses, f"nothing reads the setting {name!r}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid_and_says_how_to_run_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") for line in head), "three header lines: what, cost or result, command"
    assert path.name in head[2] or "make demo" in head[2] or "make_shards.py" in head[2]
    if "shards" in path.name:
        load_config(PreprocessConfig, path)
    elif path.parent.name == "backbones":
        load_run_config([REPOSITORY / "configs" / "config-ade20k-m2f-training.yaml", path], [])
    else:
        load_run_config(path, [])


def test_files_and_functions_stay_readable() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 360, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}:{node.name} has {length} lines"


def test_public_functions_have_docstrings() -> None:
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name == "main", f"{path}: {node.name}"
