"""Reading weights that other programs wrote."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_DROPPED = ("attn.qkv.bias_mask", "rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias")
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
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.up_proj",
    "mlp.w3": "mlp.down_proj",
}


def meta_vit_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DINOv3 ViT's state dict with Meta's keys -> keys of transformers' `DINOv3ViTModel`, for a strict load.

    Fused qkv weights are cut into three; the key third of the bias is dropped, because Meta masks it to zero.
    Raises KeyError for a key that is no part of a DINOv3 ViT.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(_DROPPED):
            continue
        if key.startswith("blocks."):
            _, number, name = key.split(".", 2)
            converted |= _block_entry(f"model.layer.{number}.", name, tensor)
        else:
            converted[_renamed(key, _TOP_LEVEL)] = tensor.unsqueeze(1) if key == "mask_token" else tensor
    return converted


def _block_entry(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.startswith("attn.qkv."):
        return {prefix + _renamed(name, _IN_BLOCK): tensor}
    kind = name.rpartition(".")[2]
    parts = dict(zip("qkv", tensor.chunk(3), strict=True))
    if kind == "bias":
        del parts["k"]
    return {f"{prefix}attention.{part}_proj.{kind}": value for part, value in parts.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` by the table, which may name it whole or without its last part (.weight, .bias)."""
    if name in names:
        return names[name]
    stem, _, kind = name.rpartition(".")
    return f"{names[stem]}.{kind}"
