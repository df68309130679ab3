"""Where sliding windows lie, and the sizes of the views that they slide over."""

from __future__ import annotations

import math
from itertools import pairwise

from trainer.models.resizing import Size

_VIEW_MULTIPLE = 32  # the reference rounds the short side of views below scale 1 up to a multiple, for any head


def window_grid(size: Size, crop: Size, stride: Size | None) -> list[tuple[int, int, int, int]]:
    """Windows (top, bottom, left, right) of size `crop` that cover `size`, row by row, `stride` apart.

    The last window along an axis is shifted back inside; an axis shorter than the crop gets one window of its length.
    With stride None the fewest windows that cover the axis are spread evenly, as in EoMT's evaluation.
    Raises ValueError when the stride leaves gaps between windows.
    """
    if stride is None:
        rows, columns = (_even_spans(*axis) for axis in zip(size, crop, strict=True))
    else:
        rows, columns = (_spans(*axis) for axis in zip(size, crop, stride, strict=True))
    return [(*row, *column) for row in rows for column in columns]


def _spans(length: int, crop: int, stride: int) -> list[Size]:
    count = math.ceil(max(length - crop, 0) / stride) + 1
    ends = [min(index * stride + crop, length) for index in range(count)]
    spans = [(max(end - crop, 0), end) for end in ends]
    if any(end < start for (_, end), (start, _) in pairwise(spans)):
        raise ValueError(f"stride {stride} leaves gaps between windows of {crop} pixels; legal: 1 to {crop}")
    return spans


def _even_spans(length: int, crop: int) -> list[Size]:
    crop = min(crop, length)
    count = math.ceil(length / crop)
    overlap = (count * crop - length) / max(1, count - 1)  # of neighbours
    starts = [*(int(index * (crop - overlap)) for index in range(count - 1)), length - crop]
    return [(start, start + crop) for start in starts]


def window_size(size: Size, crop: Size | None, size_divisor: int | None) -> Size:
    """Window size for an image of `size`, at most `crop` (None: the whole image).

    With a divisor both sides are multiples of it, so the window can be larger than a small image, which is then padded.
    Without one (the reference's rule; the adapter may reject such windows) windows lie inside the image, and are square
    when the image is smaller than the crop along both axes.
    Raises ValueError when the crop itself is not a multiple of the divisor.
    """
    if size_divisor is None:
        if crop is None:
            return size
        if size[0] < crop[0] and size[1] < crop[1]:
            return min(size), min(size)
        return min(size[0], crop[0]), min(size[1], crop[1])
    # At least two cells of the coarsest map: norms over a single one are undefined.
    height, width = (max(2, math.ceil(side / size_divisor)) * size_divisor for side in size)
    if crop is None:
        return height, width
    if crop[0] % size_divisor or crop[1] % size_divisor:
        raise ValueError(f"crop_size is {crop}, legal: multiples of {size_divisor}")
    return min(height, crop[0]), min(width, crop[1])


def view_size(size: Size, short_side: int | None, ratio: float | None) -> Size:
    """Size to which an image of `size` is resized for one view; the aspect ratio is kept up to rounding.

    The short side becomes `short_side` (None: its own length) times `ratio` (None: 1), rounded down; for a ratio below
    1 it is then rounded up to a multiple of 32, as the reference does.
    """
    short = min(size) if short_side is None else short_side
    if ratio is not None:
        short = max(1, int(short * ratio))
        if ratio < 1:
            short = math.ceil(short / _VIEW_MULTIPLE) * _VIEW_MULTIPLE
    long = int(short * max(size) / min(size) + 0.5)
    return (short, long) if size[0] <= size[1] else (long, short)


def covering_size(size: Size, side: int) -> Size:
    """Size at which an image just covers a square of `side`, rounded half to even, as in EoMT's evaluation."""
    factor = max(side / size[0], side / size[1])
    return round(size[0] * factor), round(size[1] * factor)
