"""Rotations and reflections of training crops, and the parts of them that are erased.

A loader worker draws a `Move` for each sample. It rotates the labels itself, as a class may leave the crop, which must
then have one label fewer; the training device does the rest, without waiting for the host. Only the unpadded part of a
crop moves: what is padding on the right and below stays so.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.crops.resampling import PADDING_COLOR
from trainer.data_config import DataConfig

Size = tuple[int, int]  # height and width
_LEAST_ERASED = 0.02  # of the area of a crop
_LOG_ASPECT = math.log(1 / 0.3)  # an erased rectangle's height is 0.3 to 1/0.3 times its width


class Move(NamedTuple):
    """What is done to a crop, in this order."""

    degrees: float = 0.0  # counter-clockwise, about the centre of the unpadded part
    mirrored: bool = False  # left and right are swapped
    flipped: bool = False  # top and bottom are swapped
    turns: int = 0  # quarter turns, counter-clockwise
    erased: tuple[int, int, int, int] | None = None  # (top, left, height, width): mean colour for the network

    @property
    def is_pending(self) -> bool:
        """Whether pixels are still to be moved."""
        return self[:4] != Move()[:4]

    @property
    def done(self) -> Move:
        """The move once pixels have been moved: what is left is to erase."""
        return Move(erased=self.erased)

    @property
    def swaps_sides(self) -> bool:
        return self.turns % 2 == 1


def draw_move(rng: np.random.Generator, config: DataConfig, valid: Size) -> Move:
    """Draw a move of a crop whose unpadded part has the size `valid`; the number of values drawn from `rng` depends on
    the configuration only."""
    mirrored = bool(rng.random() < config.hflip)
    if not (config.vflip or config.quarter_turns or config.rotate or config.erase):
        return Move(mirrored=mirrored)  # the sequences of runs that began before there were others
    coins, turns, angle, erasing = rng.random(4), int(rng.integers(1, 4)), rng.uniform(-1.0, 1.0), rng.random(4)
    turns = turns if coins[1] < config.quarter_turns else 0
    height, width = valid[::-1] if turns % 2 else valid
    return Move(
        degrees=float(angle * config.rotate_degrees) if coins[2] < config.rotate else 0.0,
        mirrored=mirrored, flipped=bool(coins[0] < config.vflip), turns=turns,
        erased=_rectangle(erasing, (height, width), config.erase_area) if coins[3] < config.erase else None,
    )


def _rectangle(drawn: npt.NDArray[np.float64], size: Size, largest: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of up to `largest` of the area, of an aspect ratio drawn on a logarithmic scale, at a
    random place: Random Erasing (arXiv:1708.04896). `drawn` are four numbers from 0 to 1."""
    area = size[0] * size[1] * (_LEAST_ERASED + drawn[0] * (largest - _LEAST_ERASED))
    aspect = math.exp(_LOG_ASPECT * (2 * drawn[1] - 1))
    height = min(size[0], max(1, round(math.sqrt(area * aspect))))
    width = min(size[1], max(1, round(math.sqrt(area / aspect))))
    return int(drawn[2] * (size[0] - height + 1)), int(drawn[3] * (size[1] - width + 1)), height, width


def rotate_labels(segment_map: npt.NDArray[Any], valid: Size, degrees: float, ignored: int) -> npt.NDArray[Any]:
    """A segment map [H, W] with its unpadded part rotated: nearest neighbour, `ignored` where it shows the outside."""
    height, width = valid
    rows, columns = np.arange(height, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)[None]
    y, x = (np.floor(place + 0.5).astype(np.int64) for place in _sources(rows, columns, valid, degrees))
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    rotated = segment_map.copy()
    rotated[:height, :width] = np.where(inside, segment_map[y.clip(0, height - 1), x.clip(0, width - 1)], ignored)
    return rotated


def rotate_image(image: Tensor, valid: Size, degrees: float) -> Tensor:
    """The unpadded part of an image uint8 [3, H, W], rotated: uint8 [3, *valid], bilinear, the mean colour where it
    shows what is outside. Never waits for the device."""
    height, width = valid
    rows, columns = (torch.arange(side, dtype=torch.float64, device=image.device) for side in valid)
    y, x = _sources(rows[:, None], columns[None], valid, degrees)  # [height, width]
    outside = (y < -0.5) | (y >= height - 0.5) | (x < -0.5) | (x >= width - 0.5)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    below, right = (top + 1).clamp_(max=height - 1), (left + 1).clamp_(max=width - 1)
    down, across = y - top, x - left
    pixels = image[:, :height, :width].double()
    upper = pixels[:, top, left] * (1 - across) + pixels[:, top, right] * across
    lower = pixels[:, below, left] * (1 - across) + pixels[:, below, right] * across
    rotated = (upper * (1 - down) + lower * down).add_(0.5).floor_().to(torch.uint8)
    return torch.where(outside, padding_color(image.device), rotated)


def _sources(rows: Any, columns: Any, valid: Size, degrees: float) -> tuple[Any, Any]:
    """The place, in the part before it is rotated, that each of its pixels shows: (row, column)."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    middle_row, middle_column = (valid[0] - 1) / 2, (valid[1] - 1) / 2
    down, right = rows - middle_row, columns - middle_column
    return sine * right + cosine * down + middle_row, cosine * right - sine * down + middle_column


def turn(part: Tensor, move: Move) -> Tensor:
    """A part of a picture, or masks [..., h, w], reflected and turned; not rotated by degrees."""
    if move.mirrored:
        part = part.flip(-1)
    if move.flipped:
        part = part.flip(-2)
    return part.rot90(move.turns, (-2, -1)) if move.turns else part


def padding_color(device: torch.device) -> Tensor:
    """uint8 [3, 1, 1], filled on the device: copying host numbers would synchronise."""
    return torch.cat([torch.full((1, 1, 1), level, dtype=torch.uint8, device=device) for level in PADDING_COLOR])
