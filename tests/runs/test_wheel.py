"""The wheel, installed where there is no checkout: every command and recipe, and others' packages of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.training_run import TINY
from tests.unit.test_architecture import PACKAGES

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "configs", *PACKAGES)
COMMANDS = ("make-scenes", "download", "make-shards", "train", "eval", "predict", "app", "export", "status", "shards",
            "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a clean copy of the checkout, without network."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, symlinks=True,
                            ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", str(output), str(source)], check=True)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel and this one's libraries, but not with the checkout."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(place, symlinks=True)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet",
                    "--no-deps", "--no-index", str(wheel)], check=True)
    site = next(place.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # .pth files in there are not read
    return place / "bin"


def run(program: Path, *arguments: object, folder: Path, code: int = 0, **environment: str) -> str:
    """Everything that it prints."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(program), *map(str, arguments)], cwd=folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**clean, "OMP_NUM_THREADS": "1", **environment}, check=False)
    assert done.returncode == code, done.stdout
    return done.stdout


def test_the_wheel_holds_the_packages_and_the_recipes_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(REPOSITORY).as_posix() for package in PACKAGES
               for path in (REPOSITORY / package).rglob("*.py") if "console" not in path.parts}
    recipes = {f"shards/{path.relative_to(REPOSITORY).as_posix()}"
               for path in (REPOSITORY / "configs").rglob("*.yaml")}
    expected = modules | recipes | {f"{package}/py.typed" for package in PACKAGES}
    expected |= {"maskstream/__init__.py", "trainer/reporting/report.css", "trainer/reporting/report.html.j2"}
    expected |= {path.relative_to(REPOSITORY).as_posix() for path in
                 (REPOSITORY / "preprocess/layouts/tables").iterdir()}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_every_command_works_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    command = installed / "maskstream"
    where = run(installed / "python", "-c", "import shards, preprocess, trainer; print(trainer.__file__)",
                folder=tmp_path)
    assert where.startswith(str(installed.parent))
    run(command, "make-scenes", "--output", "scenes", "--train", "4", "--val", "2", folder=tmp_path)
    run(command, "make-shards", "--config", "scenes-shards", "--root", "scenes", "--output", "set", "--workers", "2",
        "crops.size=64", folder=tmp_path)
    assert "sound" in run(command, "shards", "verify", "set", folder=tmp_path)
    settings = ("--config", "configs/demo.yaml", "--config", TINY, "data.root=set", "train.total_steps=2")
    run(command, "train", *settings, "data.workers=1", "output_dir=run", folder=tmp_path)
    run(installed / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m",
        "trainer.train", *settings, "output_dir=ranks", folder=tmp_path)
    assert "finished" in run(command, "status", "run", folder=tmp_path)
    assert "finished" in run(command, "status", "ranks", folder=tmp_path)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert "mIoU" in run(command, "eval", "--config", "run/config.yaml", "--checkpoint", best, folder=tmp_path)
    run(command, "export", "--checkpoint", best, "--output", "exported", "--formats", "directory", folder=tmp_path)
    image = next((tmp_path / "scenes" / "images" / "val").iterdir())
    run(command, "predict", "--checkpoint", "exported", "--output", "predicted", image, folder=tmp_path)
    assert (tmp_path / "predicted" / f"{image.stem}.png").is_file()


def test_recipes_are_listed_printed_and_laid_beside_the_users_own(installed: Path, tmp_path: Path) -> None:
    command = installed / "maskstream"
    lines = run(command, "recipes", folder=tmp_path).splitlines()
    files = [path for pattern in ("*.yaml", "*/*.yaml")
             for path in sorted((REPOSITORY / "configs").glob(pattern), key=lambda path: (path.parent, path.stem))]
    assert [line.split("  ")[0] for line in lines] == [
        path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix() for path in files]
    assert all(path.read_text().splitlines()[0].removeprefix("# ") in line
               for path, line in zip(files, lines, strict=True))
    assert run(command, "recipes", "backbones/vitb16", folder=tmp_path) == (
        REPOSITORY / "configs" / "backbones" / "vitb16.yaml").read_text()
    assert "did you mean 'demo'?" in run(command, "recipes", "dmo", folder=tmp_path, code=2)
    (tmp_path / "demo").write_text("train:\n  total_stebs: 1\n")
    assert "total_stebs" in run(command, "train", "--config", "demo", folder=tmp_path, code=2)


def test_help_is_fast_and_a_wrong_name_is_one_line(installed: Path, tmp_path: Path) -> None:
    program = f"""
import contextlib, io, sys
from maskstream import main
for name in {COMMANDS!r}:
    sys.argv = ["maskstream", name, "--help"]
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        main()
    assert said.getvalue().startswith(f"usage: maskstream {{name}} "), said.getvalue()
    print(name, "torch" in sys.modules)
"""
    said = run(installed / "python", "-c", program, folder=tmp_path).splitlines()
    assert said == [f"{name} False" for name in COMMANDS]
    listed = run(installed / "maskstream", "--help", folder=tmp_path)
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert run(installed / "maskstream", folder=tmp_path, code=2) == listed
    wrong = run(installed / "maskstream", "make_shard", folder=tmp_path, code=2)
    assert wrong.startswith("error: unknown command 'make_shard'; did you mean 'make-shards'? legal: make-scenes")
    assert wrong.count("\n") == 1
    assert run(installed / "maskstream", "--version", folder=tmp_path).strip() == "0.1.0"


@pytest.mark.parametrize(("owned", "module"), [("shards", "errors"), ("preprocess", "config"),
                                               ("trainer", "config")])
def test_another_package_of_the_same_name_is_one_line(installed: Path, tmp_path: Path, owned: str, module: str) -> None:
    """Before ours on the path, for the command and for a script of a checkout."""
    (tmp_path / owned).mkdir()
    for name in ("__init__", module):
        (tmp_path / owned / f"{name}.py").write_text("VERSION = 3\n")
    script = "preprocess/make_shards.py" if owned == "preprocess" else "trainer/train.py"
    name = Path(script).stem.replace("_", "-")
    said = run(installed / "maskstream", name, folder=tmp_path, code=2, PYTHONPATH=str(tmp_path))
    assert f"the package '{owned}' that Python finds ({tmp_path / owned})" in said and said.count("\n") == 1
    said = run(Path(sys.executable), REPOSITORY / script, folder=tmp_path, code=1, PYTHONPATH=str(tmp_path))
    assert said.startswith("error: ") and f"named shards or {script.split('/')[0]} shadow it?" in said
    assert said.count("\n") == 1


def test_the_distribution_that_owns_the_name_is_named(installed: Path, tmp_path: Path) -> None:
    site = next(installed.parent.glob("lib/python*/site-packages"))
    record = tmp_path / "coqui_trainer-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: coqui-trainer\nVersion: 1.0\n")
    (record / "top_level.txt").write_text("trainer\n")
    (site / "trainer" / "status.py").rename(tmp_path / "status.py")  # as if theirs had been unpacked over ours
    try:
        said = run(installed / "maskstream", "status", "x", folder=tmp_path, code=2, PYTHONPATH=str(tmp_path))
    finally:
        (tmp_path / "status.py").rename(site / "trainer" / "status.py")
    assert "which coqui-trainer installed" in said and said.count("\n") == 1


def test_without_the_extra_the_missing_library_is_one_line(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    said = run(installed / "maskstream", "export", "--checkpoint", "x.pt", "--output", "out", folder=tmp_path, code=2,
               PYTHONPATH=str(tmp_path))
    assert "No module named 'torch'; training" in said and "pip install 'maskstream[train]'" in said
    assert said.count("\n") == 1
