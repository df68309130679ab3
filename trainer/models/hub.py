"""Model directories with config.json and safetensors, on disk or on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import ConfigError
from shards.files.outside_json import parse_json
from trainer.models.integrity import check_folder

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
_SINGLE_FILE = "pytorch_model.bin"  # all that tue-mps' repositories hold


def is_hub_id(source: str) -> bool:
    """Whether the source looks like `organisation/model`, and not like a missing file or folder."""
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(WEIGHT_SUFFIXES)


def single_file(source: str | Path) -> Path | None:
    """The `pytorch_model.bin` of a folder or hub id that has no safetensors; None if it has some, or neither."""
    folder = Path(source).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(str(source), allow_patterns=_FILES))
            if not any(folder.glob("*.safetensors")):
                return Path(hf_hub_download(str(source), _SINGLE_FILE))
    except (OSError, ValueError):  # `model_directory` explains why
        return None
    file = folder / _SINGLE_FILE
    return file if file.is_file() and not any(folder.glob("*.safetensors")) else None


def model_directory(source: str | Path, hint: str = "") -> Path:
    """A model's folder: `source` itself, or its snapshot from the hub (downloaded once, then cached).

    Raises ConfigError, ending in `hint`, when it does not exist or a file is missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not is_hub_id(str(source)):
            raise ConfigError(f"{source} is not a directory or file. {hint}")
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=_FILES))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source} cannot be loaded from the hub ({error}). {hint}") from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{source} is a folder without config.json and model.safetensors. {hint}")
    return folder


def directory_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ConfigError when it is not a JSON object."""
    path = folder / "config.json"
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def directory_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files, memory-mapped, after checking their hashes. Raises ConfigError
    naming a damaged file."""
    if strange := [path for path in sorted(folder.glob("*.safetensors")) if not path.is_file()]:
        raise ConfigError(f"{strange[0]} is not a regular file")
    check_folder(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(path)
        except Exception as error:
            raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors
