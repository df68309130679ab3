"""The linear head's loss: per-pixel cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_cross_entropy(logits: Tensor, label_maps: Tensor, ignore_index: int = 255) -> Tensor:
    """Scalar float32 loss of logits [B, C, h, w] (any float dtype), resized bilinearly to label_maps int64 [B, H, W].

    Ignored pixels have zero loss but count in the mean, as in DINOv3's linear training: a crop that is mostly ignored
    has little weight, and one that is entirely ignored gives 0 with zero gradients instead of NaN.
    """
    with torch.autocast(logits.device.type, enabled=False):
        resized = F.interpolate(logits.float(), label_maps.shape[-2:], mode="bilinear", align_corners=False)
        losses = F.cross_entropy(resized, label_maps.long(), ignore_index=ignore_index, reduction="none")  # [B, H, W]
        return losses.mean()
