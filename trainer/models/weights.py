"""Reading weight files, whoever wrote them, without running code from them.

    a ViT                     Meta's backbone .pth: a plain state dict
    adapter and head          Meta's Mask2Former release, bare; or a training checkpoint, {"model": ...}
    a head alone              Meta's linear head: keys segmentation_model.1.* only
    the whole model           all of the above in one, the ViT below segmentation_model.0.backbone. (or .feature_model.)
    our own checkpoints       {"model": adapter and head, "backbone_sha256": ..., ...}

Each may be a torch or a safetensors file. A Hugging Face directory is read by `trainer.models.backbone`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import ConfigError
from trainer.models.fitting import listed

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
VIT_PREFIXES = ("segmentation_model.0.backbone.", "segmentation_model.0.feature_model.")
_MODEL = "segmentation_model."


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What a file holds: a ViT in Meta's layout, adapter and head with the reference's keys, or both."""

    path: Path
    vit: dict[str, Tensor] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    backbone_sha256: str | None = None  # in our own checkpoints: the ViT that the head was trained on


def read_weights(path: str | Path, *, mmap: bool = True) -> WeightsFile:
    """Read any of the layouts above (`mmap` as in `read_file`). Raises ConfigError naming the file."""
    return weights_in(read_file(path, mmap=mmap), path)


def read_file(path: str | Path, *, mmap: bool = True) -> Any:
    """The content of a torch or safetensors file, on the CPU; nothing in it is executed. Raises ConfigError.

    With `mmap` tensors are pages of the file, so a large model can be copied from it without being in memory twice.
    They must not be kept: overwriting a mapped file kills the process. Torch's old format cannot be mapped.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a checkpoint file in it, such as checkpoints/best.pt")
    if not path.exists():
        raise ConfigError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            mapped = load_file(path)
            return mapped if mmap else {key: tensor.clone() for key, tensor in mapped.items()}
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"checkpoint {path} cannot be read, it is damaged or holds more than plain tensors: "
                          f"{reason}") from error


def weights_in(content: Any, path: str | Path) -> WeightsFile:
    """Sort the content of a weight file by its keys. Raises ConfigError when it is of no layout above."""
    path = Path(path)
    wrapped = isinstance(content, Mapping) and isinstance(content.get("model"), Mapping)
    state = content["model"] if wrapped else content
    if not isinstance(state, Mapping) or not state:
        raise ConfigError(f"{path} holds no weights")
    if all(str(key).startswith("module.") for key in state):  # saved from inside DistributedDataParallel
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ConfigError(f"{path} is no plain state dict, these entries are no tensors: {listed(others)}")
    if "cls_token" in state:
        return WeightsFile(path=path, vit=dict(state))
    if not any(key.startswith(_MODEL) for key in state):
        raise ConfigError(f"{path} holds neither a DINOv3 ViT in Meta's layout nor a segmentation model; its keys are "
                          f"{listed(state)}. For a Hugging Face model name its directory in backbone.source")
    vit = {key.removeprefix(prefix): tensor for key, tensor in state.items() for prefix in VIT_PREFIXES
           if key.startswith(prefix)}
    model = {key: tensor for key, tensor in state.items() if not key.startswith(VIT_PREFIXES)}
    return WeightsFile(path=path, vit=vit, model=model,
                       backbone_sha256=content.get("backbone_sha256") if wrapped else None)
