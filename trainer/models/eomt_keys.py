"""Key mapping for EoMT as published for transformers: `EomtDinov3ForUniversalSegmentation` and, on a DINOv2,
`EomtForUniversalSegmentation`.

    transformers                                        here
    embeddings.*, layers.N.*, layernorm.*               the ViT, in Meta's layout (via the names of transformers' ViT)
    query, upscale_block, mask_head, class_predictor    segmentation_model.1.*, same names
    attn_mask_probs                                     segmentation_model.1.attn_mask_probs
    criterion.empty_weight                              -        (a setting of the loss)

An EoMT on a DINOv2 has patches of 16 pixels, and positions for the patches only: that of the class token is part of
the token, and zero here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EomtConfig, EomtDinov3Config, PreTrainedConfig

from shards.errors import ConfigError
from trainer.model_config import TOKEN_STRIDE
from trainer.models.backbones.dinov2_keys import Dinov2Architecture, dinov2_architecture_of, dinov2_to_meta
from trainer.models.backbones.dinov3_keys import (
    ROPE_BASE,
    VitArchitecture,
    architecture_of,
    transformers_vit_to_meta,
)
from trainer.models.declared import MALFORMED, check_declared, declared_epsilon, declared_heads
from trainer.models.fitting import listed

EOMT_CONFIGS: dict[str, type[PreTrainedConfig]] = {"eomt_dinov3": EomtDinov3Config, "eomt": EomtConfig}
_DINOV3_NAMES = {"embeddings.": "embeddings.", "layers.": "model.layer.", "layernorm.": "norm."}
_DINOV2_NAMES = {"embeddings.": "embeddings.", "layers.": "encoder.layer.", "layernorm.": "layernorm."}
_POSITIONS = "embeddings.position_embeddings"
_HEAD_NAMES = ("query.", "upscale_block.", "mask_head.", "class_predictor.", "attn_mask_probs")
_DROPPED = ("criterion.",)


def complete_eomt_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """config.json with transformers' defaults. Raises ConfigError naming a value other than the one that is fixed in
    the published models, and so in our ViTs."""
    try:
        complete = EOMT_CONFIGS[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers' own checks of types raise many kinds
        raise ConfigError(f"{path} is not a valid configuration: {' '.join(str(error).split())}") from error
    complete["layer_norm_eps"] = declared_epsilon(complete, path)
    fixed: list[tuple[str, Any, Any]] = [("patch_size", complete.get("patch_size", TOKEN_STRIDE), TOKEN_STRIDE)]
    if config["model_type"] == "eomt_dinov3":
        rope = complete.get("rope_parameters") or {}
        fixed += [("rope_parameters.rope_theta", rope.get("rope_theta", ROPE_BASE), ROPE_BASE),
                  ("hidden_act", complete["hidden_act"], "silu" if complete.get("use_gated_mlp") else "gelu"),
                  ("key_bias", complete.get("key_bias", False), False)]
    else:
        fixed += [("hidden_act", complete["hidden_act"], "gelu")]
    for name, value, legal in fixed:
        if value != legal:
            raise ConfigError(f"{path}: {name} is {value!r}, legal: {legal!r}")
    return complete


def split_eomt(state: Mapping[str, Tensor], config: Mapping[str, Any],
               path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (ViT in Meta's layout, head with our keys). Raises ConfigError for any other key."""
    is_dinov3 = config["model_type"] == "eomt_dinov3"
    names = _DINOV3_NAMES if is_dinov3 else _DINOV2_NAMES
    vit: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
        if prefix is not None:
            vit[names[prefix] + key.removeprefix(prefix)] = tensor
        elif key.startswith(_HEAD_NAMES):
            head[f"segmentation_model.1.{key}"] = tensor
        elif not key.startswith(_DROPPED):
            unknown.append(key)
    what = f"{path} is not an EoMT on a {'DINOv3' if is_dinov3 else 'DINOv2'} ViT"
    if unknown or "embeddings.cls_token" not in vit:
        problem = f"unexpected keys: {listed(unknown)}" if unknown else "embeddings.cls_token is missing"
        raise ConfigError(f"{what}; {problem}")
    convert: Callable[..., dict[str, Tensor]] = _dinov3_vit if is_dinov3 else _dinov2_vit
    file = path / "config.json"
    heads = declared_heads(config, file, divisor=4 if is_dinov3 else 1)
    try:
        meta = convert(vit, heads)
        found = f"the ViT's weights in {path}"
        architecture = architecture_of(meta, found) if is_dinov3 else dinov2_architecture_of(meta, heads, found)
        check_declared(config, _declared(architecture, head, config), file)
        check_shares(head, path)
        return meta, head
    except ConfigError:
        raise
    except MALFORMED as error:
        raise ConfigError(f"{what}; unexpected, missing or malformed key: {error}") from error


def _declared(architecture: VitArchitecture | Dinov2Architecture, head: Mapping[str, Tensor],
              config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json should say of these weights."""
    names = "segmentation_model.1."
    sizes = (architecture.declared() if isinstance(architecture, VitArchitecture) else
             architecture.declared(config.get("mlp_ratio")) | {"num_register_tokens": architecture.registers})
    return sizes | {
        "num_queries": head[f"{names}query.weight"].shape[0],
        "num_blocks": head[f"{names}attn_mask_probs"].shape[0],
        "num_upscale_blocks": len({key.split(".")[4] for key in head if key.startswith(f"{names}upscale_block.")})}


def check_shares(head: Mapping[str, Tensor], path: Path) -> None:
    """Raise ConfigError unless the shares of masked queries are fractions."""
    shares = head.get("segmentation_model.1.attn_mask_probs")
    if shares is not None and not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ConfigError(f"{path}: attn_mask_probs is {shares.tolist()}, legal: fractions from 0 to 1")


def with_class_position(positions: Tensor) -> Tensor:
    """Positions of the patches [N, D] or [1, N, D] -> [1, 1 + N, D], with a zero for the class token. Raises ValueError
    when they are not a square."""
    positions = positions if positions.ndim == 3 else positions[None]
    if positions.ndim != 3 or len(positions) != 1 or math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        raise ValueError(f"positions of shape {tuple(positions.shape)} are not a square of patches")
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _dinov3_vit(vit: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """In Meta's layout. The mask token, which EoMT files lack, is zero: nothing uses it."""
    vit.setdefault("embeddings.mask_token", torch.zeros_like(vit["embeddings.cls_token"]))
    return transformers_vit_to_meta(vit, heads)


def _dinov2_vit(vit: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """In Meta's layout."""
    renamed = {key.replace(".attention.out_proj.", ".attention.o_proj."): tensor for key, tensor in vit.items()}
    if len(renamed) < len(vit):
        raise KeyError("attention.out_proj beside attention.o_proj")
    renamed[_POSITIONS] = with_class_position(renamed.pop(f"{_POSITIONS}.weight"))
    if not renamed["embeddings.register_tokens"].numel():
        del renamed["embeddings.register_tokens"]
    return dinov2_to_meta(renamed)
