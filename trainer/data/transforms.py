"""Colour augmentation and normalisation of whole batches on the training device; random windows on workers.

Loader workers draw the random numbers, one small vector per sample; the device applies them to all samples at once.
A sample's result depends only on its own vector, and nothing synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from shards.errors import ConfigError

PHOTOMETRIC_PARAMETERS = ("brightness", "contrast", "saturation", "hue", "contrast_last")
LUMINANCE = (0.2989, 0.587, 0.114)  # torchvision's: ITU-R BT.601 with 0.0001 less red
_LOWEST, _RANGE = np.array([-32.0, 0.5, 0.5, -1.0]), np.array([64.0, 1.0, 1.0, 2.0])  # hue: fraction of the maximum
_NEUTRAL = np.array([0.0, 1.0, 1.0, 0.0])
_FROM_UNIT = 255.999 / 255.0  # torchvision's adjust_hue scales 0..1 by 255.999 before truncating, to lose less


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std, float32 [B, 3, H, W] from uint8 [B, 3, H, W]; mean and std on a 0..1 scale."""
    planes = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # batches arrive channels-last
    return planes.div_(255.0).sub_(_channel_map(mean, images.device)).div_(_channel_map(std, images.device))


def _channel_map(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [1, 3, 1, 1], filled on the device: copying host numbers would synchronise on every batch."""
    return torch.stack([torch.full((), value, device=device) for value in values]).view(1, -1, 1, 1)


def paddings(images: Tensor, valid: Sequence[tuple[int, int]]) -> Iterator[tuple[int | slice, ...]]:
    """Indices of the padding in images [B, 3, H, W] whose unpadded size is `valid` (height, width): bottom, then right.

    Built from host numbers alone, so that indexing with them does not synchronise with the device.
    """
    height, width = images.shape[2:]
    for index, (valid_height, valid_width) in enumerate(valid):
        if valid_height < height:
            yield index, slice(None), slice(valid_height, None)
        if valid_width < width:
            yield index, slice(None), slice(None, valid_height), slice(valid_width, None)


def draw_photometric(rng: np.random.Generator, hue_degrees: float = 180.0) -> np.ndarray:
    """Parameters float32 [5] of one sample's colour augmentation, in the order of `PHOTOMETRIC_PARAMETERS`.

    Brightness is an offset, U(-32, 32); contrast and saturation are factors, U(0.5, 1.5); hue is a fraction of the
    colour circle, up to `hue_degrees` either way. Each is applied with probability 1/2 and neutral otherwise.
    `contrast_last` is a coin flip (SSD, arXiv:1512.02325; ranges of DINOv3's linear recipe). Every call draws the same
    number of values from `rng`.
    """
    drawn = rng.random(9)
    values, coins = _LOWEST + _RANGE * drawn[:4], drawn[4:] < 0.5
    values[3] *= hue_degrees / 360.0
    parameters = np.empty(5, np.float32)
    parameters[:4], parameters[4] = np.where(coins[:4], values, _NEUTRAL), coins[4]
    return parameters


def photometric_distort(images: Tensor, params: Tensor) -> Tensor:
    """Colour-augmented uint8 [B, 3, H, W] of RGB images uint8 [B, 3, H, W]; params float32 [B, 5], one row each,
    as from `draw_photometric` and on the images' device.

    In the order brightness, contrast, saturation, hue; with `contrast_last` contrast comes after hue. Each step clips
    to 0..255 and truncates to integers; a neutral step leaves its sample unchanged. Saturation and hue reproduce the
    values of torchvision's adjust_saturation and adjust_hue on uint8, which DINOv3's recipe calls.
    """
    brightness, contrast, saturation, hue, contrast_last = params.float().t()[:, :, None, None, None]  # [B, 1, 1, 1]
    last = contrast_last > 0.5
    pixels = images.float()
    pixels = _to_levels(pixels + brightness)
    pixels = _to_levels(pixels * torch.where(last, 1.0, contrast))
    pixels = _to_levels(saturation * pixels + (1.0 - saturation) * _luminance(pixels).floor())
    pixels = torch.where(hue == 0.0, pixels, _to_levels(_rotate_hue(pixels, hue)))
    pixels = _to_levels(pixels * torch.where(last, contrast, 1.0))
    return pixels.to(torch.uint8)


def _to_levels(pixels: Tensor) -> Tensor:
    return pixels.clamp(0.0, 255.0).floor()


def _luminance(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    return (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue)[:, None]  # [B, 1, H, W]


def _rotate_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Rotate the HSV hue of pixels [B, 3, H, W] by `turn` [B, 1, 1, 1], a fraction of the circle; value and chroma are
    unchanged except for `_FROM_UNIT`."""
    red, green, blue = pixels[:, 0:1], pixels[:, 1:2], pixels[:, 2:3]
    value = pixels.amax(1, keepdim=True)  # [B, 1, H, W]
    chroma = value - pixels.amin(1, keepdim=True)
    scale = chroma.clamp(min=1.0)  # values are integers: chroma below 1 is grey, which has no hue
    sixths = torch.where(
        value == red, (green - blue) / scale,
        torch.where(value == green, 2.0 + (blue - red) / scale, 4.0 + (red - green) / scale),
    ) + 6.0 * turn
    # Distance (in sixths) from a primary determines how much chroma it lacks: none up to 1, all of it from 2 on.
    lacks = []
    for primary in (0.0, 2.0, 4.0):
        around = (sixths - primary).remainder(6.0)
        lacks.append(torch.minimum(around, 6.0 - around).sub(1.0).clamp(0.0, 1.0))
    return _FROM_UNIT * value - (_FROM_UNIT * chroma) * torch.cat(lacks, dim=1)  # [B, 3, H, W]


def random_window(rng: np.random.Generator, size: tuple[int, ...], valid: tuple[int, int], side: int,
                  key: str) -> tuple[tuple[slice, slice], tuple[int, int]]:
    """A random `side` x `side` window of a stored crop, and the size of its unpadded part.

    It contains as much of the unpadded part as fits, as if that had been cropped and then padded again. Raises
    ConfigError when the crop is smaller.
    """
    height, width = size
    if height < side or width < side:
        raise ConfigError(f"data.crop_size is {side}, but the stored crop {key} is {height}x{width}; "
                          "legal: at most the stored size")
    top, left = (int(rng.integers(0, max(0, part - side) + 1)) for part in valid)
    return (slice(top, top + side), slice(left, left + side)), (min(side, valid[0]), min(side, valid[1]))
