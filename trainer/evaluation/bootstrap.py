"""Confidence intervals of IoU over images, by the bootstrap (Efron & Tibshirani 1993, ch. 13: percentile intervals)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_CHUNK = 50  # replicates at a time


class Intervals(NamedTuple):
    """Ends of 95 % intervals: how much a metric varies with the choice of the validation images."""

    miou: tuple[float, float]
    iou: npt.NDArray[np.float64]  # [C, 2], NaN for classes that occur nowhere


def bootstrap(areas: npt.NDArray[np.int64], *, absent_as_zero: bool = False, replicates: int = 1000,
              seed: int = 0) -> Intervals:
    """Intervals for the IoU of all images together, from the counts [N, 3, C] (intersection, prediction, label) of
    each: as many images are drawn with replacement, and their counts summed, `replicates` times."""
    images, _, classes = areas.shape
    if not images:
        return Intervals((np.nan, np.nan), np.full((classes, 2), np.nan))
    rng = np.random.default_rng(seed)
    flat = areas.reshape(images, -1).astype(np.float64)  # sums stay below 2^53, so they are exact
    found = []
    for first in range(0, replicates, _CHUNK):
        count = min(_CHUNK, replicates - first)
        weights = rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)
        intersect, pred, label = (weights @ flat).reshape(count, 3, classes).transpose(1, 0, 2)
        with np.errstate(invalid="ignore"):
            found.append(intersect / (pred + label - intersect))
    iou = np.concatenate(found)  # [replicates, C]
    defined = ~np.isnan(iou)
    with np.errstate(invalid="ignore"):
        miou = np.where(defined, iou, 0).sum(1) / (classes if absent_as_zero else defined.sum(1))
    low, high = _ends(miou)
    return Intervals((low, high), np.array([_ends(iou[:, number]) for number in range(classes)]).reshape(classes, 2))


def _ends(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
