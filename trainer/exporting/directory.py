"""A directory with the whole model, its settings and classes, for `load_pretrained`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from safetensors.torch import save_file

from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json
from trainer.exporting.files import plain, written
from trainer.models.integrity import safetensors_metadata, seal_safetensors
from trainer.pretrained import Pretrained, export_config


def write_directory(pretrained: Pretrained, folder: Path, *, backbone_source: str | None = None) -> list[Path]:
    """model.safetensors (the whole model, keys as in Meta's layout), then config.json.

    With `backbone_source`, a hub id, the ViT is named instead of contained.
    """
    model = pretrained.model
    state = plain(model.meta_state_dict() if backbone_source is None else model.head_state_dict())

    def write(path: Path) -> None:
        save_file(state, path, safetensors_metadata(metadata.version("maskstream")))
        seal_safetensors(path)

    weights = written(folder / "model.safetensors", write)
    config = folder / "config.json"
    write_atomically(config, to_json(export_config(pretrained, backbone_source), indent=1).encode())
    return [weights, config]
