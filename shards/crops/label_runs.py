"""Crops of a label map, counted and cut from the runs of its rows, without touching pixels.

A crop scales labels by nearest neighbour: its row i shows row (top + i) * H // scaled_height of the map, and columns
likewise. So every run of a source row becomes one run of the crop, of a length that follows from its ends, and repeats
in each crop row that shows this source row. An image has some thousand runs, and a crop a quarter of a million pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.crops.drawing import Crop

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
_STRIP = 1 << 22  # pixels searched for runs at a time, to bound memory


class Runs(NamedTuple):
    """Maximal runs in the order of pixels: first pixel in the flattened crop, pixels, class id."""

    start: Ints
    length: Ints
    value: Array

    def counts(self) -> Ints:
        """Pixels of each class, up to the last that is present."""
        return np.bincount(self.value, self.length).astype(np.int64)  # exact: floats below 2^53


class _Shown(NamedTuple):
    """What a crop shows of the rows' runs, row by row of the source."""

    rows: Ints  # source rows shown
    times: Ints  # crop rows that show each one
    runs: Ints  # runs in each one
    length: Ints  # of each run: columns of the crop that show it; may be 0
    column: Ints  # of each run: the first of these columns
    value: Array  # of each run


class LabelRuns:
    """The runs of a label map `[H,W]`, row by row; pixels equal to `ignore_index` are in none.

    A run covers columns [first, last) of its row. Of a label map it holds 5 or 6 bytes per run.
    """

    def __init__(self, label_map: Array, ignore_index: int) -> None:
        height, width = label_map.shape
        rows = max(1, _STRIP // width)
        strips = [_row_runs(label_map[top : top + rows], ignore_index) for top in range(0, height, rows)]
        self._set((height, width), *(np.concatenate(column) for column in zip(*strips, strict=True)))

    @classmethod
    def from_runs(cls, start: Ints, length: Ints, value: Array, width: int, valid: tuple[int, int]) -> LabelRuns:
        """Of the runs of a map of `width` columns, in the order of pixels. `valid` is the (height, width) of its part,
        at the top left, outside which nothing is labelled: crops are drawn in it."""
        found, end = cls.__new__(cls), start + length
        row = start // width
        pieces = (end - 1) // width - row + 1  # rows that a run reaches into
        if pieces.max(initial=1) > 1:  # all but its first begin at the left edge, all but its last end at the right one
            of_run = np.repeat(np.arange(row.size), pieces)
            row, start, end, value = _ranges(row, pieces), start[of_run], end[of_run], value[of_run]
        left = row * width
        found._set(valid, np.bincount(row, minlength=valid[0]), np.maximum(start - left, 0),
                   np.minimum(end - left, width), value)
        return found

    def _set(self, size: tuple[int, int], runs_of_row: Ints, first: Array, last: Array, value: Array) -> None:
        self.height, self.width = size
        self._first, self._last, self._value = first, last, value
        self._run_of_row = np.concatenate(([0], np.cumsum(runs_of_row)))

    def counts(self, crop: Crop) -> Ints:
        """Pixels of each class in the crop, up to the last class in its rows."""
        shown = self._shown(crop)
        pixels = shown.length * np.repeat(shown.times, shown.runs)
        return np.bincount(shown.value, pixels).astype(np.int64)

    def cut(self, crop: Crop, side: int) -> Runs:
        """The runs of the crop, padded on the right and below to `side` x `side`."""
        shown = self._shown(crop)
        runs = np.repeat(shown.runs, shown.times)  # in each crop row
        first = np.repeat(np.cumsum(shown.runs) - shown.runs, shown.times)
        source = _ranges(first, runs)
        start = shown.column[source] + np.repeat(np.arange(crop.height) * side, runs)
        length = shown.length[source]
        visible = np.flatnonzero(length)
        return _merged(start[visible], length[visible], shown.value[source[visible]])

    def _shown(self, crop: Crop) -> _Shown:
        every = (crop.top + np.arange(crop.height)) * self.height // crop.scaled_height
        changes = np.flatnonzero(np.diff(every, prepend=-1))
        rows, times = every[changes], np.diff(changes, append=crop.height)
        runs = self._run_of_row[rows + 1] - self._run_of_row[rows]
        is_whole = rows[-1] - rows[0] == rows.size - 1  # no row is left out
        chosen = (slice(self._run_of_row[rows[0]], self._run_of_row[rows[-1] + 1]) if is_whole else
                  _ranges(self._run_of_row[rows], runs))
        before = _shown_before(self.width, crop.scaled_width, crop.left, crop.width)
        column = before[self._first[chosen]]
        return _Shown(rows, times, runs, before[self._last[chosen]] - column, column, self._value[chosen])


def _row_runs(label_map: Array, ignore_index: int) -> tuple[Ints, Array, Array, Array]:
    """(runs of each row; first column, column after the last, and value of each run)"""
    height, width = label_map.shape
    is_first = np.empty(label_map.shape, bool)
    is_first[:, 0] = True
    np.not_equal(label_map[:, 1:], label_map[:, :-1], out=is_first[:, 1:])
    start = np.flatnonzero(is_first)
    value = label_map.reshape(-1)[start]
    end = np.append(start[1:], label_map.size)
    kept = np.flatnonzero(value != ignore_index)
    start, end, value = start[kept], end[kept], value[kept]
    row = start // width
    left = row * width
    return (np.bincount(row, minlength=height), (start - left).astype(np.uint16), (end - left).astype(np.uint16), value)


def _ranges(first: Ints, count: Ints) -> Ints:
    """first[0], first[0] + 1, … (count[0] numbers), then the same for first[1], …"""
    end = np.cumsum(count)
    return np.arange(end[-1]) + np.repeat(first - end + count, count)


def _shown_before(size: int, scaled: int, offset: int, length: int) -> Ints:
    """For each source position 0..size: how many of the `length` crop positions show an earlier one.

    Crop position i shows source position (offset + i) * size // scaled, which is below x if and only if
    offset + i < ceil(x * scaled / size).
    """
    return np.clip(-(-np.arange(size + 1) * scaled // size) - offset, 0, length)


def _merged(start: Ints, length: Ints, value: Array) -> Runs:
    """Join runs of a class that touch: what lay between them is not shown, or they meet at the end of a row."""
    if not start.size:
        return Runs(start, length, value)
    is_first = np.ones(start.size, bool)
    np.not_equal(start[1:], start[:-1] + length[:-1], out=is_first[1:])
    is_first[1:] |= value[1:] != value[:-1]
    firsts = np.flatnonzero(is_first)
    return Runs(start[firsts], np.add.reduceat(length, firsts), value[firsts])
