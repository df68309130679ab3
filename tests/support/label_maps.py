"""Crops of label maps, pixel by pixel: what `shards.crops.label_runs` must give."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shards.crops.drawing import Crop


def cut_labels(label_map: npt.NDArray[Any], crop: Crop) -> npt.NDArray[Any]:
    """Class ids `[height,width]`: nearest neighbour, source = floor(target x ratio), in integers."""
    rows = np.arange(crop.top, crop.top + crop.height) * label_map.shape[0] // crop.scaled_height
    columns = np.arange(crop.left, crop.left + crop.width) * label_map.shape[1] // crop.scaled_width
    cut: npt.NDArray[Any] = label_map[rows[:, None], columns]
    return cut


def pad_labels(labels: npt.NDArray[Any], side: int, ignore_index: int) -> npt.NDArray[Any]:
    """Pad to `[side,side]` on the right and below with `ignore_index`."""
    padded = np.full((side, side), ignore_index, labels.dtype)
    padded[: labels.shape[0], : labels.shape[1]] = labels
    return padded
