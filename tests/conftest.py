"""Shared fixtures. `--golden DIR` and MASKSTREAM_SHARED point at data that is not in the repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MASKSTREAM_SHARED", str(REPOSITORY.parent / "shared")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=None, help="folder of golden files (default: $MASKSTREAM_SHARED/golden)")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Any:
    """`golden("name") -> (json description, {tensor name: tensor})`; skips when the file is not there."""
    from safetensors.torch import load_file

    folder = Path(request.config.getoption("--golden") or SHARED / "golden")

    def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        if not (folder / f"{name}.json").is_file():
            pytest.skip(f"golden file {name} is not in {folder} (set MASKSTREAM_SHARED or --golden)")
        tensors = folder / f"{name}.safetensors"
        return json.loads((folder / f"{name}.json").read_text()), load_file(tensors) if tensors.is_file() else {}

    return load


@pytest.fixture
def shared_data() -> Path:
    """`<shared>/data` with the real samples; skips when absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real samples are not in {folder} (set MASKSTREAM_SHARED)")
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


def make_shards(output: Path, root: Path, *overrides: str) -> Path:
    """Shard a `folder` dataset in this process with small settings; returns the output folder."""
    from preprocess.config import PreprocessConfig
    from preprocess.pairs import open_dataset
    from preprocess.pipeline import write_shards
    from shards.config_file import load_config

    defaults = ["dataset.kind=folder", f"dataset.root={root}", f"output={output}", "crops.size=64",
                "crops.per_image=2", "images_per_shard=6", "workers=1"]
    config = load_config(PreprocessConfig, None, [*defaults, *overrides])
    write_shards(config, open_dataset(config.dataset, config.on_error))
    return output
