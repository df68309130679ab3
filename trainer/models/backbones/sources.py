"""Load a ViT: from a Hugging Face directory or hub id, from a weight file, or randomly initialised.

The only module that knows which families of ViTs there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from shards.errors import ConfigError
from trainer.model_config import TOKEN_STRIDE, BackboneConfig, RandomBackboneConfig
from trainer.models.backbones.base import Backbone, tapped_layers
from trainer.models.backbones.dinov2 import Dinov2Backbone
from trainer.models.backbones.dinov2_keys import (
    build_dinov2,
    check_dinov2,
    dinov2_architecture_of,
    dinov2_directory_to_meta,
    dinov2_to_transformers,
    is_dinov2,
)
from trainer.models.backbones.dinov3 import DINOv3Backbone
from trainer.models.backbones.dinov3_keys import (
    META_ONLY,
    ROPE_BASE,
    VitArchitecture,
    architecture_of,
    check_meta_vit,
    dinov3_directory_to_meta,
    meta_vit_to_transformers,
)
from trainer.models.declared import MALFORMED, check_declared, declared_epsilon, declared_heads
from trainer.models.hub import directory_config, directory_tensors, model_directory
from trainer.models.weights import MODEL_TYPES, WeightsFile, check_tensors, read_weights

_DOWNLOAD_HINT = (
    "DINOv3 weights are gated: accept the licence on the model's Hugging Face page, run `hf auth login`, then "
    "set backbone.source to the hub id (such as facebook/dinov3-vits16-pretrain-lvd1689m), to a downloaded directory "
    "with config.json and model.safetensors, or to Meta's .pth. DINOv2 (facebook/dinov2-small) is not gated; "
    "backbone.random.hidden_size gives random weights for a dry run"
)
_CONFIGS: dict[str, Any] = {
    kind.model_type: kind for kind in (DINOv3ViTConfig, Dinov2Config, Dinov2WithRegistersConfig)
}


def build_backbone(config: BackboneConfig, *, use_norm: bool = True, released_heads: bool = True) -> Backbone:
    """The configured ViT in float32 on the CPU; preserves torch's global RNG state. Raises ConfigError.

    `use_norm` as in `Backbone`, `released_heads` as in `tapped_layers`.
    """
    with torch.random.fork_rng(devices=[]):
        vit, meta_only = load_vit(config)
    layers = tapped_layers(vit.config.num_hidden_layers, config.layers, released_heads=released_heads)
    if isinstance(vit, DINOv3ViTModel):
        _refuse_patch_resize(config, TOKEN_STRIDE)
        return DINOv3Backbone(vit, layers, meta_only, trainable=config.trainable, use_norm=use_norm,
                              rope_rescale=config.rope_rescale)
    _refuse_patch_resize(config, vit.config.patch_size)
    if config.rope_rescale is not None:
        raise ConfigError(f"backbone.rope_rescale is {config.rope_rescale}, but the backbone is a DINOv2, which has no "
                          "rotary position embedding; set it to null")
    return Dinov2Backbone(vit, layers, patch_resize=config.patch_resize, trainable=config.trainable, use_norm=use_norm)


def _refuse_patch_resize(config: BackboneConfig, patch_size: int) -> None:
    if config.patch_resize != "weights" and patch_size == TOKEN_STRIDE:
        raise ConfigError(f"backbone.patch_resize is {config.patch_resize}, but the backbone's patches have "
                          f"{TOKEN_STRIDE} pixels already; leave it at weights")


def load_vit(config: BackboneConfig) -> tuple[Any, dict[str, Tensor]]:
    """The configured ViT, a model of transformers, in float32 on the CPU, and the `META_ONLY` tensors of a DINOv3 if
    the source has any. Raises ConfigError."""
    if config.source is not None and Path(config.source).expanduser().is_file():
        return _vit_from_weights(read_weights(Path(config.source).expanduser(), mmap=False))
    if config.source is not None:
        folder = model_directory(config.source, f"Set by backbone.source. {_DOWNLOAD_HINT}")
        if directory_config(folder).get("model_type") in MODEL_TYPES:
            return _vit_from_weights(read_weights(folder, mmap=False))
        return _vit_from_weights(_pretrained_vit(folder))
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


def _vit_from_weights(weights: WeightsFile) -> tuple[Any, dict[str, Tensor]]:
    """The ViT of a weight file and the file's META_ONLY tensors. They become the weights without a copy."""
    state = weights.vit
    if not state:
        raise ConfigError(f"backbone.source {weights.path} contains a head but no ViT; set load.weights to it instead")
    if weights.vit_form != "complete":
        raise ConfigError(f"backbone.source {weights.path} does not hold a complete ViT ({weights.vit_form}); set "
                          "backbone.source to the pretrained ViT that it was made from, and load.weights to this file")
    what = f"the ViT's weights in {weights.path}"
    if is_dinov2(state):
        return _dinov2_from(weights, what), {}
    with torch.device("meta"):
        vit = DINOv3ViTModel(architecture_of(state, what).config(**_epsilon(weights)))
    check_meta_vit(vit, state, what)
    vit.load_state_dict(_as_float(meta_vit_to_transformers(state)), assign=True)
    vit.rope_embeddings = type(vit.rope_embeddings)(vit.config)  # files lack its buffer, still on the meta device
    return vit, {key: state[key] for key in META_ONLY if key in state}


def _dinov2_from(weights: WeightsFile, what: str) -> nn.Module:
    architecture = dinov2_architecture_of(weights.vit, weights.num_heads, what)
    with torch.device("meta"):
        vit = build_dinov2(architecture.config(**_epsilon(weights)))
    check_dinov2(vit, weights.vit, what)
    state = _as_float(dinov2_to_transformers(weights.vit))
    state.setdefault("embeddings.mask_token", torch.zeros(1, architecture.dim, device="cpu"))
    vit.load_state_dict(state, assign=True)
    return vit


def _epsilon(weights: WeightsFile) -> dict[str, float]:
    return {} if weights.layer_norm_eps is None else {"layer_norm_eps": weights.layer_norm_eps}


def _as_float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in state.items()}


def _pretrained_vit(folder: Path) -> WeightsFile:
    """The ViT of a Hugging Face directory. Not through `from_pretrained`, which obeys all of config.json (attention
    implementation, quantisation, sizes to allocate) and only logs what does not fit."""
    config, path = directory_config(folder), folder / "config.json"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CONFIGS:
        legal = (*_CONFIGS, *MODEL_TYPES)
        raise ConfigError(f"backbone.source {folder} is a model of type {model_type!r}, legal: {', '.join(legal)}")
    config = {**_CONFIGS[model_type]().to_dict(), **config}
    is_dinov3 = model_type == DINOv3ViTConfig.model_type
    heads, epsilon = declared_heads(config, path, divisor=4 if is_dinov3 else 1), declared_epsilon(config, path)
    tensors = directory_tensors(folder)
    check_tensors(tensors, folder)
    what = f"the ViT's weights in {folder}"
    try:
        if is_dinov3:
            vit = dinov3_directory_to_meta(tensors, heads)
            declared = architecture_of(vit, what).declared() | {"rope_theta": ROPE_BASE}
        else:
            vit = dinov2_directory_to_meta(tensors)
            declared = dinov2_architecture_of(vit, heads, what).declared(config.get("mlp_ratio"))
            declared["qkv_bias"] = True
    except ConfigError:
        raise
    except MALFORMED as error:
        raise ConfigError(f"{what} are not a {model_type}; unexpected, missing or malformed key: {error}") from error
    check_declared(config, declared, path)
    return WeightsFile(path=folder, vit=vit, layer_norm_eps=epsilon, num_heads=heads)
