"""Bilinear resizing of a map's rows, as if the whole map had been resized; so that scores can be computed in bands."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""

Rows = tuple[int, int]
"""The first row, and the row after the last."""


def source_rows(height: int, resized_height: int, rows: Rows) -> Rows:
    """The rows of a map of `height` from which `rows` of the map resized to `resized_height` are interpolated."""
    if height == resized_height:
        return rows
    if _factor(height, resized_height) is not None:
        factor = resized_height // height
        return max(rows[0] // factor - 1, 0), min(math.ceil(rows[1] / factor) + 1, height)
    first, last = (_position(row, height, resized_height) for row in (rows[0], rows[1] - 1))
    return int(first), min(int(last) + 2, height)


def resize_rows(maps: Tensor, first: int, height: int, size: Size, rows: Rows) -> Tensor:
    """Rows [B, C, rows, W] of a map [B, C, height, w] resized bilinearly to `size`, given only its rows from `first`
    on, at least those of `source_rows`.

    Equal to the rows of `F.interpolate(..., align_corners=False)` to the last bit if the height grows by a power of two
    or stays, and up to rounding otherwise.
    """
    below, above = source_rows(height, size[0], rows)
    maps = maps[:, :, below - first : above - first]
    count, width = maps.shape[2:]
    factor = _factor(height, size[0])
    if factor is not None:
        if factor == 1 and width == size[1]:
            return maps
        # The rows next to a cut come out wrong, as their neighbours are missing; `source_rows` has added one for them.
        grown = F.interpolate(maps, (count * factor, size[1]), mode="bilinear", align_corners=False)
        return grown[:, :, rows[0] - below * factor : rows[1] - below * factor]
    wide = F.interpolate(maps, (count, size[1]), mode="bilinear", align_corners=False)
    positions = [_position(row, height, size[0]) for row in range(*rows)]
    upper = torch.tensor([int(position) - below for position in positions], device=maps.device)
    share = torch.tensor([position % 1 for position in positions], dtype=maps.dtype, device=maps.device)
    lower = (upper + 1).clamp_(max=count - 1)
    return torch.lerp(wide.index_select(2, upper), wide.index_select(2, lower), share[:, None])


def resize(maps: Tensor, size: Size, rows: Rows | None = None) -> Tensor:
    """Maps [B, C, h, w] of any float dtype -> float32, resized bilinearly to `size`: all rows [B, C, *size], or some of
    them [B, C, rows, W]."""
    if rows is None:
        return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
    below, above = source_rows(maps.shape[2], size[0], rows)
    return resize_rows(maps[:, :, below:above].float(), below, maps.shape[2], size, rows)


def _factor(height: int, resized_height: int) -> int | None:
    return resized_height // height if resized_height % height == 0 else None


def _position(row: int, height: int, resized_height: int) -> float:
    """Where in the map (0: the middle of its first row) a row of the resized map lies."""
    return min(max((row + 0.5) * height / resized_height - 0.5, 0.0), height - 1.0)
