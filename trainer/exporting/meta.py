"""Meta's layouts: adapter and head as in its released file, and the ViT."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.exporting.files import plain, written
from trainer.models.integrity import SealedFile
from trainer.pretrained import Pretrained


def write_meta_files(pretrained: Pretrained, folder: Path) -> list[Path]:
    """meta/head.pth, a bare state dict of adapter and head like Meta's release; meta/backbone.pth, like Meta's ViTs.

    Raises ConfigError when Meta's layout cannot describe the ViT.
    """
    pretrained.model.backbone.check_meta_file()
    head = plain(pretrained.model.head_state_dict())
    vit = plain(pretrained.model.backbone.meta_state_dict())
    return [written(folder / "meta" / "head.pth", lambda path: _save_sealed(head, path)),
            written(folder / "meta" / "backbone.pth", lambda path: _save_sealed(vit, path))]


def _save_sealed(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        sealed = SealedFile(file)
        torch.save(state, sealed)  # type: ignore[arg-type]  # only written to
        sealed.seal()
