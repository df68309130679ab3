"""Mixed precision: autocast, and a frozen ViT's weights stored for it."""

from __future__ import annotations

import torch

from trainer.config import RunConfig
from trainer.models import Segmenter


def autocast_dtype(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """The dtype of `train.precision`, or None for float32. "auto" is bfloat16 on CUDA devices that have it; those that
    only emulate it are slower than in float32."""
    precision = config.train.precision
    if precision == "fp16":
        return torch.float16
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else None


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The context for forward passes. With train.fsdp casts of weights are not kept: they would be whole on every rank
    until the end of the forward pass."""
    dtype = autocast_dtype(config, device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None,
                          cache_enabled=not config.train.fsdp)


def store_for_autocast(model: Segmenter, config: RunConfig, device: torch.device) -> None:
    """Store a frozen ViT's matrices in autocast's dtype: half the memory, and the same outputs to the last bit.

    Autocast casts them anew in every forward pass, as it keeps the casts only of what requires a gradient. The exact
    weights are lost, so call this when the model is loaded, and not before an export. Does nothing for float32 or a
    ViT that is trained.
    """
    dtype = autocast_dtype(config, device)
    if dtype is not None and not model.backbone.trainable:
        model.backbone.store_in(dtype)
