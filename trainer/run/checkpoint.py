"""Checkpoints: all state that determines the next step, except a frozen backbone, and how it is read back.

No RNG state is stored: all randomness is derived from seed and step (`trainer.seeding`).
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
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
OWNER_NAME = "owner.json"  # the run that owns these checkpoints (`trainer.run.identity`)
_NAME = re.compile(r"step-(\d{8})\.pt")
_CHUNK_BYTES = 64 << 20  # of a download, held in memory at a time
_FIELD_TYPES: dict[str, Any] = {
    "step": int, "model": dict, "optimizer": dict, "config": dict, "classes": list, "ignore_index": int,
    "data_hash": str, "backbone_sha256": str, "best_miou": float | None, "evaluated": bool, "skipped_steps": list,
    "versions": dict, "run_id": str, "format": int, "averaged": dict | None, "loss_scale": dict | None,
    "early_stopping": dict | None, "source_hashes": list,
}  # fmt: skip
_PART_TYPES: dict[str, dict[str, Any]] = {
    "averaged": {"model": dict, "updates": int},
    "loss_scale": {"scale": float, "growth_factor": float, "backoff_factor": float, "growth_interval": int,
                   "_growth_tracker": int, "overflows": int},
    "early_stopping": {"metric": str, "best": float | None, "best_step": int, "misses": int},
}  # fmt: skip


@dataclass(kw_only=True)
class Checkpoint:
    """A saved state. `model` holds adapter and head, and a trained ViT; config and hash identify a frozen one."""

    step: int  # optimiser steps completed
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    classes: list[dict[str, Any]]
    ignore_index: int
    data_hash: str  # sha256 of data.root's manifest
    backbone_sha256: str
    best_miou: float | None
    evaluated: bool  # False: an evaluation is due at this step and has not been done
    skipped_steps: list[int]  # skipped because of non-finite losses or gradients
    versions: dict[str, str]  # of the maskstream and torch that wrote it
    run_id: str = ""  # of the run it belongs to (`trainer.run.identity`); "": written before run ids existed
    averaged: dict[str, Any] | None = None  # the layout of `model`, and more (`trainer.run.averaging`); None: not kept
    loss_scale: dict[str, Any] | None = None  # see `trainer.run.loss_scaling`; None: precision is not fp16
    early_stopping: dict[str, Any] | None = None  # see `trainer.run.early_stopping`; None: off
    source_hashes: list[str] = field(default_factory=list)  # sha256 of the manifests of data.sources
    format: int = CHECKPOINT_FORMAT

    @property
    def run_config(self) -> RunConfig:
        return run_config_from_dict(self.config)

    def weights(self, kind: str) -> dict[str, Tensor]:
        """The weights to use: with "averaged" the averages if there are any; otherwise those of the last step."""
        averages: dict[str, Tensor] | None = self.averaged["model"] if self.averaged is not None else None
        return self.model if kind == "raw" or averages is None else averages

    @property
    def class_infos(self) -> list[ClassInfo]:
        """The class table. Raises ConfigError when it is malformed."""
        try:
            return classes_from_table(self.classes)
        except ValueError as error:
            raise ConfigError(f"the checkpoint's classes are damaged: {error}") from error


def checkpoint_name(step: int) -> str:
    """File name of a numbered checkpoint."""
    return f"step-{step:08d}.pt"


def load_checkpoint(path: str | Path, shown: str | None = None, *, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU, without unpickling code. With `mmap` only what is used is read, and processes on
    a host share it; but the file keeps its space on the disk, even deleted, as long as a tensor is used.

    Raises ConfigError naming the file as `shown`.
    """
    shown = shown or str(path)
    content = read_file(path, mmap=mmap, shown=shown)
    if not _is_checkpoint(content):
        version = content.get("format") if isinstance(content, dict) else None
        hint = f" but of {version}; use the MaskStream version that wrote it" if isinstance(version, int) else ""
        raise ConfigError(f"checkpoint {shown} is not a MaskStream checkpoint of format {CHECKPOINT_FORMAT}{hint}")
    return _from_content(content, shown)


def open_checkpoint(path: str | Path) -> Checkpoint | WeightsFile:
    """A MaskStream checkpoint, or weights in another layout. Raises ConfigError naming the file."""
    if names_directory(path):
        return read_weights(path)
    content = read_file(path)
    return _from_content(content, path) if _is_checkpoint(content) else weights_in(content, path)


def _from_content(content: dict[str, Any], path: str | Path) -> Checkpoint:
    older: dict[str, Any] = {"run_id": "", "source_hashes": [], **dict.fromkeys(_PART_TYPES)}  # did not write these
    content = {**older, **content}
    found: dict[tuple[str, ...], Any] = {(name,): (content.get(name), kind) for name, kind in _FIELD_TYPES.items()}
    found |= {(part, name): (content[part].get(name), kind) for part, kinds in _PART_TYPES.items()
              if isinstance(content.get(part), dict) for name, kind in kinds.items()}
    for names, (value, kind) in found.items():
        if not isinstance(value, kind):
            raise ConfigError(f"checkpoint {path}: field {'.'.join(names)!r} is missing or of the wrong type")
    return Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})


def _is_checkpoint(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT


def load_latest(place: str | Path, *, mmap: bool = False) -> Checkpoint | None:
    """The newest valid checkpoint in a folder or at a URL; damaged ones are skipped with a warning. None: no files.

    best.pt comes last: a kill during the first save, or manual cleanup, may leave only best.pt. Raises ConfigError
    when there are checkpoints but none is valid: restarting at step 0 would overwrite the run.
    """
    storage = open_storage(place)
    names = [*reversed(numbered(storage).values()), *([BEST_NAME] if BEST_NAME in _sizes(storage) else [])]
    for name in names:
        try:
            return _load_verified(storage, name, mmap)
        except (ConfigError, StorageError, OSError) as error:
            warnings.warn(f"{error}. Falling back to the previous checkpoint", stacklevel=2)
    if names:
        raise ConfigError(f"none of the {len(names)} checkpoints in {place} can be read; remove them to start over, "
                          "or choose another output_dir")
    return None


def numbered(storage: Storage) -> dict[int, str]:
    """Step -> file name of each numbered checkpoint, oldest first."""
    return {int(match[1]): match[0] for match in filter(None, map(_NAME.fullmatch, sorted(_sizes(storage))))}


def has_checkpoints(storage: Storage) -> bool:
    """Whether there is any checkpoint."""
    return bool(numbered(storage)) or BEST_NAME in _sizes(storage)


def _sizes(storage: Storage) -> dict[str, int]:
    try:
        return storage.sizes() or {}
    except FileNotFoundError:
        return {}


def _load_verified(storage: Storage, name: str, mmap: bool) -> Checkpoint:
    """Load a checkpoint after comparing it with the hash stored next to it or in it."""
    with _local_file(storage, name) as path:
        return load_checkpoint(path, storage.where(name), mmap=mmap)


@contextmanager
def _local_file(storage: Storage, name: str) -> Iterator[Path]:
    """A local path to the file, with its hash file next to it; downloaded if necessary."""
    if isinstance(storage, LocalStorage):
        yield storage.folder / name
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with suppress(FileNotFoundError):
            (path.parent / (name + HASH_SUFFIX)).write_bytes(storage.read(name + HASH_SUFFIX))
        size = (storage.sizes() or {})[name]
        with path.open("wb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                file.write(storage.read(name, start, min(_CHUNK_BYTES, size - start)))
        yield path
