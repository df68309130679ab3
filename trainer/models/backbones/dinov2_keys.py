"""The DINOv2 ViT in its two published layouts: Meta's state dict and transformers' `Dinov2Model` (5.18).

    Meta                                    transformers
    cls_token, register_tokens, mask_token  embeddings.{cls_token,register_tokens,mask_token}
    pos_embed                               embeddings.position_embeddings    (class token first, then the patches)
    patch_embed.proj.*                      embeddings.patch_embeddings.projection.*
    blocks.N.attn.qkv.{weight,bias}         encoder.layer.N.attention.{q,k,v}_proj.{weight,bias}
    blocks.N.attn.proj                      encoder.layer.N.attention.o_proj
    blocks.N.mlp.{fc1,fc2} | {w12,w3}       encoder.layer.N.mlp.{fc1,fc2} | {gate_proj and up_proj, down_proj}
    blocks.N.ls{1,2}.gamma                  encoder.layer.N.layer_scale{1,2}.lambda1
    norm                                    layernorm
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from shards.errors import ConfigError
from trainer.models.backbones.key_tables import check_vit_sizes, inverse, renamed
from trainer.models.declared import MALFORMED
from trainer.models.fitting import check_fit

LAYER_NORM_EPS = 1e-6  # of Meta's ViTs
HEAD_DIM = 64  # of all published DINOv2 ViTs; Meta's files do not contain it
MASK_TOKEN = "mask_token"
Dinov2 = Dinov2Model | Dinov2WithRegistersModel

_TOP_LEVEL = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    MASK_TOKEN: "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w3": "mlp.down_proj",
}
_OLD_NAMES = {".attention.attention.query.": ".attention.q_proj.", ".attention.attention.key.": ".attention.k_proj.",
              ".attention.attention.value.": ".attention.v_proj.", ".attention.output.dense.": ".attention.o_proj.",
              ".mlp.weights_out.": ".mlp.down_proj."}
_FUSED = {"attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
          "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}  # stacked in Meta's layout


@dataclass(frozen=True)
class Dinov2Architecture:
    """The sizes that distinguish DINOv2 ViTs (arXiv:2304.07193, table 17)."""

    dim: int
    blocks: int
    heads: int
    ffn: int  # hidden width of the block MLP
    positions: int = 37  # rows, and columns, of the learned positions
    patch_size: int = 14
    gated: bool = False  # SwiGLU instead of GELU
    registers: int = 0

    def declared(self, mlp_ratio: Any) -> dict[str, Any]:
        """The same in the fields of config.json; of the MLP's width it declares only `mlp_ratio`, which may be a
        fraction."""
        is_number = type(mlp_ratio) in (int, float) and 0 < mlp_ratio <= 64
        ffn = int(self.dim * mlp_ratio) if is_number else 0
        ffn = (int(ffn * 2 / 3) + 7) // 8 * 8 if self.gated else ffn
        sizes = {"hidden_size": self.dim, "num_hidden_layers": self.blocks, "num_attention_heads": self.heads,
                 "mlp_ratio": mlp_ratio if ffn == self.ffn else self.ffn / self.dim, "use_swiglu_ffn": self.gated,
                 "patch_size": self.patch_size, "image_size": self.positions * self.patch_size, "hidden_act": "gelu"}
        return sizes | ({"num_register_tokens": self.registers} if self.registers else {})

    def config(self, layer_norm_eps: float = LAYER_NORM_EPS) -> Dinov2Config | Dinov2WithRegistersConfig:
        """The configuration of transformers' model. Raises ConfigError for sizes beyond those of any ViT."""
        check_vit_sizes(self.dim, self.blocks, self.heads, self.ffn, self.registers, gated=self.gated)
        for name, value, most in (("heads", self.heads, self.dim), ("pixels a patch side", self.patch_size, 64),
                                  ("rows of positions", self.positions, 1024)):
            if not 1 <= value <= most:
                raise ConfigError(f"a DINOv2 has {value} {name}, legal: 1 to {most}")
        # transformers derives the width from a ratio; for SwiGLU it takes two thirds and rounds up to a multiple of 8.
        ratio = (3 * self.ffn / 2 if self.gated else self.ffn) / self.dim
        sizes: dict[str, Any] = {
            "hidden_size": self.dim, "num_hidden_layers": self.blocks, "num_attention_heads": self.heads,
            "mlp_ratio": round(ratio), "use_swiglu_ffn": self.gated, "layer_norm_eps": layer_norm_eps,
            "patch_size": self.patch_size, "image_size": self.positions * self.patch_size, "layerscale_value": 1.0,
        }
        if not self.registers:
            return Dinov2Config(**sizes)
        return Dinov2WithRegistersConfig(**sizes, num_register_tokens=self.registers)


RELEASED_DINOV2 = {
    f"vit{size}14{suffix}": Dinov2Architecture(*sizes, gated=size == "g", registers=registers)
    for size, sizes in {"s": (384, 12, 6, 1536), "b": (768, 12, 12, 3072), "l": (1024, 24, 16, 4096),
                        "g": (1536, 40, 24, 4096)}.items()
    for suffix, registers in (("", 0), ("_reg4", 4))
}


def is_dinov2(state: Mapping[str, Tensor]) -> bool:
    """Whether a ViT in Meta's layout is a DINOv2: it has learned positions."""
    return "pos_embed" in state


def dinov2_architecture_of(state: Mapping[str, Tensor], heads: int | None, what: str) -> Dinov2Architecture:
    """The sizes of a ViT, from its state dict in Meta's layout. Raises ConfigError naming a missing key.

    `heads`: the number of attention heads; None: as many as in the published ViTs of this width.
    """
    gated = "blocks.0.mlp.w12.weight" in state
    try:
        dim = state["cls_token"].shape[-1]
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        return Dinov2Architecture(
            dim=dim,
            blocks=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
            heads=heads or dim // HEAD_DIM,
            ffn=state["blocks.0.mlp.w3.weight"].shape[1] if gated else state["blocks.0.mlp.fc1.weight"].shape[0],
            positions=math.isqrt(state["pos_embed"].shape[1] - 1),
            patch_size=state["patch_embed.proj.weight"].shape[-1],
            gated=gated,
            registers=registers,
        )
    except MALFORMED as error:
        raise ConfigError(f"{what} are not a DINOv2 ViT in Meta's layout; missing or wrong shape: {error}") from error


def build_dinov2(config: Dinov2Config | Dinov2WithRegistersConfig) -> Dinov2:
    """transformers' model with random weights."""
    if isinstance(config, Dinov2WithRegistersConfig):
        return Dinov2WithRegistersModel(config)
    return Dinov2Model(config)


def dinov2_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ViT's state dict from Meta's keys to those of transformers' class. Weights are views of the given.

    Raises KeyError for a key that is not part of a DINOv2 ViT.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith("blocks."):
            converted[renamed(key, _TOP_LEVEL)] = tensor
            continue
        _, number, name = key.split(".", 2)
        stem, _, kind = name.rpartition(".")
        if stem in _FUSED:
            parts = _FUSED[stem]
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
                converted[f"encoder.layer.{number}.{part}.{kind}"] = piece
        else:
            converted[f"encoder.layer.{number}.{renamed(name, _IN_BLOCK)}"] = tensor
    return converted


def dinov2_directory_to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT as Hugging Face directories hold it, in Meta's layout; those written before transformers 5 have other
    names inside the blocks. Raises KeyError as `dinov2_to_meta`."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".")
        if stem.endswith("mlp.weights_in"):
            parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True))
        else:
            parts = {"": tensor}
        for part, piece in parts.items():
            name = f"{stem.removesuffix('weights_in')}{part}.{kind}" if part else key
            for old, new in _OLD_NAMES.items():
                name = name.replace(old, new)
            if name in renamed:
                raise KeyError(f"{key}, which is there under another name too")
            renamed[name] = piece
    return dinov2_to_meta(renamed)


def dinov2_to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `dinov2_to_transformers`. Raises KeyError for a key without a counterpart in Meta's layout."""
    in_block, top_level = inverse(_IN_BLOCK), inverse(_TOP_LEVEL)
    fused = {part: (stem, parts) for stem, parts in _FUSED.items() for part in parts}
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith("encoder.layer."):
            converted[renamed(key, top_level)] = tensor
            continue
        number, name = key.removeprefix("encoder.layer.").split(".", 1)
        part, _, kind = name.rpartition(".")
        if part not in fused:
            converted[f"blocks.{number}.{renamed(name, in_block)}"] = tensor
            continue
        stem, parts = fused[part]
        if part == parts[0]:
            converted[f"blocks.{number}.{stem}.{kind}"] = torch.cat(
                [state[f"encoder.layer.{number}.{other}.{kind}"] for other in parts])
    return converted


def check_dinov2(vit: Dinov2, state: Mapping[str, Tensor], what: str) -> None:
    """Raise ConfigError unless the state dict (Meta's layout) has this ViT's keys and shapes. The mask token, which
    nothing uses, may be missing."""
    on_meta = {key: tensor.to("meta") for key, tensor in vit.state_dict().items()}
    layout = dinov2_to_meta(on_meta)
    if MASK_TOKEN not in state:
        layout.pop(MASK_TOKEN, None)
    check_fit(layout, state, what=what, advice="The file is incomplete, or is not the configured ViT")
