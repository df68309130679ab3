"""Training state: everything that decides the next step, except the frozen backbone, and how it is read back.

There is no state of random generators in it: all randomness follows from seed and step (`trainer.seeding`).
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from shards.errors import ConfigError, StorageError
from shards.files.storage import LocalStorage, Storage, open_storage
from shards.manifest import ClassInfo, classes_from_table
from trainer.config import RunConfig, run_config_from_dict
from trainer.models.integrity import HASH_SUFFIX
from trainer.models.weights import WeightsFile, names_directory, read_file, read_weights, weights_in

CHECKPOINT_FORMAT = 2
BEST_NAME = "best.pt"
OWNER_NAME = "owner.json"  # whose checkpoints these are (`trainer.run.identity`)
_NAME = re.compile(r"step-(\d{8})\.pt")
_PIECE = 64 << 20  # bytes of a download held at a time
_FIELD_TYPES: dict[str, Any] = {
    "step": int, "model": dict, "optimizer": dict, "config": dict, "classes": list, "ignore_index": int,
    "data_hash": str, "backbone_sha256": str, "best_miou": float | None, "evaluated": bool, "skipped_steps": list,
    "versions": dict, "run_id": str, "format": int,
}  # fmt: skip


@dataclass(kw_only=True)
class Checkpoint:
    """A saved state. `model` holds adapter and head; the ViT is named by config and identified by its hash."""

    step: int  # optimiser steps done
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    classes: list[dict[str, Any]]
    ignore_index: int
    data_hash: str  # sha256 of the manifest
    backbone_sha256: str
    best_miou: float | None
    evaluated: bool  # whether an evaluation that is due at this step was done
    skipped_steps: list[int]  # left out for numbers that were not finite
    versions: dict[str, str]  # of maskstream and torch that wrote it
    run_id: str = ""  # of the run it belongs to (`trainer.run.identity`); "": written before there were such
    format: int = CHECKPOINT_FORMAT

    @property
    def run_config(self) -> RunConfig:
        return run_config_from_dict(self.config)

    @property
    def class_infos(self) -> list[ClassInfo]:
        """Raises ConfigError when they are none."""
        try:
            return classes_from_table(self.classes)
        except ValueError as error:
            raise ConfigError(f"the checkpoint's classes are damaged: {error}") from error


def checkpoint_name(step: int) -> str:
    """File name of a numbered checkpoint."""
    return f"step-{step:08d}.pt"


def load_checkpoint(path: str | Path, shown: str | None = None) -> Checkpoint:
    """Read a checkpoint on the CPU, without unpickling code. Raises ConfigError naming the file, as `shown`."""
    shown = shown or str(path)
    content = read_file(path, mmap=False, shown=shown)  # a run goes on from these while its old files are deleted
    if not _is_ours(content):
        found = content.get("format") if isinstance(content, dict) else None
        raise ConfigError(f"checkpoint {shown} is not a MaskStream checkpoint of format {CHECKPOINT_FORMAT}"
                          + (f" but of {found}; use the MaskStream that wrote it" if isinstance(found, int) else ""))
    return _from_content(content, shown)


def open_checkpoint(path: str | Path) -> Checkpoint | WeightsFile:
    """One of our checkpoints, or the weights that another program wrote. Raises ConfigError naming the file."""
    if names_directory(path):
        return read_weights(path)
    content = read_file(path)
    return _from_content(content, path) if _is_ours(content) else weights_in(content, path)


def _from_content(content: dict[str, Any], path: str | Path) -> Checkpoint:
    content = {"run_id": "", **content}
    for field in fields(Checkpoint):
        if not isinstance(content.get(field.name), _FIELD_TYPES[field.name]):
            raise ConfigError(f"checkpoint {path}: field {field.name!r} is missing or of the wrong type")
    return Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT


def load_latest(place: str | Path) -> Checkpoint | None:
    """The newest sound checkpoint in a folder or at a URL; damaged ones are passed over with a warning; None: no file.

    best.pt comes last: a kill during the first save, or manual cleanup, may leave only that. Raises ConfigError
    when there are checkpoints but none is sound: starting anew would overwrite the run.
    """
    storage = open_storage(place)
    names = [*reversed(numbered(storage).values()), *([BEST_NAME] if BEST_NAME in _sizes(storage) else [])]
    for name in names:
        try:
            return _load_verified(storage, name)
        except (ConfigError, StorageError, OSError) as error:
            warnings.warn(f"{error}. Falling back to the checkpoint before it", stacklevel=2)
    if names:
        raise ConfigError(f"none of the {len(names)} checkpoints in {place} can be read; remove them to start anew "
                          "there, or choose another output_dir")
    return None


def numbered(storage: Storage) -> dict[int, str]:
    """step -> name of the numbered checkpoints, oldest first."""
    return {int(match[1]): match[0] for match in filter(None, map(_NAME.fullmatch, sorted(_sizes(storage))))}


def has_checkpoints(storage: Storage) -> bool:
    """Whether any checkpoint is there."""
    return bool(numbered(storage)) or BEST_NAME in _sizes(storage)


def _sizes(storage: Storage) -> dict[str, int]:
    try:
        return storage.sizes() or {}
    except FileNotFoundError:
        return {}


def _load_verified(storage: Storage, name: str) -> Checkpoint:
    """A checkpoint whose bytes are those of the hash beside or inside it."""
    with _local_file(storage, name) as path:
        return load_checkpoint(path, storage.where(name))


@contextmanager
def _local_file(storage: Storage, name: str) -> Iterator[Path]:
    """The file, its hash beside it."""
    if isinstance(storage, LocalStorage):
        yield storage.folder / name
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with suppress(FileNotFoundError):
            (path.parent / (name + HASH_SUFFIX)).write_bytes(storage.read(name + HASH_SUFFIX))
        size = (storage.sizes() or {})[name]
        with path.open("wb") as file:
            for start in range(0, size, _PIECE):
                file.write(storage.read(name, start, min(_PIECE, size - start)))
        yield path
