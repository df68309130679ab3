"""Draw training crops with the geometry of the reference's training transform: offline (`preprocess`) or, from whole
images, anew in each epoch (`trainer`).

DINOv3's segmentation training scales the short side to crop x U(0.5, 2.0), then cuts a square of the crop size (or the
whole axis, where the scaled image is shorter) at a random position, redrawing the position while a single class covers
more than 75 % of the labelled pixels. EoMT's (torchvision's ScaleJitter) scales the long side instead, and accepts any
position with a labelled pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

_SCALE_DRAWS = 10  # scales tried while no position in the scaled image has a labelled pixel
SCALED_SIDES = ("short", "long", "stored")


@dataclass(frozen=True, kw_only=True)
class CropRules:
    """How crops are drawn: scale, size, and which positions are rejected."""

    window: int  # side of the crop in pixels
    size: int  # what the scale is relative to, for scaled_side short and long
    scaled_side: str  # short, long: that side becomes size x scale; stored: every stored pixel becomes `scale` pixels
    min_scale: float
    max_scale: float
    cat_max_ratio: float | None  # redraw while a class has at least this share; None: only while nothing is labelled
    tries: int  # redraws before the last crop is kept


class Crop(NamedTuple):
    """A window `[top, top+height) x [left, left+width)` of the image scaled to `scaled_height x scaled_width`."""

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int


class Labels(Protocol):
    """The labels of an image, as far as drawing needs them (see `LabelRuns`)."""

    height: int
    width: int

    def counts(self, crop: Crop) -> npt.NDArray[np.int64]:
        """Pixels of each class in a crop."""


def draw_crop(rng: np.random.Generator, labels: Labels, rules: CropRules) -> Crop | None:
    """Draw a crop; None if no try has a labelled pixel."""
    limit = rules.cat_max_ratio
    positions = rules.tries + 1 if limit is not None else 1  # tried per scale
    for _ in range(_SCALE_DRAWS * (rules.tries + 1) // positions):
        scaled = _draw_scaled_size(rng, labels, rules)
        for _ in range(positions):
            crop = _random_window(rng, scaled, rules.window)
            counts = labels.counts(crop)
            if limit is not None and np.count_nonzero(counts) > 1 and counts.max() < limit * counts.sum():
                return crop
        if counts.any():
            return crop
    return None


def draw_any_crop(rng: np.random.Generator, labels: Labels, rules: CropRules) -> Crop:
    """Draw a crop without looking at its labels."""
    return _random_window(rng, _draw_scaled_size(rng, labels, rules), rules.window)


def _draw_scaled_size(rng: np.random.Generator, labels: Labels, rules: CropRules) -> tuple[int, int]:
    size, scale = (labels.height, labels.width), rng.uniform(rules.min_scale, rules.max_scale)
    if rules.scaled_side == "stored":
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    scaled_size = _scaled_size if rules.scaled_side == "short" else _fitted_size
    return scaled_size(size, rules.size * scale)


def _scaled_size(size: tuple[int, int], short_side: float) -> tuple[int, int]:
    """(height, width) with the short side `short_side` rounded down, the long side rounded to nearest."""
    height, width = size
    short = max(1, int(short_side))
    long = int(short * max(height, width) / min(height, width) + 0.5)
    return (short, long) if height <= width else (long, short)


def _fitted_size(size: tuple[int, int], long_side: float) -> tuple[int, int]:
    """(height, width), both rounded down, of the image fitted into a square of `long_side`."""
    height, width = size
    ratio = long_side / max(height, width)
    return max(1, int(height * ratio)), max(1, int(width * ratio))


def _random_window(rng: np.random.Generator, scaled: tuple[int, int], window: int) -> Crop:
    height, width = min(window, scaled[0]), min(window, scaled[1])
    return Crop(
        scaled_height=scaled[0], scaled_width=scaled[1],
        top=int(rng.integers(0, scaled[0] - height + 1)), left=int(rng.integers(0, scaled[1] - width + 1)),
        height=height, width=width,
    )
