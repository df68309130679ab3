"""The linear head's loss: per-pixel cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_cross_entropy(logits: Tensor, label_maps: Tensor, ignore_index: int = 255,
                        class_weights: Tensor | None = None) -> Tensor:
    """Scalar float32 loss of logits [B, C, h, w] (any float dtype), resized bilinearly to label_maps int64 [B, H, W].

    Ignored pixels have zero loss but count in the mean, as in DINOv3's linear training: a crop that is mostly ignored
    has little weight, and one that is entirely ignored gives 0 with zero gradients instead of NaN.

    `class_weights` float32 [C] multiply the losses of the pixels of each class; the divisor stays the number of pixels,
    as in mmsegmentation's cross-entropy. torch's mean divides by the sum of the weights instead: a micro-batch whose
    pixels are all of one class would have the same loss for any weight, and a step would depend on how its global batch
    is split.
    """
    with torch.autocast(logits.device.type, enabled=False):
        resized = F.interpolate(logits.float(), label_maps.shape[-2:], mode="bilinear", align_corners=False)
        losses = F.cross_entropy(resized, label_maps.long(), class_weights, ignore_index=ignore_index,
                                 reduction="none")  # [B, H, W]
        return losses.mean()
