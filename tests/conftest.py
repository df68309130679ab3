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
