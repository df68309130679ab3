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

from trainer.loss.point_sampling import sampling_grid


class SampledPoints(NamedTuple):
    """M masks, each sampled at its own P points."""

    points: Tensor  # [M, P, 2], (x, y) in 0..1
    logits: Tensor  # [M, P]
    truth: Tensor  # [M, P], 0..1
    counted: Tensor | None  # [M, P]: 1 for points that count, 0 for others; None: all count


class _Sums(NamedTuple):
    """Terms shared by the losses and their gradients."""

    probabilities: Tensor  # [M, P]
    intersection: Tensor  # [M], A above
    denominator: Tensor  # [M], D above
    number: Tensor | float  # [M] or the same for all, V above


def point_losses(sampled: SampledPoints) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy [M] and dice loss [M], differentiable in the logits."""
    return _losses(sampled, _sums(sampled))


def losses_and_gradients(
    sampled: SampledPoints, mask_coefficient: float, dice_coefficient: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """`point_losses`, and the gradient [M, P] of their weighted sum with respect to each mask's logits."""
    _, _, truth, counted = sampled
    sums = _sums(sampled)
    probabilities, denominator = sums.probabilities, sums.denominator[:, None]
    number = sums.number[:, None] if isinstance(sums.number, Tensor) else sums.number
    ratio = (2.0 * sums.intersection + 1.0)[:, None] / denominator
    gradient = probabilities * (1.0 - probabilities) * (ratio - 2.0 * truth) * (dice_coefficient / denominator)
    gradient = gradient + (probabilities - truth) * (mask_coefficient / number)
    return _losses(sampled, sums), gradient if counted is None else gradient * counted


def _sums(sampled: SampledPoints) -> _Sums:
    _, logits, truth, counted = sampled
    probabilities = logits.sigmoid()
    predicted, actual = (probabilities, truth) if counted is None else (probabilities * counted, truth * counted)
    number = float(logits.shape[1]) if counted is None else counted.sum(1).clamp(min=1.0)
    return _Sums(probabilities, (predicted * actual).sum(1), predicted.sum(1) + actual.sum(1) + 1.0, number)


def _losses(sampled: SampledPoints, sums: _Sums) -> tuple[Tensor, Tensor]:
    _, logits, truth, counted = sampled
    mask = F.softplus(logits) - logits * truth
    summed = mask.sum(1) if counted is None else (mask * counted).sum(1)
    return summed / sums.number, 1.0 - (2.0 * sums.intersection + 1.0) / sums.denominator


def spread_to_pixels(at_points: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """Gradients [M, h, w] of maps of `size` (h, w), from gradients [M, P] of their values at points [M, P, 2].

    The transpose of `trainer.loss.point_sampling.point_sample`.
    """
    if torch.are_deterministic_algorithms_enabled():
        return _spread_in_order(at_points, points, size)
    maps = at_points.new_empty(()).expand(len(points), 1, *size)  # only its shape is read
    gradient, _ = torch.ops.aten.grid_sampler_2d_backward(  # 0, 0, False: bilinear, zeros outside, not aligned
        at_points[:, None, :, None], maps, sampling_grid(points), 0, 0, False, [True, False])
    return gradient[:, 0]


def _spread_in_order(at_points: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """`spread_to_pixels` by `index_add_`, which on CUDA can add in a fixed order; grid_sample's backward cannot."""
    height, width = size
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5  # [M, P], relative to the first pixel's centre
    left, top = x.floor(), y.floor()
    maps = at_points.new_zeros(len(points) * height * width)
    first = torch.arange(len(points), device=points.device)[:, None] * (height * width)
    for row in (top, top + 1):
        for column in (left, left + 1):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            share = (1 - (y - row).abs()) * (1 - (x - column).abs())
            index = first + row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            maps.index_add_(0, index.flatten(), (at_points * share * inside).flatten())
    return maps.view(-1, height, width)
