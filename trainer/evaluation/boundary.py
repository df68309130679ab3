"""Boundary IoU: IoU of the pixels close to a contour (arXiv:2103.16562), which large regions do not dominate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHARE_OF_DIAGONAL = 0.02  # the paper's


def boundary_width(height: int, width: int) -> int:
    """How far from a contour pixels still count, for an image of this size: 2 % of its diagonal, at least 1 pixel."""
    return max(1, round(SHARE_OF_DIAGONAL * math.hypot(height, width)))


def boundary_pixels(ids: Tensor, distance: int) -> Tensor:
    """Class ids [H, W] -> bool [H, W]: whether the square of `distance` pixels on each side of a pixel contains another
    class, or reaches beyond the image.

    These are the pixels that `distance` erosions of their class by 3x3 pixels remove, for all classes at once: the
    square is uniform if no two neighbours in it differ, and those are counted with sums of all rectangles from the
    corner, so that the cost does not depend on the distance.
    """
    height, width = ids.shape
    near = torch.ones(height, width, dtype=torch.bool, device=ids.device)
    if min(height, width) <= 2 * distance:
        return near
    side = 2 * distance + 1
    across = _sums_of_boxes(ids[:, 1:] != ids[:, :-1], (side, side - 1))
    down = _sums_of_boxes(ids[1:] != ids[:-1], (side - 1, side))
    near[distance : height - distance, distance : width - distance] = (across + down) > 0
    return near


def _sums_of_boxes(flags: Tensor, size: tuple[int, int]) -> Tensor:
    """bool [H, W] -> int32 [H - h + 1, W - w + 1]: how many are set in each box of size (h, w)."""
    height, width = size
    sums = torch.zeros(flags.shape[0] + 1, flags.shape[1] + 1, dtype=torch.int32, device=flags.device)
    sums[1:, 1:] = flags.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    rows = sums[height:] - sums[:-height]
    return rows[:, width:] - rows[:, :-width]
