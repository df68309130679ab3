"""The views of an image that a prediction averages over, and their windows, on which the network is run in batches.

A view is the image at one size, as it is or mirrored. The network's outputs for a window are small; scores per class at
the size of the image are not, so they are computed from the outputs for a band of rows at a time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.transforms import normalize
from trainer.evaluation.sliding_window import window_grid, window_size
from trainer.models.outputs import Outputs
from trainer.models.resizing import Rows, Size, resize_rows, source_rows

ScoreRows = Callable[[Outputs, Size, Rows], Tensor]
"""(outputs of one window, its size, rows of it) -> scores [1, C, rows, w]."""


class Pixels(Protocol):
    """What a view needs of its pixels; tensors have it."""

    @property
    def shape(self) -> Sequence[int]:
        """(1, 3, h, w)"""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""

    def __getitem__(self, place: Any, /) -> Tensor:
        """Part of them: [1, 3, h', w']."""


@dataclass(frozen=True, kw_only=True)
class ViewRules:
    """How views are cut into windows and normalised.

    crop_size     side of a window; None: one window covers the view
    stride        distance between windows; None: as few as possible, spread evenly
    size_divisor  of which a window's sides are multiples, by padding; None: windows lie inside the view
    """

    crop_size: int | None
    stride: int | None
    size_divisor: int | None
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(kw_only=True, eq=False)
class Window:
    """A window of a view; `outputs` are the network's, each [1, ...], while they are needed."""

    view: View
    size: Size
    place: tuple[int, int, int, int]  # top, bottom, left, right; may exceed the view
    outputs: Outputs | None = None

    def pixels(self) -> Tensor:
        """Normalised float32 [3, *size]; zeros, the mean colour, right and below the view."""
        top, bottom, left, right = self.place
        pixels = self.view.pixels[:, :, top:bottom, left:right]
        if self.view.mirrored:
            width = self.view.size[1]
            pixels = self.view.pixels[:, :, top:bottom, max(width - right, 0) : width - left].flip(3)
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels, self.view.rules.mean, self.view.rules.std)
        height, width = pixels.shape[2:]
        return F.pad(pixels, (0, self.size[1] - width, 0, self.size[0] - height))[0]


class View:
    """An image at one size, its windows, and scores per class computed from their outputs.

    pixels    uint8, or normalised float32, [1, 3, h, w], never mirrored: views of one size share them. Anything that
              can be sliced like a tensor will do, such as an image that is read from disk window by window
    full      the size of the image, to which scores are resized
    """

    def __init__(self, pixels: Pixels, full: Size, rules: ViewRules, *, mirrored: bool = False) -> None:
        self.pixels, self.full, self.rules, self.mirrored = pixels, full, rules, mirrored
        self.size: Size = (pixels.shape[2], pixels.shape[3])
        crop = None if rules.crop_size is None else (rules.crop_size, rules.crop_size)
        window = window_size(self.size, crop, rules.size_divisor)
        padded = (max(self.size[0], window[0]), max(self.size[1], window[1]))
        stride = None if rules.stride is None else (rules.stride, rules.stride)
        grid = window_grid(padded, window, stride)
        self.windows = [Window(view=self, size=window, place=place) for place in grid]
        self.visits = [_visits(length, {place[axis : axis + 2] for place in grid}, pixels.device)
                       for length, axis in zip(self.size, (0, 2), strict=True)]  # windows form a grid
        self._closed = 0  # how many of the windows, which go row by row, are no longer needed

    def needs(self, rows: Rows) -> list[Window]:
        """The windows from which these rows of the full-size scores are computed."""
        first, end = source_rows(self.size[0], self.full[0], rows)
        begin = bisect_right(self.windows, first, lo=self._closed, key=lambda window: window.place[1])
        stop = bisect_left(self.windows, end, lo=begin, key=lambda window: window.place[0])
        return self.windows[begin:stop]

    def due(self, window: Window) -> int:
        """The first full-size row for which a window is needed, or one shortly before it."""
        return window.place[0] * self.full[0] // self.size[0]

    def scores(self, rows: Rows, num_classes: int, score_rows: ScoreRows) -> Tensor:
        """Rows of the full-size scores, float32 [1, C, rows, W]: the mean over the windows that contain a pixel, summed
        in float32, resized, and mirrored back. The outputs of `needs(rows)` must be there."""
        first, end = source_rows(self.size[0], self.full[0], rows)
        total = torch.zeros(1, num_classes, end - first, self.size[1], device=self.pixels.device)
        for window in self.needs(rows):
            top, bottom, left, right = window.place
            above, below = max(first, top), min(end, bottom, self.size[0])
            assert window.outputs is not None
            part = score_rows(window.outputs, window.size, (above - top, below - top))
            right = min(right, self.size[1])
            total[:, :, above - first : below - first, left:right] += part[..., : right - left]
        if len(self.windows) > 1:
            total /= self.visits[0][first:end, None] * self.visits[1]
        resized = resize_rows(total, first, self.size[0], self.full, rows)
        return resized.flip(3) if self.mirrored else resized

    def close(self, row: int) -> None:
        """Forget the outputs of windows that no full-size row from `row` on needs."""
        begin = len(self.windows)
        if row < self.full[0]:
            first, _ = source_rows(self.size[0], self.full[0], (row, row + 1))
            begin = bisect_right(self.windows, first, lo=self._closed, key=lambda window: window.place[1])
        for window in self.windows[self._closed : begin]:
            window.outputs = None
        self._closed = begin


class WindowQueue:
    """Runs the network on windows of any views, in the order in which they were added, in batches of one size."""

    def __init__(self, run: Callable[[Tensor], Outputs], batch: int) -> None:
        self.run, self.batch = run, batch
        self._waiting: dict[Size, deque[Window]] = {}

    def add(self, windows: Sequence[Window]) -> None:
        """Append windows to those waiting."""
        for window in windows:
            self._waiting.setdefault(window.size, deque()).append(window)

    def compute(self, window: Window) -> None:
        """Set the outputs of a window, and with it of those that wait in front of it and next to it."""
        waiting = self._waiting[window.size]
        while window.outputs is None:
            batch = [waiting.popleft() for _ in range(min(self.batch, len(waiting)))]
            outputs = self.run(torch.stack([member.pixels() for member in batch]))
            for number, member in enumerate(batch):
                member.outputs = _member(outputs, number)


def _member(outputs: Outputs, number: int) -> Outputs:
    """The outputs of one image of a batch, without those of earlier layers."""
    tensors = cast(Mapping[str, Any], outputs)
    return cast(Outputs, {name: value[number : number + 1] for name, value in tensors.items() if name != "aux_outputs"})


def _visits(length: int, spans: set[tuple[int, ...]], device: torch.device) -> Tensor:
    """float32 [length]: how many of the spans along an axis contain each place."""
    visits = torch.zeros(length, device=device)
    for first, end in spans:
        visits[first:end] += 1
    return visits
