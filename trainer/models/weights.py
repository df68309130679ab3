"""Read weight files of any supported program, without running code from them.

    a ViT                     Meta's backbone .pth: a plain state dict
    adapter and head          Meta's Mask2Former release, bare; or a training checkpoint, {"model": ...}
    a head alone              Meta's linear head: keys segmentation_model.1.* only
    the whole model           all of the above, with the ViT under segmentation_model.0.backbone. (or .feature_model.)
    our own checkpoints       {"model": adapter and head (and a trained ViT), "backbone_sha256": ..., ...}; of one with
                              {"averaged": {"model": ...}} the averaged weights

    tue-mps' EoMT and PMT     network.*, bare or {"state_dict": ...} (`trainer.models.tue_mps_keys`)

Each can be a torch or a safetensors file. Directories, or their hub ids, with config.json and safetensors:

    eomt_dinov3, eomt         EoMT as published for transformers (`trainer.models.eomt_keys`)
    maskstream                written by `trainer/export.py`: the whole model (or all but a ViT that it names),
                              settings and classes

A Hugging Face directory of a ViT contains no head; `trainer.models.backbones.sources` reads it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import ConfigError
from trainer.models.declared import declared_backbone, declared_count, declared_epsilon
from trainer.models.eomt_keys import EOMT_CONFIGS, complete_eomt_config, split_eomt
from trainer.models.fitting import listed
from trainer.models.hub import directory_config, directory_tensors, is_hub_id, model_directory, single_file
from trainer.models.integrity import check_config, check_file
from trainer.models.tue_mps_keys import is_tue_mps, split_tue_mps

EXPORT_MODEL_TYPE = "maskstream"
MODEL_TYPES = (*EOMT_CONFIGS, EXPORT_MODEL_TYPE)  # of directories that hold a whole model
VIT_PREFIXES = ("segmentation_model.0.backbone.", "segmentation_model.0.feature_model.")
_MODEL = "segmentation_model."
_MAX_DEPTH = 32  # of nested containers


class _ContentRefused(ValueError):
    """The file could be read, but its content is not safe to use."""


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """Content of a weight file: a ViT in Meta's layout, adapter and head with the reference's keys, or both.

    A ViT is partial if its file leaves out what `Backbone.completed` adds; differences are to be added to another one.
    """

    path: Path
    vit: dict[str, Tensor] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    backbone_sha256: str | None = None  # in our own files without it: the ViT that the head was trained on
    vit_form: Literal["complete", "partial", "differences"] = "complete"
    layer_norm_eps: float | None = None  # of the ViT; None: that of its family
    num_heads: int | None = None  # of the ViT; None: as its layout says, or as usual in its family
    is_averaged: bool = False  # from a checkpoint of ours that has both: the averaged weights, not the raw ones
    activation: str | None = None  # that the head was trained with, where it cannot follow the ViT's
    class_names: list[str] | None = None  # that the head was trained on, in our own files
    config: dict[str, Any] = field(default_factory=dict)  # a directory's config.json

    @property
    def is_self_contained(self) -> bool:
        """Whether it includes the network's settings and classes. Other programs' weights do not."""
        return self.config.get("model_type") == EXPORT_MODEL_TYPE


def read_weights(path: str | Path, *, mmap: bool = True) -> WeightsFile:
    """Read any of the layouts above (for `mmap` see `read_file`). Raises ConfigError naming the file."""
    if names_directory(path):
        if (file := single_file(path)) is not None:
            return weights_in(read_file(file, mmap=mmap), file)
        hint = "For a checkpoint, give its file, such as checkpoints/best.pt"
        return _read_directory(model_directory(path, hint), mmap=mmap)
    return weights_in(read_file(path, mmap=mmap), path)


def names_directory(path: str | Path) -> bool:
    """Whether the path is a folder or a hub id, rather than a file."""
    return Path(path).expanduser().is_dir() or (not Path(path).exists() and is_hub_id(str(path)))


def _read_directory(folder: Path, *, mmap: bool) -> WeightsFile:
    config = directory_config(folder)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{folder} is a model of type {model_type!r}, legal: {', '.join(MODEL_TYPES)}; give a ViT "
                          "without a head as backbone.source, and a checkpoint as a file, such as checkpoints/best.pt")
    state = directory_tensors(folder)
    check_tensors(state, folder)
    if not mmap:
        state = {key: tensor.clone() for key, tensor in state.items()}
    if model_type == EXPORT_MODEL_TYPE:
        check_config(config, folder / "config.json")
        path = folder / "config.json"
        heads = None  # in exports of older versions
        if "num_attention_heads" in config:
            heads = declared_count(config, "num_attention_heads", path, most=512)
        _, sha256 = declared_backbone(config, path) or (None, None)
        return replace(weights_in(state, folder), layer_norm_eps=declared_epsilon(config, path), num_heads=heads,
                       backbone_sha256=sha256, config=config, class_names=_class_names(config))
    complete = complete_eomt_config(config, folder / "config.json")
    vit, head = split_eomt(state, complete, folder)
    return WeightsFile(path=folder, vit=vit, model=head, layer_norm_eps=complete["layer_norm_eps"],
                       num_heads=complete["num_attention_heads"], config=config)


def read_file(path: str | Path, *, mmap: bool = True, shown: str | None = None) -> Any:
    """The content of a torch or safetensors file, on the CPU, without executing code from it. Raises ConfigError naming
    the file as `shown`.

    Its hashes are checked first (`trainer.models.integrity`). With `mmap` tensors are mapped from the file, so that a
    large model can be copied without being in memory twice. They must not be kept: overwriting a mapped file kills the
    process. Torch's legacy format cannot be mapped.
    """
    path = Path(path)
    shown = shown or str(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a checkpoint file in it, such as checkpoints/best.pt")
    if not path.is_file():
        raise ConfigError(f"checkpoint {shown} {'is not a regular file' if path.exists() else 'does not exist'}")
    check_file(path, shown)
    try:
        if path.suffix == ".safetensors":
            mapped = load_file(path)
            return mapped if mmap else {key: tensor.clone() for key, tensor in mapped.items()}
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        _check_content(content)
        return content
    except MemoryError:
        raise
    except Exception as error:
        raise ConfigError(f"checkpoint {shown} cannot be read, it is damaged or contains more than plain tensors: "
                          f"{_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """The cause in our own words, because torch's messages suggest executing code from the file."""
    text = str(error)
    if isinstance(error, _ContentRefused):
        return text
    if path.stat().st_size == 0:
        return "it is empty"
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it contains a {refused[1]}; save the model's state_dict() instead"
    if "TorchScript" in text:
        return "it is a TorchScript archive; save the model's state_dict() instead"
    if path.suffix != ".safetensors" and ("weights_only" in text or not isinstance(error, RuntimeError | OSError)):
        return "it was not written by torch.save, or its first bytes are damaged"
    return text.strip().partition("\n")[0].partition(". This is an internal")[0]


def _check_content(content: Any) -> None:
    """Raise _ContentRefused for tensors that claim more elements than the file has, and for too deeply nested
    containers: copying or comparing them would exhaust memory or Python's stack."""
    level: list[Any] = [content]
    seen = set[int]()
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Tensor) and item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise _ContentRefused(f"a tensor of shape {tuple(item.shape)} has fewer elements in the file")
            if isinstance(item, dict | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                inner += item.values() if isinstance(item, dict) else item
        level = inner
    if level:
        raise _ContentRefused(f"it is nested more than {_MAX_DEPTH} levels deep")


def check_tensors(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise ConfigError for tensors that cannot be weights: not plain floating-point numbers (but for batch norm's
    counter), not finite, or a negative variance."""
    for key, tensor in state.items():
        is_counter = key.endswith("num_batches_tracked")
        if not (tensor.is_floating_point() or is_counter) or tensor.is_quantized or tensor.is_meta or tensor.is_sparse:
            raise ConfigError(f"{where}: {key} is a tensor of {tensor.dtype} on {tensor.device}, legal: plain "
                              "floating-point numbers")
        if is_counter or not tensor.numel():
            continue
        if not bool(tensor.sum(dtype=torch.float32).isfinite()):
            raise ConfigError(f"{where}: {key} has values that are not finite; the training that wrote it diverged, or "
                              "the file is damaged")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise ConfigError(f"{where}: {key} has negative values, legal: variances, 0 or more")


def weights_in(content: Any, path: str | Path) -> WeightsFile:
    """Split the content of a weight file by its keys. Raises ConfigError when it has none of the layouts above."""
    path = Path(path)
    wrapped = isinstance(content, Mapping) and isinstance(content.get("model"), Mapping)
    averages = content["averaged"].get("model") if wrapped and isinstance(content.get("averaged"), Mapping) else None
    state = (averages or content["model"]) if wrapped else content
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise ConfigError(f"{path} contains no weights")
    if all(str(key).startswith("module.") for key in state):  # saved from inside DistributedDataParallel
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if others:
        raise ConfigError(f"{path} is not a plain state dict, these entries are not named tensors: {listed(others)}")
    check_tensors(state, path)
    if "cls_token" in state:
        return WeightsFile(path=path, vit=dict(state))
    if is_tue_mps(state):
        vit, head, is_delta = split_tue_mps(state, path)
        return WeightsFile(path=path, vit=vit, model=head, vit_form="differences" if is_delta else "partial",
                           activation="gelu")
    if not any(key.startswith(_MODEL) for key in state):
        raise ConfigError(f"{path} contains neither a ViT in Meta's layout nor a segmentation model; its keys "
                          f"are {listed(state)}. For a Hugging Face model, set backbone.source to its directory")
    vit = {key.removeprefix(prefix): tensor for key, tensor in state.items() for prefix in VIT_PREFIXES
           if key.startswith(prefix)}
    model = {key: tensor for key, tensor in state.items() if not key.startswith(VIT_PREFIXES)}
    return WeightsFile(path=path, vit=vit, model=model,
                       backbone_sha256=content.get("backbone_sha256") if wrapped else None,
                       is_averaged=bool(averages), class_names=_class_names(content))


def _class_names(content: Mapping[str, Any]) -> list[str] | None:
    """The names in our own class table; None in other files, and where it is malformed."""
    table = content.get("classes")
    names = [info.get("name") for info in table if isinstance(info, dict)] if isinstance(table, list) else []
    return [str(name) for name in names] or None
