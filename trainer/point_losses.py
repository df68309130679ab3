"""Mask and dice loss on sampled points, and their gradients in closed form.

For logits x, truth y in 0..1, probabilities s = sigmoid(x), and v = 1 where a point counts (else 0), V = sum v:

    mask   sum v (softplus(x) - x y) / V                        d/dx  v (s - y) / V
    dice   1 - (2 A + 1) / D,  A = sum v s y,                   d/dx  v s (1 - s) ((2 A + 1) / D - 2 y) / D
           D = sum v s + sum v y + 1   (V-Net, arXiv:1606.04797, smoothed by one)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SampledPoints(NamedTuple):
    """M masks at P points of their own."""

    points: Tensor  # [M, P, 2], (x, y) in 0..1
    logits: Tensor  # [M, P]
    truth: Tensor  # [M, P], 0..1
    counted: Tensor | None  # [M, P]: 1 for points that count, 0 for others; None: all count


def point_losses(sampled: SampledPoints) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy [M] and dice loss [M], differentiable in the logits."""
    _, logits, truth, counted = sampled
    mask = F.softplus(logits) - logits * truth
    both, area = _overlap(logits.sigmoid(), truth, counted)
    dice = 1.0 - (2.0 * both + 1.0) / (area + 1.0)
    return (mask.mean(1) if counted is None else (mask * counted).sum(1) / _number(counted)), dice


def point_gradients(sampled: SampledPoints, mask_coefficient: float, dice_coefficient: float) -> Tensor:
    """Gradient [M, P] of mask_coefficient * mask loss + dice_coefficient * dice loss in each mask's logits."""
    _, logits, truth, counted = sampled
    probabilities = logits.sigmoid()
    both, area = _overlap(probabilities, truth, counted)
    size, ratio = (area + 1.0)[:, None], ((2.0 * both + 1.0) / (area + 1.0))[:, None]  # [M, 1]
    number = logits.shape[1] if counted is None else _number(counted)[:, None]
    dice = probabilities * (1.0 - probabilities) * (ratio - 2.0 * truth) * (dice_coefficient / size)
    gradient = (probabilities - truth) * (mask_coefficient / number) + dice
    return gradient if counted is None else gradient * counted


def spread_to_pixels(at_points: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """What gradients [M, P] at points [M, P, 2] mean for maps of `size` (h, w) that were read there: [M, h, w].

    The transpose of `trainer.point_sampling.point_sample`.
    """
    maps = at_points.new_empty(()).expand(len(points), 1, *size)  # only its shape is read
    grid = 2.0 * points[:, :, None] - 1.0
    gradient, _ = torch.ops.aten.grid_sampler_2d_backward(
        at_points[:, None, :, None], maps, grid, 0, 0, False, [True, False])  # bilinear, zeros, not aligned
    return gradient[:, 0]


def _overlap(probabilities: Tensor, truth: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums [M] over the points that count: of the products, and of both."""
    if counted is not None:
        probabilities, truth = probabilities * counted, truth * counted
    return (probabilities * truth).sum(1), probabilities.sum(1) + truth.sum(1)


def _number(counted: Tensor) -> Tensor:
    return counted.sum(1).clamp(min=1.0)
