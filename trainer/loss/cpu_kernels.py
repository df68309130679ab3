"""Faster CPU versions of some of the loss's operations; results are the same except for the order of points.

On other devices, where `serve` is False, callers use torch's own operations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CELLS = 128  # grid cells along each side, by which points are sorted
_STRIDE = 16  # `smallest` samples one value in this many


def serve(values: Tensor) -> bool:
    """Whether these kernels support a tensor. A subclass may have no numbers (`trainer.memory.simulation`)."""
    return values.device.type == "cpu" and type(values) is Tensor


def sort_by_location(points: Tensor) -> Tensor:
    """The same points float32 [..., P, 2] in [0, 1], sorted roughly by location.

    Their order is arbitrary, and maps are read two to three times as fast at neighbouring points.
    """
    x, y = (points * _CELLS).to(torch.int16).clamp_(0, _CELLS - 1).unbind(-1)
    order = np.argsort((y * _CELLS + x).numpy(), axis=-1, kind="stable")  # 16 bits: a radix sort
    return torch.view_as_real(torch.view_as_complex(points).gather(-1, torch.from_numpy(order)))


def smallest(values: Tensor, count: int) -> Tensor:
    """Indices int64 [N, count] of each row's `count` smallest values float32 [N, S], 0 < count < S, in any order.

    A subsample of each row yields bounds that contain the count-th smallest value, with a margin of four standard
    deviations. Only the values between them need partitioning, which takes a third of the time of partitioning all of
    them. Rows with too few or too many values in between (unlucky subsample, ties, NaN) are partitioned in full.
    """
    rows: npt.NDArray[np.float32] = values.numpy()
    size = rows.shape[1]
    sampled, fraction = -(-size // _STRIDE), count / size
    margin = 4.0 * (sampled * fraction * (1.0 - fraction)) ** 0.5 + 1.0
    ranks = np.clip([int(sampled * fraction - margin), int(sampled * fraction + margin)], 0, sampled - 1)
    indices = np.empty((len(rows), count), np.int64)
    for chosen, row in zip(indices, rows, strict=True):
        low, high = np.partition(row[::_STRIDE], ranks)[ranks]
        candidates = np.flatnonzero(row <= high)
        at_most_high = row[candidates]
        between = at_most_high[np.flatnonzero(at_most_high >= low)]
        missing = count - (len(at_most_high) - len(between))
        if 0 < missing <= len(between):
            candidates = candidates[at_most_high <= np.partition(between, missing - 1)[missing - 1]]
        chosen[:] = candidates if len(candidates) == count else np.argpartition(row, count - 1)[:count]
    return torch.from_numpy(indices)
