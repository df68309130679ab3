"""Key mapping for EoMT as published for transformers' `EomtDinov3ForUniversalSegmentation`.

    transformers                                        here
    embeddings.*, layers.N.*, layernorm.*               the ViT, in Meta's layout (via DINOv3ViTModel's names)
    query, upscale_block, mask_head, class_predictor    segmentation_model.1.*, same names
    attn_mask_probs                                     segmentation_model.1.attn_mask_probs
    criterion.empty_weight                              -        (a setting of the loss)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import ConfigError
from trainer.models.fitting import listed
from trainer.models.vit_keys import PATCH_SIZE, ROPE_BASE, transformers_vit_to_meta

EOMT_MODEL_TYPE = "eomt_dinov3"
_VIT_NAMES = {"embeddings.": "embeddings.", "layers.": "model.layer.", "layernorm.": "norm."}
_HEAD_NAMES = ("query.", "upscale_block.", "mask_head.", "class_predictor.", "attn_mask_probs")
_DROPPED = ("criterion.",)


def check_eomt_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError naming a value in config.json other than the one that is fixed in DINOv3, and so in our ViT."""
    rope = config.get("rope_parameters") or {}
    for name, value, legal in (
        ("patch_size", config.get("patch_size", PATCH_SIZE), PATCH_SIZE),
        ("rope_parameters.rope_theta", rope.get("rope_theta", ROPE_BASE), ROPE_BASE),
        ("hidden_act", config.get("hidden_act", "gelu"), "silu" if config.get("use_gated_mlp") else "gelu"),
        ("key_bias", config.get("key_bias", False), False),
    ):
        if value != legal:
            raise ConfigError(f"{path}: {name} is {value!r}, legal: {legal!r}")


def split_eomt(state: Mapping[str, Tensor], num_heads: int, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (ViT in Meta's layout, head with our keys). Raises ConfigError for any other key.

    The mask token, which EoMT files lack, is zero: nothing uses it.
    """
    vit: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        prefix = next((prefix for prefix in _VIT_NAMES if key.startswith(prefix)), None)
        if prefix is not None:
            vit[_VIT_NAMES[prefix] + key.removeprefix(prefix)] = tensor
        elif key.startswith(_HEAD_NAMES):
            head[f"segmentation_model.1.{key}"] = tensor
        elif not key.startswith(_DROPPED):
            unknown.append(key)
    if unknown or "embeddings.cls_token" not in vit:
        problem = f"unexpected keys: {listed(unknown)}" if unknown else "embeddings.cls_token is missing"
        raise ConfigError(f"{path} is not an EoMT on a DINOv3 ViT; {problem}")
    vit.setdefault("embeddings.mask_token", torch.zeros_like(vit["embeddings.cls_token"]))
    try:
        return transformers_vit_to_meta(vit, num_heads), head
    except KeyError as error:
        raise ConfigError(f"{path} is not an EoMT on a DINOv3 ViT; unexpected or missing key: {error}") from error
