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
        labels = label_maps.long()
        if torch.are_deterministic_algorithms_enabled():
            losses = _cross_entropy_in_order(resized, labels, ignore_index, class_weights)
        else:
            losses = F.cross_entropy(resized, labels, class_weights, ignore_index=ignore_index, reduction="none")
        return losses.mean()


def _cross_entropy_in_order(logits: Tensor, labels: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
    """Cross-entropy [B, H, W] of logits [B, C, H, W]. On CUDA torch's has no deterministic implementation for maps."""
    is_ignored = labels == ignore_index
    classes = labels.masked_fill(is_ignored, 0)
    losses = -logits.log_softmax(1).gather(1, classes[:, None])[:, 0]
    if weights is not None:
        losses = losses * weights[classes]
    return losses.masked_fill(is_ignored, 0.0)
