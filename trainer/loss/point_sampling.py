"""Point sampling: choose the points on which losses are computed, and read maps there.

Proposed in PointRend (arXiv:1912.08193, sec. 3.1); Mask2Former (arXiv:2112.01527, sec. 3.3) uses it in the matcher and
in the mask losses. Points are (x, y) in [0, 1], relative to the map, so they do not depend on its resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loss import cpu_kernels

Draw = Callable[[tuple[int, ...]], Tensor]
"""The only source of randomness here: shape -> float32 tensor of that shape, uniform in [0, 1)."""


def uniform_draw(device: torch.device, generator: torch.Generator | None) -> Draw:
    """Draw with torch.rand on `device`; `generator` (None: torch's global one) must be on the same device."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    return draw


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values float32 [N, C, P] of maps [N, C, H, W] (any dtype) at points float32 [N, P, 2].

    Pixel centres are at (i + 0.5) / size (align_corners False); outside its border the map is zero.
    """
    grid = sampling_grid(points)
    return F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def sampling_grid(points: Tensor) -> Tensor:
    """Points [N, P, 2] in [0, 1] as a grid [N, P, 1, 2] in [-1, 1] for grid_sample, in one operation."""
    return torch.add(points.new_full((), -1.0), points[:, :, None], alpha=2)


@torch.no_grad()
def sample_uncertain_points(mask_logits: Tensor, num_points: int, oversample_ratio: float,
                            importance_sample_ratio: float, draw: Draw) -> tuple[Tensor, Tensor]:
    """Points float32 [N, num_points, 2], most of them where masks [N, H, W] are closest to probability 0.5, and the
    masks' logits float32 [N, num_points] there.

    `importance_sample_ratio` of the points are the least certain of `oversample_ratio` * num_points uniform candidates;
    the rest are uniform (PointRend sec. 3.1, "training"). Points are in no particular order.
    Draws [N, candidates, 2], then [N, rest, 2] unless there is no rest.
    """
    count, maps = len(mask_logits), mask_logits[:, None]
    candidates = draw((count, int(num_points * oversample_ratio), 2))  # [N, S, 2]
    logits = point_sample(maps, candidates)[:, 0]  # [N, S]
    num_uncertain = int(importance_sample_ratio * num_points)
    uncertain = smallest(logits.abs(), num_uncertain)  # [N, K]
    points = torch.view_as_real(torch.view_as_complex(candidates).gather(1, uncertain))  # [N, K, 2], pairs as a unit
    logits = logits.gather(1, uncertain)
    if num_uncertain < num_points:
        rest = draw((count, num_points - num_uncertain, 2))
        points = torch.cat([points, rest], dim=1)  # [N, P, 2]
        logits = torch.cat([logits, point_sample(maps, rest)[:, 0]], dim=1)
    return points, logits


def smallest(values: Tensor, count: int) -> Tensor:
    """Indices int64 [N, count] of each row's `count` smallest values [N, S], in any order; ties broken arbitrarily."""
    if cpu_kernels.serve(values) and 0 < count < values.shape[1]:
        return cpu_kernels.smallest(values, count)
    return values.topk(count, dim=1, largest=False, sorted=False).indices
