"""Resize a box of an image on the training device as Pillow does on the CPU: bilinear with antialiasing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.crops.drawing import Crop
from shards.crops.resampling import source_box

_WEIGHT_BITS, _HALF_BITS = 22, 11


class Resize(NamedTuple):
    """What becomes of a region, the part of an image from (first_row, first_column) on: a box of the image, in pixels
    and their fractions, is resized to height x width."""

    left: float
    top: float
    right: float
    bottom: float
    first_row: int
    first_column: int
    height: int
    width: int


def region_of(pixels: npt.NDArray[np.uint8], crop: Crop) -> tuple[npt.NDArray[np.uint8], Resize]:
    """The part of an image [H, W, 3] that a crop is computed from, and how."""
    height, width = pixels.shape[:2]
    # Pillow's boxes are of single precision, so that a coordinate may move by some thousandths of a pixel.
    left, top, right, bottom = (float(np.float32(edge)) for edge in source_box((width, height), crop))
    first_column, last_column = _reach(left, right, crop.width, width)
    first_row, last_row = _reach(top, bottom, crop.height, height)
    resize = Resize(left, top, right, bottom, first_row, first_column, crop.height, crop.width)
    return pixels[first_row:last_row, first_column:last_column], resize


def resample(region: Tensor, resize: Resize) -> Tensor:
    """uint8 [height, width, 3] of a region uint8 [H, W, 3]: the levels of Pillow's `Image.resize(size, BILINEAR, box)`.

    Like Pillow, columns first, then rows, each rounded to whole levels, with weights of 22 bits. Each product is split
    into two of 11-bit weights, which float32 sums exactly (TF32 too; up to 32 weights for a pixel).
    """
    width, height = (resize.left, resize.right, resize.width), (resize.top, resize.bottom, resize.height)
    columns = _weights(*width, resize.first_column, region.shape[1], region.device)  # 2 of [width, W]
    rows = _weights(*height, resize.first_row, region.shape[0], region.device)  # 2 of [height, H]
    planes = region.permute(2, 0, 1).float()  # [3, H, W]
    across = _to_levels(*(planes @ part.t() for part in columns))
    return _to_levels(*(part @ across for part in rows)).to(torch.uint8).permute(1, 2, 0)


def _reach(first: float, last: float, size: int, limit: int) -> tuple[int, int]:
    """The pixels, below `limit`, that an axis of `size` pixels resized from [first, last) is computed from."""
    support = max((last - first) / size, 1.0)
    return max(int(first - support), 0), min(int(last + support) + 2, limit)


def _weights(first: float, last: float, size: int, start: int, source: int, device: torch.device
             ) -> tuple[Tensor, Tensor]:
    """Weights of `source` pixels, from pixel `start` on, in `size` pixels resized from [first, last).

    A triangle of half-width max(scale, 1) around each target pixel's centre, cut at the edges and normalised, in
    units of 2^-22: float32 [size, source] of the upper 11 bits and of the lower. Built on the device, without waiting.
    """
    scale = float(np.float32(last - first)) / size
    width = max(scale, 1.0)
    centre = torch.arange(size, dtype=torch.float64, device=device).add_(0.5).mul_(scale).add_(first)
    pixel = torch.arange(source, dtype=torch.float64, device=device).add_(start + 0.5)
    triangle = (1.0 - (pixel[None] - centre[:, None]).abs_().div_(width)).clamp_(min=0.0)
    fixed = triangle.div_(triangle.sum(1, keepdim=True)).mul_(1 << _WEIGHT_BITS).add_(0.5).int()
    return (fixed >> _HALF_BITS).float(), (fixed & ((1 << _HALF_BITS) - 1)).float()


def _to_levels(upper: Tensor, lower: Tensor) -> Tensor:
    """float32 of whole levels, 0 to 255, from the two halves of the sums."""
    sums = (upper.int() << _HALF_BITS) + lower.int() + (1 << (_WEIGHT_BITS - 1))
    return (sums >> _WEIGHT_BITS).clamp_(0, 255).float()
