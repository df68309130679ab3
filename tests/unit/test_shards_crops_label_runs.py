"""Crops cut from runs are the crops cut from pixels, for every label map and window."""

from __future__ import annotations

import tarfile
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.crops import label_runs
from shards.crops.drawing import Crop
from shards.crops.label_runs import LabelRuns
from shards.rle import decode_header, decode_runs, encode_rle, encode_runs, runs_of, segment_map_from_runs
from shards.writer import _member
from tests.support.label_maps import cut_labels, pad_labels


@st.composite
def label_maps(draw: st.DrawFn) -> npt.NDArray[Any]:
    """Label maps from noise to large areas, some with ignored pixels, of 8 or 16 bits."""
    height, width, zoom = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([[0], [0, 1], [0, 7, 255], [255], [0, 300, 65535]]))
    small = rng.choice(values, (-(-height // zoom), -(-width // zoom)))
    found = small.repeat(zoom, 0).repeat(zoom, 1)[:height, :width]
    return found.astype(np.uint16 if max(values) > 255 else np.uint8)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Crop, int]:
    """A crop of an image scaled up or down, and the side it is padded to."""
    scaled = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    side = draw(st.integers(1, 60))
    height, width = min(side, scaled[0]), min(side, scaled[1])
    top, left = draw(st.integers(0, scaled[0] - height)), draw(st.integers(0, scaled[1] - width))
    return Crop(scaled[0], scaled[1], top, left, height, width), side


@given(label_maps(), windows())
@settings(max_examples=400, deadline=None)
def test_runs_give_what_pixels_give(label_map: npt.NDArray[Any], window: tuple[Crop, int]) -> None:
    crop, side = window
    ignore_index = 65535 if label_map.dtype == np.uint16 else 255
    cut = cut_labels(label_map, crop)
    labels = LabelRuns(label_map, ignore_index)
    expected = np.bincount(cut[cut != ignore_index].reshape(-1), minlength=ignore_index)
    for counts in (labels.counts(crop), labels.cut(crop, side).counts()):
        assert np.array_equal(np.pad(counts, (0, ignore_index - counts.size)), expected)
    record = encode_rle(pad_labels(cut, side, ignore_index), ignore_index)
    assert encode_runs(side, side, *labels.cut(crop, side)) == record


@given(label_maps(), windows())
@settings(max_examples=200, deadline=None)
def test_stored_runs_give_what_the_label_map_gives(label_map: npt.NDArray[Any], window: tuple[Crop, int]) -> None:
    crop, side = window
    ignore_index = 65535 if label_map.dtype == np.uint16 else 255
    record = encode_rle(label_map, ignore_index)
    header = decode_header(record)
    start, length, index = decode_runs(record, header)
    stored = LabelRuns.from_runs(start, length, header.labels[index], header.width, label_map.shape)
    given_map = LabelRuns(label_map, ignore_index)
    assert np.array_equal(np.trim_zeros(stored.counts(crop), "b"), np.trim_zeros(given_map.counts(crop), "b"))
    for one, other in zip(stored.cut(crop, side), given_map.cut(crop, side), strict=True):
        assert np.array_equal(one, other)
    runs = stored.cut(crop, side)
    cut = segment_map_from_runs(side, side, *runs, ignore_index)
    assert np.array_equal(cut, pad_labels(cut_labels(label_map, crop), side, ignore_index))


def test_padding_is_outside_what_crops_are_drawn_from() -> None:
    label_map = np.full((20, 30), 255, np.uint8)
    label_map[:12, :17] = np.random.default_rng(0).integers(0, 4, (12, 17))
    start, length, value = runs_of(label_map.reshape(-1))
    kept = value != 255
    found = LabelRuns.from_runs(start[kept], length[kept], value[kept], 30, (12, 17))
    assert (found.height, found.width) == (12, 17)
    crop = Crop(24, 34, 3, 5, 20, 20)
    for one, other in zip(found.cut(crop, 20), LabelRuns(label_map[:12, :17], 255).cut(crop, 20), strict=True):
        assert np.array_equal(one, other)


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    label_map = np.random.default_rng(0).integers(0, 3, (50, 20), np.uint8)
    crop = Crop(70, 30, 10, 2, 40, 20)
    whole = LabelRuns(label_map, 255).cut(crop, 40)
    monkeypatch.setattr(label_runs, "_STRIP", 60)
    for one, other in zip(LabelRuns(label_map, 255).cut(crop, 40), whole, strict=True):
        assert np.array_equal(one, other)


def test_runs_reach_the_largest_side() -> None:
    label_map = np.zeros((2, 16384), np.uint8)
    label_map[1, -1] = 5
    crop = Crop(2, 16384, 0, 0, 2, 16384)
    assert LabelRuns(label_map, 255).counts(crop).tolist() == [2 * 16384 - 1, 0, 0, 0, 0, 1]


@given(st.text("abcXYZ019_-~%.", min_size=1, max_size=100), st.binary(max_size=1500))
@settings(deadline=None)
def test_tar_headers_are_those_of_the_standard_library(name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    padding = bytes(-len(data) % 512)
    assert _member(name, data) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + data + padding


def test_a_name_too_long_for_a_header_is_refused() -> None:
    with pytest.raises(ValueError, match="legal: names of 100"):
        _member("x" * 101, b"")
