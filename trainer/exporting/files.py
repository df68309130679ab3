"""What all exports share: files written atomically with their sha256 next to them, and the error of a wrong export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from shards.errors import MaskStreamError
from shards.files.atomic import atomic_path
from trainer.models.integrity import write_hash_beside


class ExportError(MaskStreamError):
    """An export cannot be made or published, or its outputs differ from the model's."""


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict ready to be stored."""
    return {key: tensor.detach().contiguous() for key, tensor in state.items()}


def written(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file atomically, with its sha256 next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write(temporary)
    write_hash_beside(path)
    return path
