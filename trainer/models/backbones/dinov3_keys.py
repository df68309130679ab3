"""The DINOv3 ViT in its two published layouts: Meta's state dict and transformers' `DINOv3ViTModel`.

    Meta                                    transformers
    cls_token, storage_tokens, mask_token   embeddings.{cls_token,register_tokens,mask_token}
    patch_embed.proj.*                      embeddings.patch_embeddings.*
    blocks.N.attn.qkv.{weight,bias}         model.layer.N.attention.{q,k,v}_proj.{weight,bias}   (no k_proj.bias)
    blocks.N.attn.qkv.bias_mask             -        (multiplies the bias; zero in its key third)
    blocks.N.mlp.{fc1,fc2} | {w1,w2,w3}     model.layer.N.mlp.{up,down}_proj | {gate,up,down}_proj
    blocks.N.ls{1,2}.gamma                  model.layer.N.layer_scale{1,2}.lambda1
    rope_embed.periods                      -        (Meta stores a buffer, transformers uses a formula)
    local_cls_norm.*                        -        (7B and SAT-493M only; used in pretraining, never in inference)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from shards.errors import ConfigError
from trainer.model_config import TOKEN_STRIDE
from trainer.models.backbones.key_tables import check_vit_sizes, inverse, renamed
from trainer.models.declared import MALFORMED
from trainer.models.fitting import check_fit

ROPE_BASE = 100.0
LAYER_NORM_EPS = 1e-5  # of Meta's ViTs
PERIODS = "rope_embed.periods"
LOCAL_CLS_NORM = ("local_cls_norm.weight", "local_cls_norm.bias")
META_ONLY = (PERIODS, *LOCAL_CLS_NORM)  # keys without a counterpart in transformers; DINOv3Backbone keeps them

_TOP_LEVEL = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_PLAIN_MLP = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
_GATED_MLP = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}


@dataclass(frozen=True)
class VitArchitecture:
    """The sizes that distinguish DINOv3 ViTs (arXiv:2508.10104, table 2)."""

    dim: int
    blocks: int
    heads: int
    ffn: int  # hidden width of the block MLP
    gated: bool = False  # SwiGLU instead of GELU
    qkv_bias: bool = True
    registers: int = 4

    def check(self) -> None:
        """Raise ConfigError for sizes beyond those of any ViT, before memory is allocated for them."""
        check_vit_sizes(self.dim, self.blocks, self.heads, self.ffn, self.registers, gated=self.gated)

    def declared(self) -> dict[str, Any]:
        """The same in the fields of config.json, with those that are fixed in DINOv3."""
        return {"hidden_size": self.dim, "num_hidden_layers": self.blocks, "num_attention_heads": self.heads,
                "intermediate_size": self.ffn, "num_register_tokens": self.registers, "use_gated_mlp": self.gated,
                "hidden_act": "silu" if self.gated else "gelu", "patch_size": TOKEN_STRIDE,
                "query_bias": self.qkv_bias, "key_bias": False, "value_bias": self.qkv_bias, "proj_bias": True,
                "mlp_bias": True}

    def config(self, layer_norm_eps: float = LAYER_NORM_EPS) -> DINOv3ViTConfig:
        """The configuration of transformers' model. Raises ConfigError like `check`."""
        self.check()
        return DINOv3ViTConfig(
            hidden_size=self.dim,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            intermediate_size=self.ffn,
            num_register_tokens=self.registers,
            use_gated_mlp=self.gated,
            hidden_act="silu" if self.gated else "gelu",
            query_bias=self.qkv_bias,
            key_bias=False,
            value_bias=self.qkv_bias,
            patch_size=TOKEN_STRIDE,
            layer_norm_eps=layer_norm_eps,
            rope_theta=ROPE_BASE,
            layerscale_value=1.0,  # with DINOv3's initial 1e-5 the blocks of an untrained ViT would have no effect
        )


RELEASED_VITS = {
    "vits16": VitArchitecture(384, 12, 6, 1536),
    "vits16plus": VitArchitecture(384, 12, 6, 1536, gated=True),
    "vitb16": VitArchitecture(768, 12, 12, 3072),
    "vitl16": VitArchitecture(1024, 24, 16, 4096),
    "vith16plus": VitArchitecture(1280, 32, 20, 5120, gated=True),
    "vit7b16": VitArchitecture(4096, 40, 32, 8192, gated=True, qkv_bias=False),
}


def architecture_of(state: Mapping[str, Tensor], what: str) -> VitArchitecture:
    """The sizes of a ViT, from its state dict in Meta's layout. Raises ConfigError naming a missing key.

    They follow from shapes; the number of heads, from that of the rotary periods, which is head_dim / 4.
    """
    gated = "blocks.0.mlp.w1.weight" in state
    try:
        dim = state["cls_token"].shape[-1]
        return VitArchitecture(
            dim=dim,
            blocks=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
            heads=dim // (4 * state[PERIODS].numel()),
            ffn=state[f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"].shape[0],
            gated=gated,
            qkv_bias="blocks.0.attn.qkv.bias" in state,
            registers=state["storage_tokens"].shape[1],
        )
    except MALFORMED as error:
        raise ConfigError(f"{what} are not a DINOv3 ViT in Meta's layout; missing or wrong shape: {error}") from error


def kind_of(architecture: VitArchitecture) -> str:
    """The published name of an architecture, such as vitl16, or its sizes if it has none."""
    return next((name for name, released in RELEASED_VITS.items() if released == architecture), str(architecture))


def rope_periods(head_dim: int) -> Tensor:
    """float32 [head_dim / 4]: periods of the rotary position embedding, 100^(4k / head_dim)."""
    count = head_dim // 4
    return ROPE_BASE ** (torch.arange(count, dtype=torch.float32, device="cpu") / count)


def meta_vit_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ViT's state dict from Meta's keys to those of transformers' `DINOv3ViTModel`, for a strict load.

    Weights are views of the given tensors, so memory is not used twice. The bias is stored as Meta applies it, bias *
    bias_mask; ConfigError when its key third is not zero, as transformers has no key bias, or when it is not finite.
    Keys in META_ONLY are dropped. Raises KeyError for a key that is not part of a DINOv3 ViT.
    """
    in_block = _IN_BLOCK | _PLAIN_MLP | _GATED_MLP
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in META_ONLY or key.endswith(".attn.qkv.bias_mask"):
            continue
        if not key.startswith("blocks."):
            converted[renamed(key, _TOP_LEVEL)] = tensor.unsqueeze(1) if key == "mask_token" else tensor
            continue
        _, number, name = key.split(".", 2)
        attention = f"model.layer.{number}.attention."
        if name == "attn.qkv.weight":
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{attention}{part}_proj.weight"] = weight
        elif name == "attn.qkv.bias":
            converted[f"{attention}q_proj.bias"], converted[f"{attention}v_proj.bias"] = _applied_bias(
                key, tensor, state[f"{key}_mask"])
        else:
            converted[f"model.layer.{number}.{renamed(name, in_block)}"] = tensor
    return converted


def dinov3_directory_to_meta(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """A ViT as Hugging Face directories hold it, with layers named `layer.N` or `model.layer.N`, in Meta's layout.

    A missing mask token is zero: nothing uses it. Raises KeyError as `transformers_vit_to_meta`.
    """
    renamed = {f"model.{key}" if key.startswith("layer.") else key: tensor for key, tensor in state.items()}
    if len(renamed) < len(state):
        raise KeyError("layer.* beside model.layer.*")
    renamed.setdefault("embeddings.mask_token", torch.zeros_like(renamed["embeddings.cls_token"]))
    if "embeddings.register_tokens" not in renamed:
        renamed["embeddings.register_tokens"] = renamed["embeddings.cls_token"][:, :0]
    return transformers_vit_to_meta(renamed, num_heads)


def transformers_vit_to_meta(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Inverse of `meta_vit_to_transformers`, with the periods of `rope_periods` and without local_cls_norm.

    The key third is zero in the qkv bias and in bias_mask, whose other values are one. Raises KeyError for a key
    without a counterpart in Meta's layout.
    """
    gated = any(".mlp.gate_proj." in key for key in state)
    in_block = inverse(_IN_BLOCK | (_GATED_MLP if gated else _PLAIN_MLP))
    top_level = inverse(_TOP_LEVEL)
    cls_token = state["embeddings.cls_token"]
    converted = {PERIODS: rope_periods(cls_token.shape[-1] // num_heads).to(cls_token.device)}
    for key, tensor in state.items():
        if not key.startswith("model.layer."):
            name = renamed(key, top_level)
            converted[name] = tensor.squeeze(1) if name == "mask_token" else tensor
            continue
        number, name = key.removeprefix("model.layer.").split(".", 1)
        stem = key.rpartition("q_proj.")[0]
        qkv = f"blocks.{number}.attn.qkv."
        if name == "attention.q_proj.weight":
            converted[f"{qkv}weight"] = torch.cat([state[f"{stem}{part}_proj.weight"] for part in "qkv"])
        elif name == "attention.q_proj.bias":
            zeros, ones = torch.zeros_like(tensor), torch.ones_like(tensor)
            converted[f"{qkv}bias"] = torch.cat([tensor, zeros, state[f"{stem}v_proj.bias"]])
            converted[f"{qkv}bias_mask"] = torch.cat([ones, zeros, ones])
        elif name not in ("attention.k_proj.weight", "attention.v_proj.weight", "attention.v_proj.bias"):
            converted[f"blocks.{number}.{renamed(name, in_block)}"] = tensor
    return converted


def check_meta_vit(vit: DINOv3ViTModel, state: Mapping[str, Tensor], what: str) -> None:
    """Raise ConfigError unless the state dict (Meta's layout) has this ViT's keys and shapes and DINOv3's periods."""
    on_meta = {key: tensor.to("meta") for key, tensor in vit.state_dict().items()}
    layout = transformers_vit_to_meta(on_meta, vit.config.num_attention_heads)
    if any(key in state for key in LOCAL_CLS_NORM):
        layout |= {key: torch.empty(vit.config.hidden_size, device="meta") for key in LOCAL_CLS_NORM}
    check_fit(layout, state, what=what, advice="The file is incomplete, or is not the configured ViT")
    periods = state[PERIODS]
    expected = rope_periods(4 * periods.numel())
    if not periods.is_meta and not torch.allclose(periods.float().cpu(), expected, rtol=2**-8, atol=0):
        raise ConfigError(f"{what} have the rotary periods {periods.tolist()}, legal: {expected.tolist()}, up to "
                          "bfloat16 rounding")


def used_periods(state: Mapping[str, Tensor], head_dim: int) -> Tensor:
    """The rotary periods of a state dict, on the CPU; exactly the formula's where they are equal up to rounding."""
    formula = rope_periods(head_dim)
    periods = state.get(PERIODS, formula).float().cpu()
    return formula if torch.allclose(periods, formula, rtol=1e-6, atol=0) else periods


def _applied_bias(key: str, bias: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Query and value bias as Meta's forward pass applies them."""
    applied = bias.float() * mask.float()
    q, k, v = applied.chunk(3)
    if not applied.is_meta and (bool(k.count_nonzero()) or not bool(applied.isfinite().all())):
        raise ConfigError(f"{key} times its bias_mask is not finite, or not zero for the keys; DINOv3 has no key bias")
    return q, v
