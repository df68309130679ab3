"""Project rules that a reviewer would otherwise have to remember. Each is also tested on a planted violation."""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from shards.cli.config_file import load_config
from shards.cli.settings import entry_type
from tests.conftest import REPOSITORY
from trainer.config import RunConfig, load_run_config

PACKAGES = ("shards", "preprocess", "trainer")
MAY_IMPORT = {"shards": {"shards"}, "preprocess": {"shards", "preprocess"}, "trainer": {"shards", "trainer"}}
ENTRY_POINTS = {"trainer.train", "trainer.eval", "trainer.predict", "trainer.export", "trainer.status", "trainer.app",
                "preprocess.make_shards", "preprocess.download"}

# Modules and packages, lowest layer first. A module imports lower layers, and its own package. A module of a package
# may be given a layer of its own.
LAYERS: dict[str, tuple[set[str], ...]] = {
    "trainer": (
        {"model_config", "data_config", "stopping", "out_of_memory"},
        {"config", "watchdog", "seeding"},
        {"distributed"},
        {"data", "models"},
        {"precision"},
        {"loss", "evaluation", "reporting", "optimizer", "interop"},
        {"build", "mask_classification_loss"},
        {"run"},
        {"memory"},
        {"loop", "pretrained"},
        {"model_options", "exporting", "serving", "predicting"},
        {"train", "eval", "predict", "export", "status", "app"},
    ),
    "shards": (
        {"shown_text"},
        {"errors"},
        {"files"},
        {"rle", "plan", "workers"},
        {"picture_file", "coco", "picture", "cli", "crops", "mixing"},
        {"sample", "manifest"},
        {"shard_table", "writer"},
        {"reader", "mirror", "class_list", "recount", "sampling"},
        {"read_ahead", "audit", "verify", "looking"},
        {"exports"},
        {"__init__"},
        {"commands"},
        {"__main__", "console"},
    ),
}
MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES = 22, 360, 60


def sources(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module name that a file imports, at any depth. A name imported from a package may also be a module."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


# -- the rules: each yields what is wrong in the tree below `root` ---------------------------------------------------


def packages_meet_only_in_the_format(root: Path) -> Iterator[str]:
    for path in sources(root):
        package = path.relative_to(root).parts[0]
        for name in imports(path):
            top = name.split(".")[0]
            if (top in PACKAGES and top not in MAY_IMPORT[package]) or (
                    package != "trainer" and top in ("torch", "transformers", "webdataset")):
                yield f"{path} imports {name}"


def nobody_imports(root: Path) -> Iterator[str]:
    """Entry points, unpickling, torchvision (not available for all CPU builds), and relative imports."""
    for path in sources(root):
        for name in imports(path):
            if name in ENTRY_POINTS | {"pickle", "torchvision"} or name.startswith("."):
                yield f"{path} imports {name}"


def imports_point_downwards(root: Path) -> Iterator[str]:
    for path in sources(root):
        package, *rest = module_of(root, path).split(".")
        if package not in LAYERS or (path.name == "__init__.py" and not path.read_text().strip()):
            continue
        layer = layer_of(package, rest)
        if layer is None:
            yield f"{path} has no layer: give it one in {__file__}"
            continue
        for name in imports(path):
            top, *below = name.split(".")
            if top != package or not below or below[0] == rest[0]:
                continue
            other = layer_of(package, below)
            if other is not None and other >= layer:
                yield f"{path} imports {name}, which is not in a lower layer"


def layer_of(package: str, names: list[str]) -> int | None:
    """The layer number of a module; `names` are the parts of its dotted name after the package."""
    return next((number for number, members in enumerate(LAYERS[package]) if names[0] in members), None)


def json_is_written_in_one_place(root: Path) -> Iterator[str]:
    """All JSON is written by `strict_json`, except the manifest's canonical form, which is hashed and rejects NaN."""
    for path in [*sources(root), *sorted((root / "benchmarks").glob("*.py"))]:
        if module_of(root, path) in ("shards.files.strict_json", "shards.manifest"):
            continue
        names = {ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute | ast.Name)}
        if found := (names | set(imports(path))) & {"json.dump", "json.dumps", "json.encoder"}:
            yield f"{path} uses {found}"


def no_module_shadows_another(root: Path) -> Iterator[str]:
    """`python trainer/x.py` puts trainer/ first on sys.path: its files must not shadow other modules."""
    taken = set(sys.stdlib_module_names) | {"datasets", "evaluate", "utils", "transformers", "torch", "numpy"}
    for path in sources(root):
        names = {path.stem, *path.relative_to(root).parts[1:-1]}
        if found := names & taken - {"__init__", "__main__"}:
            yield f"{path}: another module is called {found}"
    if (root / "tests" / "shards").exists():
        yield "tests/shards would hide the package in tests"


def every_setting_is_read(root: Path) -> Iterator[str]:
    for schema, package in ((RunConfig, "trainer"), (PreprocessConfig, "preprocess")):
        modules = {is_schema: [tree_of(path) for path in (root / package).rglob("*.py")
                               if path.name.endswith("config.py") == is_schema] for is_schema in (True, False)}
        properties = [node for tree in modules[True] for node in ast.walk(tree)
                      if isinstance(node, ast.FunctionDef) and "property" in map(ast.unparse, node.decorator_list)]
        text = "\n".join(map(ast.unparse, [*modules[False], *properties]))  # to check a setting is not to read it
        for name in fields_of(schema):
            if not re.search(rf"\.{name}\b", text):
                yield f"nothing in {package}/ reads the setting {name!r}"


def fields_of(schema: type) -> Iterator[str]:
    for field in dataclasses.fields(schema):
        value = getattr(schema(), field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(type(value))
        else:
            yield field.name
            yield from fields_of(entry) if (entry := entry_type(schema, field.name)) else ()


def everything_stays_readable(root: Path) -> Iterator[str]:
    for path in sources(root):
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MOST_LINES:
            yield f"{path} has {lines} lines, at most {MOST_LINES}"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and (
                    length := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES:
                yield f"{path}: {node.name} has {length} lines, at most {MOST_FUNCTION_LINES}"
    for folder in {path.parent for path in sources(root)}:
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES + 1:  # besides __init__.py
            yield f"{folder} has {count} modules, at most {MOST_FILES}"


def everything_public_has_a_docstring(root: Path) -> Iterator[str]:
    for path in sources(root):
        for node in tree_of(path).body:
            if (isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                    and not ast.get_docstring(node) and node.name != "main"):
                yield f"{path}: {node.name} has no docstring"


def importing_changes_nothing(root: Path) -> Iterator[str]:
    """Importing a module must not change the process or another module's state."""
    for path in sources(root):
        for node in run_on_import(tree_of(path).body):
            if (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)) or isinstance(node, ACTS):
                yield f"{path} does something when it is imported: {ast.unparse(node).splitlines()[0]}"
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", ast.Name("x"))]
            if any(isinstance(part, ast.Attribute | ast.Subscript) for target in targets for part in ast.walk(target)):
                yield f"{path} changes something when it is imported: {ast.unparse(node)}"
            called = [call.func for call in calls_on_import(node)] + getattr(node, "decorator_list", [])
            for name in map(ast.unparse, called):
                if name.startswith(FORBIDDEN_ON_IMPORT):
                    yield f"{path} calls {name} when it is imported"


ACTS = (ast.For, ast.While, ast.With, ast.Delete)  # to raise is to end the import
FORBIDDEN_ON_IMPORT = ("os.", "signal.", "atexit.", "warnings.", "faulthandler.", "multiprocessing.", "threading.",
                       "subprocess.", "logging.basicConfig", "logging.captureWarnings", "sys.", "socket.", "open",
                       "torch.set_", "torch.multiprocessing", "resource.", "gc.")


def run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run on import: also inside classes and branches, but not under `if __name__ ==
    "__main__"`."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
            continue
        yield node
        if isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
            yield from run_on_import([part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)])
            yield from run_on_import([part for handler in getattr(node, "handlers", []) for part in handler.body])


def calls_on_import(node: ast.AST) -> Iterator[ast.Call]:
    """The calls in a statement, except inside the functions it defines; their defaults and decorators count."""
    if isinstance(node, ast.Call):
        yield node
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for name, field in ast.iter_fields(node):
        if is_function and name == "body":
            continue
        for part in field if isinstance(field, list) else [field]:
            if isinstance(part, ast.AST):
                yield from calls_on_import(part)


def nobody_asks_which_backbone_it_is(root: Path) -> Iterator[str]:
    """Outside models/backbones, nothing looks at a backbone's class, or inside it at transformers' model."""
    for path in sources(root):
        if "backbones" in path.parts:
            continue
        for node in ast.walk(tree_of(path)):
            text = ast.unparse(node)
            if isinstance(node, ast.Call) and re.match(r"(isinstance|issubclass|type)\(", text) and re.search(
                    r"backbone|Backbone|ViTModel|Dinov2Model", text):
                yield f"{path}: {text}"
            if isinstance(node, ast.Attribute) and re.search(r"(backbone|vit)\.vit$", text):
                yield f"{path}: {text}"


Rule = Callable[[Path], Iterator[str]]
RULES: tuple[Rule, ...] = (
    packages_meet_only_in_the_format, nobody_imports, imports_point_downwards, json_is_written_in_one_place,
    no_module_shadows_another, every_setting_is_read, everything_stays_readable, everything_public_has_a_docstring,
    importing_changes_nothing, nobody_asks_which_backbone_it_is,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    assert list(rule(REPOSITORY)) == []


LONG = '"""Long."""\n' + "x = 1\n" * MOST_LINES
PLANTED: list[tuple[Rule, str, str]] = [
    (packages_meet_only_in_the_format, "preprocess/planted.py", "from trainer.config import RunConfig"),
    (packages_meet_only_in_the_format, "shards/files/planted.py", "def f():\n    import torch"),
    (packages_meet_only_in_the_format, "trainer/run/planted.py", "import preprocess.encoding"),
    (nobody_imports, "trainer/reporting/planted.py", "from trainer.train import main"),
    (nobody_imports, "trainer/data/planted.py", "from . import crops"),
    (nobody_imports, "trainer/models/planted.py", "import pickle"),
    (imports_point_downwards, "trainer/data/planted.py", "from trainer.loss.matcher import HungarianMatcher"),
    (imports_point_downwards, "trainer/models/planted.py", "from trainer.data.crops import Batch"),
    (imports_point_downwards, "trainer/loss/planted.py", "from trainer.run.run import Run"),
    (imports_point_downwards, "trainer/evaluation/planted.py", "from trainer.reporting.plots import class_charts"),
    (imports_point_downwards, "trainer/reporting/planted.py", "from trainer.run.checkpoint import Checkpoint"),
    (imports_point_downwards, "trainer/run/planted.py", "from trainer import loop"),
    (imports_point_downwards, "trainer/planted.py", "x = 1"),
    (imports_point_downwards, "trainer/planted/module.py", "x = 1"),
    (imports_point_downwards, "shards/files/planted.py", "from shards.manifest import Manifest"),
    (imports_point_downwards, "shards/planted.py", "x = 1"),
    (json_is_written_in_one_place, "trainer/reporting/planted.py", "import json\njson.dumps({})"),
    (json_is_written_in_one_place, "benchmarks/planted.py", "from json import dumps\nimport json.encoder"),
    (no_module_shadows_another, "trainer/reporting/queue.py", "x = 1"),
    (no_module_shadows_another, "trainer/datasets/planted.py", "x = 1"),
    (everything_stays_readable, "trainer/evaluation/planted.py", LONG),
    (everything_stays_readable, "shards/planted.py", "def f():\n" + "    x = 1\n" * MOST_FUNCTION_LINES),
    (everything_public_has_a_docstring, "trainer/loss/planted.py", "class Loss:\n    pass"),
    (everything_public_has_a_docstring, "preprocess/planted.py", "def f():\n    pass"),
    (nobody_asks_which_backbone_it_is, "trainer/models/planted.py", "def f(backbone):\n    type(backbone)"),
    (nobody_asks_which_backbone_it_is, "trainer/models/planted.py", "def f(m):\n    isinstance(m, DINOv3Backbone)"),
    (nobody_asks_which_backbone_it_is, "trainer/planted.py", "def f(model):\n    model.backbone.vit.norm"),
    (importing_changes_nothing, "trainer/data/planted.py", "import os\nos.setsid()"),
    (importing_changes_nothing, "trainer/planted.py", "import os\nos.environ['OMP_NUM_THREADS'] = '1'"),
    (importing_changes_nothing, "trainer/planted.py", "import sys\nsys.excepthook: object = print"),
    (importing_changes_nothing, "trainer/planted.py", "import torch\nif True:\n    torch.set_num_threads(1)"),
    (importing_changes_nothing, "trainer/planted.py", "import torch\ntorch.backends.cudnn.benchmark = True"),
    (importing_changes_nothing, "preprocess/planted.py", "import signal\nold = signal.signal(2, signal.SIG_IGN)"),
    (importing_changes_nothing, "preprocess/planted.py", "import warnings\nwarnings.filterwarnings('ignore')"),
    (importing_changes_nothing, "shards/planted.py", "import atexit\n@atexit.register\ndef f(x=1):\n    pass"),
    (importing_changes_nothing, "shards/planted.py", "try:\n    x = 1\nexcept OSError:\n    del x"),
    (importing_changes_nothing, "shards/planted.py", "class A:\n    x = open('/dev/null')"),
]


@pytest.fixture(scope="module")
def copy_of_the_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for package in (*PACKAGES, "benchmarks"):
        shutil.copytree(REPOSITORY / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", value)[:60])
def test_rule_notices_a_planted_violation(rule: Rule, name: str, text: str, copy_of_the_tree: Path) -> None:
    planted = copy_of_the_tree / name
    is_new_folder = not planted.parent.exists()
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(text + "\n")
    try:
        assert any("planted" in found or planted.name in found for found in rule(copy_of_the_tree))
    finally:
        shutil.rmtree(planted.parent) if is_new_folder else planted.unlink()


def test_rules_notice_what_a_file_cannot_plant(copy_of_the_tree: Path) -> None:
    """Planted: a setting that nothing reads, and an overfull folder."""
    reader = copy_of_the_tree / "trainer" / "optimizer.py"
    text = reader.read_text()
    reader.write_text(text.replace(".layer_decay", ".something_else"))
    assert any("layer_decay" in found for found in every_setting_is_read(copy_of_the_tree))
    reader.write_text(text)
    crowd = [copy_of_the_tree / "trainer" / "data" / f"m{number}.py" for number in range(MOST_FILES)]
    for path in crowd:
        path.write_text("")
    assert any("modules, at most" in found for found in everything_stays_readable(copy_of_the_tree))
    for path in crowd:
        path.unlink()


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
