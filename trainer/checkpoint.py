"""Save and load training state: everything that decides the next step, except the frozen backbone."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.atomic import write_atomically
from shards.errors import ConfigError
from shards.manifest import ClassInfo, Manifest
from trainer.config import RunConfig, run_config_from_dict
from trainer.models.weights import WeightsFile, names_directory, read_file, read_weights, weights_in

CHECKPOINT_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.pt")
_FIELD_TYPES: dict[str, Any] = {
    "step": int, "model": dict, "optimizer": dict, "config": dict, "classes": list, "ignore_index": int,
    "data_hash": str, "backbone_sha256": str, "best_miou": float | None, "format": int,
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
    data_hash: str
    backbone_sha256: str
    best_miou: float | None
    format: int = CHECKPOINT_FORMAT

    @property
    def run_config(self) -> RunConfig:
        return run_config_from_dict(self.config)

    @property
    def class_infos(self) -> list[ClassInfo]:
        return [ClassInfo(name=item["name"], color=tuple(item["color"])) for item in self.classes]


def class_table(manifest: Manifest) -> list[dict[str, Any]]:
    """The manifest's classes as plain containers."""
    return [asdict(item) | {"color": list(item.color)} for item in manifest.classes]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `<folder>/step-NNNNNNNN.pt` atomically: a kill at any moment leaves the old files or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    path = folder / f"step-{checkpoint.step:08d}.pt"
    write_atomically(path, buffer.getvalue())
    return path


def save_best(folder: Path, newest: Path) -> None:
    """Keep a copy of a checkpoint as `best.pt`."""
    write_atomically(folder / "best.pt", newest.read_bytes())


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest numbered checkpoints."""
    for path in _numbered(folder)[:-keep]:
        path.unlink()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint on the CPU, without unpickling code. Raises ConfigError naming the file."""
    content = read_file(path, mmap=False)  # a run goes on from these tensors while its old files are deleted
    if not _is_ours(content):
        raise ConfigError(f"checkpoint {path} is not a MaskStream checkpoint of format {CHECKPOINT_FORMAT}")
    return _from_content(content, path)


def open_checkpoint(path: str | Path) -> Checkpoint | WeightsFile:
    """One of our checkpoints, or the weights that another program wrote. Raises ConfigError naming the file."""
    if names_directory(path):
        return read_weights(path)
    content = read_file(path)
    return _from_content(content, path) if _is_ours(content) else weights_in(content, path)


def _from_content(content: dict[str, Any], path: str | Path) -> Checkpoint:
    for field in fields(Checkpoint):
        if not isinstance(content.get(field.name), _FIELD_TYPES[field.name]):
            raise ConfigError(f"checkpoint {path}: field {field.name!r} is missing or of the wrong type")
    return Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of a run; a damaged one is passed over with a warning; None: there is none.

    Raises ConfigError when there are checkpoints but none is readable: starting anew would overwrite the run.
    """
    paths = _numbered(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except ConfigError as error:
            warnings.warn(f"{error}. Falling back to the checkpoint before it", stacklevel=2)
    if paths:
        raise ConfigError(f"none of the {len(paths)} checkpoints in {folder} can be read; remove them to start anew "
                          "there, or choose another output_dir")
    return None


def _numbered(folder: Path) -> list[Path]:
    """Numbered checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
