"""Load a ViT: from a Hugging Face directory or hub id, from a weight file, or randomly initialised."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils.logging import disable_progress_bar

from shards.errors import ConfigError
from trainer.model_config import BackboneConfig, RandomBackboneConfig
from trainer.models.fitting import grouped
from trainer.models.hub import directory_config, model_directory
from trainer.models.integrity import check_folder
from trainer.models.vit_keys import (
    META_ONLY,
    VitArchitecture,
    architecture_of,
    check_meta_vit,
    meta_vit_to_transformers,
)
from trainer.models.weights import MODEL_TYPES, WeightsFile, read_weights

_DOWNLOAD_HINT = (
    "DINOv3 weights are gated: accept the licence on the model's Hugging Face page, run `hf auth login`, then "
    "set backbone.source to the hub id (such as facebook/dinov3-vits16-pretrain-lvd1689m), to a downloaded directory "
    "with config.json and model.safetensors, or to Meta's .pth; backbone.random.hidden_size gives random weights for a "
    "dry run"
)


def load_vit(config: BackboneConfig) -> tuple[DINOv3ViTModel, dict[str, Tensor]]:
    """The configured ViT in float32 on the CPU, and its `META_ONLY` tensors if the source has any. ConfigError."""
    if config.source is not None and Path(config.source).expanduser().is_file():
        return _vit_from_weights(read_weights(Path(config.source).expanduser(), mmap=False))
    if config.source is not None:
        folder = model_directory(config.source, f"Set by backbone.source. {_DOWNLOAD_HINT}")
        if directory_config(folder).get("model_type") in MODEL_TYPES:
            return _vit_from_weights(read_weights(folder, mmap=False))
        return _pretrained_vit(folder), {}
    if config.random.hidden_size is not None:
        return _random_vit(config.random, config.random.hidden_size), {}
    raise ConfigError(f"neither backbone.source nor backbone.random.hidden_size is set. {_DOWNLOAD_HINT}")


def _random_vit(config: RandomBackboneConfig, hidden_size: int) -> DINOv3ViTModel:
    if hidden_size % (4 * config.num_attention_heads):
        raise ConfigError(f"backbone.random.hidden_size is {hidden_size}, legal: a multiple of 4 * num_attention_heads "
                          f"({4 * config.num_attention_heads}), for the rotary position embedding")
    architecture = VitArchitecture(
        dim=hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        gated=config.use_gated_mlp,
        registers=config.num_register_tokens,
    )
    # Not torch.manual_seed, which would also re-seed the generators of all accelerators.
    torch.default_generator.manual_seed(config.seed)
    return DINOv3ViTModel(architecture.config())


def _vit_from_weights(weights: WeightsFile) -> tuple[DINOv3ViTModel, dict[str, Tensor]]:
    """The ViT of a weight file and the file's META_ONLY tensors. They become the weights without a copy."""
    state = weights.vit
    if not state:
        raise ConfigError(f"backbone.source {weights.path} contains a head but no ViT; set load.weights to it instead")
    what = f"the ViT's weights in {weights.path}"
    with torch.device("meta"):
        vit = DINOv3ViTModel(architecture_of(state, what).config(weights.layer_norm_eps))
    check_meta_vit(vit, state, what)
    converted = {key: tensor.float() for key, tensor in meta_vit_to_transformers(state).items()}
    vit.load_state_dict(converted, assign=True)
    vit.rope_embeddings = type(vit.rope_embeddings)(vit.config)  # files lack its buffer, still on the meta device
    return vit, {key: state[key] for key in META_ONLY if key in state}


def _check_sizes(folder: Path) -> None:
    """Check the sizes in config.json: transformers allocates the model before reading its weights."""
    config, default = directory_config(folder), DINOv3ViTConfig()
    names = {"dim": "hidden_size", "blocks": "num_hidden_layers", "heads": "num_attention_heads",
             "ffn": "intermediate_size", "registers": "num_register_tokens"}
    sizes = {name: config.get(key, getattr(default, key)) for name, key in names.items()}
    try:
        VitArchitecture(**sizes, gated=config.get("use_gated_mlp") is True).check()
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error


def _pretrained_vit(folder: Path) -> DINOv3ViTModel:
    model_type = directory_config(folder).get("model_type")
    if model_type != DINOv3ViTConfig.model_type:
        legal = (DINOv3ViTConfig.model_type, *MODEL_TYPES)
        raise ConfigError(f"backbone.source {folder} is a model of type {model_type!r}, legal: {', '.join(legal)}")
    _check_sizes(folder)
    check_folder(folder)
    if not sys.stderr.isatty():
        disable_progress_bar()  # as for our own progress bars
    try:
        loaded: Any = DINOv3ViTModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except OSError as error:
        raise ConfigError(f"backbone.source {folder} cannot be loaded ({error}). {_DOWNLOAD_HINT}") from error
    vit, report = loaded
    missing = sorted(set(report["missing_keys"]) - {"embeddings.mask_token"})  # the mask token is never used
    if missing:
        raise ConfigError(f"backbone.source {folder} lacks {len(missing)} weights, the first is {missing[0]}. "
                          f"{_DOWNLOAD_HINT}")
    # transformers only logs these: a ViT-S+ loaded with a ViT-S config.json would run, but without its gates.
    problems = grouped(missing=(), unexpected=report["unexpected_keys"],
                       misshaped=(key for key, *_ in report["mismatched_keys"]))
    if problems:
        raise ConfigError(f"backbone.source {folder}: config.json does not describe the ViT in the weights; {problems}")
    return vit
