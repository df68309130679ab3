"""Shared fixtures. `--golden DIR` and MASKSTREAM_SHARED point to data outside the repository."""

from __future__ import annotations

import json
import multiprocessing.process
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.object_storage import FaultyProxy, S3Server

REPOSITORY = Path(__file__).resolve().parent.parent
RENAMED = ("extra", "tree", "roof", "house", "road", "grass", "hill", "sky")
SHARED = Path(os.environ.get("MASKSTREAM_SHARED", str(REPOSITORY.parent / "shared")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what is marked slow, and skip every test at the "
                     "moment it starts a process; `make test-fast` runs tests/unit so")
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="of tests/gpu")
    # pytest takes an existing folder after an option that it does not know yet for a folder of tests: name another too.
    parser.addoption("--golden", default=None, metavar="DIR",
                     help="folder of golden files (default: $MASKSTREAM_SHARED/golden); prints how far each test was "
                     "from its file. Use as: pytest tests/golden --golden DIR")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; `make test-fast` leaves these out")
    config.addinivalue_line("markers", "stress: takes minutes; `make stress` runs these, `make test` does not")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --fast, tests that start processes need no marker: they are skipped when they do."""
    if request.config.getoption("--fast"):
        monkeypatch.setattr(subprocess.Popen, "__init__", _skip)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", _skip)


def _skip(*_: object, **__: object) -> None:
    pytest.skip("starts a process, which --fast leaves out")


@pytest.fixture
def golden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`golden("name") -> (json description, {tensor name: tensor})`; skips when the file is not there.

    What the test then compares by torch.testing.assert_close is measured for the table at the end of the session.
    """
    from safetensors.torch import load_file

    folder = Path(request.config.getoption("--golden") or SHARED / "golden")

    def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        if not (folder / f"{name}.json").is_file():
            pytest.skip(f"golden file {name} is not in {folder} (set MASKSTREAM_SHARED or --golden)")
        measure_comparisons(request.node, name, monkeypatch)
        tensors = folder / f"{name}.safetensors"
        return json.loads((folder / f"{name}.json").read_text()), load_file(tensors) if tensors.is_file() else {}

    return load


def measure_comparisons(test: pytest.Item, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record (golden file, test, largest absolute error, largest relative to the largest entry) of each comparison."""
    import torch

    compare = torch.testing.assert_close

    def measured(actual: Any, expected: Any, **options: Any) -> None:
        compare(actual, expected, **options)
        ours, theirs = (torch.as_tensor(value).detach().double().nan_to_num() for value in (actual, expected))
        error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        test.user_properties.append(("parity", (name, test.originalname, error, error / size if size else 0.0)))

    monkeypatch.setattr(torch.testing, "assert_close", measured)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """With --golden: report how far each test was from its golden file."""
    if terminalreporter.config.getoption("--golden") is None:
        return
    worst: dict[tuple[str, str], tuple[float, float, int]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for kind, row in report.user_properties:
            if kind == "parity":
                name, test, error, relative = row
                largest = worst.get((name, test), (0.0, 0.0, 0))
                worst[name, test] = (max(error, largest[0]), max(relative, largest[1]), largest[2] + 1)
    terminalreporter.section("parity with the golden files")
    for (name, test), (error, relative, count) in sorted(worst.items()):
        terminalreporter.write_line(f"{name:24s} {test:52s} {count:5d} comparisons, largest error {error:.1e}, "
                                    f"{relative:.1e} of the largest entry")


@pytest.fixture
def shared_data() -> Path:
    """`<shared>/data` with the real samples; skips when absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real samples are not in {folder} (set MASKSTREAM_SHARED)")
    return folder


@pytest.fixture
def real_vit() -> Path:
    """`<shared>/weights/dinov2-vits14`, a pretrained ViT; skips when absent."""
    folder = SHARED / "weights" / "dinov2-vits14"
    if not folder.is_dir():
        pytest.skip(f"the pretrained ViT is not in {folder} (set MASKSTREAM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated dataset in the `folder` layout: 12 training and 5 validation scenes."""
    from preprocess.make_scenes import write_scenes

    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, {"train": 12, "val": 5}, seed=0)
    return root


@pytest.fixture(scope="session")
def scene_shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes as a shard set: 24 crops of 64 pixels in 4 shards, 5 whole images in one."""
    return make_shards(tmp_path_factory.mktemp("shards") / "set", scenes)


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Runs in this process draw no curves and reports, which take longer than small runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "write_report"):
            patch.setattr(f"trainer.run.reporter.{name}", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def whole_shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes as a shard set of whole images in both splits, 12 and 5."""
    return make_shards(tmp_path_factory.mktemp("shards") / "whole", scenes, "crops.splits=[]")


@pytest.fixture(scope="session")
def renamed_shards(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scene_shards` with other names: class n has that of class 7 - n, but class 0 is called "extra"."""
    from tests.support.hand_made import rename_classes

    return rename_classes(scene_shards, tmp_path_factory.mktemp("shards") / "renamed", RENAMED)


def make_shards(output: Path, root: Path, *overrides: str) -> Path:
    """Shard a `folder` dataset in this process, with settings for a small set; returns the output folder."""
    from preprocess.config import PreprocessConfig
    from preprocess.pairs import open_dataset
    from preprocess.pipeline import write_shards
    from shards.cli.config_file import load_config

    defaults = ["dataset.kind=folder", f"dataset.root={root}", f"output={output}", "crops.size=64",
                "crops.per_image=2", "images_per_shard=6", "workers=0"]
    config = load_config(PreprocessConfig, None, [*defaults, *overrides])
    write_shards(config, open_dataset(config.dataset, config.on_error))
    return output


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """A real S3 server for this test process."""
    if request.config.getoption("--fast"):
        _skip()
    from tests.support.object_storage import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Credentials in the environment, and a proxy in front of the server that injects faults on request."""
    from tests.support.object_storage import KEY, SECRET, FaultyProxy

    proxy = FaultyProxy(s3_server.port)
    for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("REGION", "us-east-1"),
                        ("ENDPOINT", proxy.endpoint)):
        monkeypatch.setenv(f"AWS_{name}", value)
    yield proxy
    proxy.close()


@pytest.fixture
def s3_root(s3: FaultyProxy, tmp_path: Path) -> str:
    """A separate URL for each test."""
    return f"s3://maskstream/{tmp_path.parent.name}-{tmp_path.name}".replace("_", "-")


@pytest.fixture
def s3_shards(s3_root: str, scene_shards: Path) -> str:
    """`scene_shards` on object storage."""
    from shards.mirror import copy_set

    copy_set(scene_shards, s3_root)
    return s3_root


def heed_ctrl_c() -> None:
    """For a process that is to be interrupted, as `preexec_fn`: a shell that runs the tests in the background (`pytest
    &`) makes all its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
