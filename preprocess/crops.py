"""Draw training crops, and cut them from images, with the geometry of the reference's training transform.

DINOv3's segmentation training scales the short side to crop x U(0.5, 2.0), then cuts a square of the crop size (or the
whole axis, where the scaled image is shorter) at a random position, redrawing the position while a single class covers
more than 75 % of the labelled pixels. EoMT's (torchvision's ScaleJitter) scales the long side instead, and accepts any
position with a labelled pixel. Only the crop's region is resampled here.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.config import CropConfig

# ImageNet mean colour: 0 after normalisation, like the reference's padding.
PADDING_COLOR = (124, 116, 104)
_SCALE_DRAWS = 10  # scales tried while no position in the scaled image has a labelled pixel


class Crop(NamedTuple):
    """A window `[top, top+height) x [left, left+width)` of the image scaled to `scaled_height x scaled_width`."""

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int


def crop_rng(seed: int, key: str, crop_number: int) -> np.random.Generator:
    """Random generator of one crop: depends on (seed, image, crop), not on worker or order."""
    image = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64([seed, image, crop_number]))


class Labels(Protocol):
    """The labels of an image, as far as drawing needs them (see `LabelRuns`)."""

    height: int
    width: int

    def counts(self, crop: Crop) -> npt.NDArray[np.int64]:
        """Pixels of each class in a crop."""


def draw_crop(rng: np.random.Generator, labels: Labels, config: CropConfig) -> Crop | None:
    """Draw a crop; None if no try has a labelled pixel."""
    limit = config.cat_max_ratio
    positions = config.tries + 1 if limit is not None else 1  # tried per scale
    scaled_size = _scaled_size if config.scaled_side == "short" else _fitted_size
    for _ in range(_SCALE_DRAWS * (config.tries + 1) // positions):
        side = config.size * rng.uniform(config.min_scale, config.max_scale)
        scaled = scaled_size((labels.height, labels.width), side)
        for _ in range(positions):
            crop = _random_window(rng, scaled, config.window)
            counts = labels.counts(crop)
            if limit is not None and np.count_nonzero(counts) > 1 and counts.max() < limit * counts.sum():
                return crop
        if counts.any():
            return crop
    return None


def cut_image(image: Image.Image, crop: Crop, side: int) -> Image.Image:
    """The crop of an RGB image: bilinear with antialiasing, padded right and below with the mean colour to `side`.

    Pillow reads beyond `box` where the filter needs it, so up to rounding the result equals cropping the whole scaled
    image.
    """
    x_ratio, y_ratio = image.width / crop.scaled_width, image.height / crop.scaled_height
    box = (
        crop.left * x_ratio,
        crop.top * y_ratio,
        min((crop.left + crop.width) * x_ratio, image.width),
        min((crop.top + crop.height) * y_ratio, image.height),
    )
    resized = image.resize((crop.width, crop.height), Image.Resampling.BILINEAR, box)
    if resized.size == (side, side):
        return resized
    padded = Image.new("RGB", (side, side), PADDING_COLOR)
    padded.paste(resized)
    return padded


def _scaled_size(size: tuple[int, ...], short_side: float) -> tuple[int, int]:
    """(height, width) with the short side `short_side` rounded down, the long side rounded to nearest."""
    height, width = size
    short = max(1, int(short_side))
    long = int(short * max(height, width) / min(height, width) + 0.5)
    return (short, long) if height <= width else (long, short)


def _fitted_size(size: tuple[int, ...], long_side: float) -> tuple[int, int]:
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
