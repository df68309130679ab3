"""Key mapping for the files of github.com/tue-mps: EoMT (on DINOv3 or DINOv2) and PMT, as `pytorch_model.bin`.

    tue-mps                                             here
    network.q, .class_head, .mask_head, .upscale        segmentation_model.1.*, in transformers' names of EoMT
    network.decoder.*, network.bn.*                     segmentation_model.1.*, the same with PMT's own parts
    network.encoder.backbone.*                          the ViT, in Meta's layout
    network.encoder.pixel_mean, pixel_std               -        (checked)
    criterion.*, network.decoder.pe.*                   -

An EoMT on a DINOv3 may hold *differences*: its ViT is the pretrained one plus the file's, and its head and buffers are
the file's plus what they are when built. The file does not say so, but its pixel_mean does: it is a buffer, so zero in
a file of differences and ImageNet's in any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shards.errors import ConfigError
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD
from trainer.models.backbones.dinov3_keys import PERIODS, transformers_vit_to_meta
from trainer.models.declared import MALFORMED
from trainer.models.eomt_keys import check_shares, with_class_position
from trainer.models.fitting import listed

NETWORK = "network."
_ENCODER = "encoder.backbone."
_DECODER = "decoder."  # of PMT
_PIXELS = "encoder.pixel_"
_HEAD_NAMES = (
    (r"q\.", "query."),
    (r"class_head\.", "class_predictor."),
    (r"mask_head\.0\.", "mask_head.fc1."),
    (r"mask_head\.2\.", "mask_head.fc2."),
    (r"mask_head\.4\.", "mask_head.fc3."),
    (r"upscale\.(\d+)\.norm\.", r"upscale_block.block.\1.layernorm2d."),
    (r"upscale\.(\d+)\.", r"upscale_block.block.\1."),
    (r"((?:bn|blocks|lateral_projections|scalers)\.\d+|decoder_norm\.|attn_mask_probs$)", r"\1"),
)
_DINOV3_NAMES = (
    (r"(?:patch_embed|embeddings)\.(cls_token|register_tokens|mask_token|patch_embeddings)", r"embeddings.\1"),
    (r"(?:blocks|(?:model\.)?layer)\.", "model.layer."),  # files may hold both spellings: one is an alias
    (r"norm\.", "norm."),
)


class TueMpsWeights(NamedTuple):
    """The parts of a file."""

    vit: dict[str, Tensor]  # in Meta's layout, without what `Backbone.completed` adds
    head: dict[str, Tensor]
    is_delta: bool


def is_tue_mps(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of tue-mps' code."""
    return any(key.startswith(NETWORK) for key in state)


def split_tue_mps(state: Mapping[str, Tensor], path: Path) -> TueMpsWeights:
    """Split a file by its keys. Raises ConfigError for a key that has no place here, and when the file does not prove
    whether it holds differences."""
    vit: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    pixels: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        name = key.replace("_orig_mod.", "").removeprefix(NETWORK)  # the former is of torch.compile
        if name.startswith(_ENCODER):
            _put(vit, name.removeprefix(_ENCODER), tensor, path)
        elif name.startswith(_PIXELS):
            _put(pixels, name.removeprefix(_PIXELS), tensor, path)
        elif (ours := _renamed(name.removeprefix(_DECODER), _HEAD_NAMES)) is not None:
            _put(head, f"segmentation_model.1.{ours}", tensor, path)
        elif not name.startswith(("criterion.", "decoder.pe.")):
            unknown.append(key)
    if unknown or not head:
        problem = f"unexpected keys: {listed(unknown)}" if unknown else "there is no head in it"
        raise ConfigError(f"{path} is not an EoMT or PMT of tue-mps; {problem}")
    is_delta = bool(vit or pixels) and _holds_differences(pixels, path)
    if is_delta and not vit:
        raise ConfigError(f"{path} holds differences, as its pixel_mean is zero, but no ViT; use the file as published")
    if is_delta and (probs := head.get("segmentation_model.1.attn_mask_probs")) is not None:
        head["segmentation_model.1.attn_mask_probs"] = probs + 1  # a buffer, which is built as ones
    check_shares(head, path)
    try:
        return TueMpsWeights(_dinov2(vit) if "pos_embed" in vit else _dinov3(vit), head, is_delta)
    except MALFORMED as error:
        raise ConfigError(f"{path} is not a ViT of tue-mps; unexpected, missing or malformed key: {error}") from error


def _put(target: dict[str, Tensor], name: str, tensor: Tensor, path: Path) -> None:
    if name in target and not torch.equal(target[name], tensor):
        raise ConfigError(f"{path} has two different tensors for {name}")
    target[name] = tensor


def _holds_differences(pixels: Mapping[str, Tensor], path: Path) -> bool:
    """Whether the ViT in the file is given as differences. Raises ConfigError when the file does not prove it."""
    key = f"{NETWORK}{_PIXELS}mean"
    mean, std = pixels.get("mean"), pixels.get("std")
    if mean is None or std is None or mean.numel() != 3 or std.numel() != 3:
        raise ConfigError(f"{path} does not say whether it holds weights or differences to a pretrained ViT: {key} "
                          "and pixel_std, three numbers each, would tell, but one is missing; use the published file")
    if not bool(mean.count_nonzero()) and not bool(std.count_nonzero()):
        return True
    expected = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])
    if torch.allclose(torch.stack([mean.flatten(), std.flatten()]).float(), expected, atol=1e-3):
        return False
    raise ConfigError(f"{path}: {key} is {mean.flatten().tolist()} and pixel_std {std.flatten().tolist()}, legal: "
                      f"{list(IMAGENET_MEAN)} and {list(IMAGENET_STD)} (the file holds weights), or zeros (it holds "
                      "differences to a pretrained ViT)")


def _dinov3(vit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not vit:
        return {}
    renamed: dict[str, Tensor] = {}
    for key, tensor in vit.items():
        if (name := _renamed(key, _DINOV3_NAMES)) is None:
            raise KeyError(key)
        if name in renamed and not torch.equal(renamed[name], tensor):
            raise KeyError(f"{key}, which differs from its alias")
        renamed[name] = tensor
    converted = transformers_vit_to_meta(renamed, num_heads=1)  # which decides only about the periods
    return {key: tensor for key, tensor in converted.items() if key != PERIODS and not key.endswith("bias_mask")}


def _dinov2(vit: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From timm's names and layout. Positions may be those of the patches only, with the class token's in the token."""
    converted = {"register_tokens" if key == "reg_token" else key: tensor for key, tensor in vit.items()}
    count = converted["pos_embed"].shape[1]
    if math.isqrt(count) ** 2 == count:
        converted["pos_embed"] = with_class_position(converted["pos_embed"])
    if converted["blocks.0.mlp.fc1.weight"].shape[0] == 2 * converted["blocks.0.mlp.fc2.weight"].shape[1]:  # SwiGLU
        converted = {key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): tensor
                     for key, tensor in converted.items()}
    return converted


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str | None:
    """The name with its start replaced by the first pattern that matches; None if none does."""
    for pattern, replacement in names:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return None
