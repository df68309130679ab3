"""Sparse per-class run-length masks: a label map stored class by class and entropy-coded.

A mask record is a plain dict of msgpack types. `data` comes last, so that the header is readable without unpacking the
runs:

    height, width  int      1 .. 16384 pixels
    labels         [int]    class ids present, strictly ascending, 0 .. 65534
    runs           [int]    number of runs of each class, in the order of `labels`
    gap_bytes      int      1 .. 4, bytes per gap
    length_bytes   int      1 .. 4, bytes per length
    data           bytes    zlib of the byte planes below (empty when there is no run)

Runs are row-major over the flattened map and maximal. For run k of a class, `gap` is the number of
pixels since the end of the class's previous run (from pixel 0 for the first), `length` its pixels.
All gaps of all classes, then all lengths, are stored as byte planes, which deflate compresses better than interleaved
integers and numpy decodes without a loop:

    gap byte 0 of all R runs | gap byte 1 | ... | length byte 0 of all R runs | length byte 1 | ...

Pixels in no run are ignored. `benchmarks/codec.py` compares this layout with alternatives.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptShardError

MAX_SIDE = 16384  # pixels; keeps every offset within int32 and a uint8 map within 256 MiB
IGNORE_8_BIT, IGNORE_16_BIT = 255, 65535  # "ignored" in segment maps of uint8 and of wider types
MAX_CLASSES = IGNORE_16_BIT  # ids 0 .. 65534; 65535 is the ignore value of 16-bit maps
ZLIB_LEVEL = 6
_PIECE = 1 << 20  # pixels counted per step

IntArray = npt.NDArray[np.integer[Any]]
MaskRecord = dict[str, Any]


class MaskHeader(NamedTuple):
    """The fields of a mask record that are readable without its runs."""

    height: int
    width: int
    labels: npt.NDArray[np.int64]  # [N] ascending class ids
    run_counts: npt.NDArray[np.int64]  # [N]


class Runs(NamedTuple):
    """Runs in ascending pixel order; `label_index[k]` is the position of run k's class in the header's labels."""

    start: npt.NDArray[np.int64]  # [R]
    length: npt.NDArray[np.int64]  # [R]
    label_index: npt.NDArray[np.int64]  # [R]


def ignore_value(num_labels: int) -> int:
    """The 'ignored' value of a segment map of `num_labels` classes: 255 (uint8) or 65535 (uint16)."""
    return IGNORE_8_BIT if num_labels <= IGNORE_8_BIT else IGNORE_16_BIT


def count_values(label_map: IntArray, least: int = 0) -> npt.NDArray[np.int64]:
    """Occurrences of each value from 0 on, at least `least` counts: `np.bincount` without its 8 bytes per pixel."""
    flat = label_map.reshape(-1)
    counts = np.zeros(max(least, int(flat.max()) + 1), np.int64)
    for start in range(0, flat.size, _PIECE):
        counts += np.bincount(flat[start : start + _PIECE], minlength=counts.size)
    return counts


def encode_rle(label_map: IntArray, ignore_index: int = 255) -> MaskRecord:
    """Encode class ids `[H,W]` of any integer dtype; pixels equal to `ignore_index` are not stored.

    Raises ValueError when the map is not 2-D, too large, or holds an id outside 0..65534.
    """
    if label_map.ndim != 2 or not np.issubdtype(label_map.dtype, np.integer):
        raise ValueError(f"label map must be an integer array [H,W], got {label_map.dtype} {label_map.shape}")
    height, width = label_map.shape
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(f"label map is {height}x{width}, legal: 1 to {MAX_SIDE} pixels a side")
    start, length, value = runs_of(label_map.reshape(-1))
    kept = value != ignore_index
    return encode_runs(height, width, start[kept], length[kept], value[kept])


def encode_runs(height: int, width: int, start: npt.NDArray[np.int64], length: npt.NDArray[np.int64], value: IntArray
                ) -> MaskRecord:
    """Encode maximal runs of class ids `value`, in the order of pixels; pixels in no run are ignored.

    Raises ValueError for an id outside 0..65534.
    """
    if value.size and (value.min() < 0 or value.max() >= MAX_CLASSES):
        raise ValueError(f"class ids are {value.min()}..{value.max()}, legal: 0..{MAX_CLASSES - 1}")
    # Group by class, keep pixel order within a class. Of 16 bits, because numpy then uses radix sort.
    order = np.argsort(value.astype(np.uint16), kind="stable")
    start, length = start[order], length[order]
    counts = np.bincount(value)
    labels = np.flatnonzero(counts)
    run_counts = counts[labels]
    gap = start - _previous_end(start + length, run_counts)
    gap_bytes, length_bytes = _byte_width(gap), _byte_width(length)
    planes = _to_planes(gap, gap_bytes) + _to_planes(length, length_bytes)
    return {
        "height": int(height),
        "width": int(width),
        "labels": labels.tolist(),
        "runs": run_counts.tolist(),
        "gap_bytes": gap_bytes,
        "length_bytes": length_bytes,
        "data": zlib.compress(planes, ZLIB_LEVEL) if planes else b"",
    }


def decode_header(record: Mapping[str, Any]) -> MaskHeader:
    """Check and return all fields except the runs. Raises CorruptShardError naming the field."""
    height, width = (_integer(record, side, 1, MAX_SIDE) for side in ("height", "width"))
    labels = _integer_list(record, "labels", 0, MAX_CLASSES - 1)
    run_counts = _integer_list(record, "runs", 1, height * width)
    if labels.size != run_counts.size:
        raise CorruptShardError(f"mask has {labels.size} labels but {run_counts.size} run counts")
    if (np.diff(labels) <= 0).any():
        raise CorruptShardError("mask field 'labels' is not strictly ascending")
    if run_counts.sum() > height * width:
        raise CorruptShardError(f"mask declares {run_counts.sum()} runs for {height * width} pixels")
    return MaskHeader(height, width, labels, run_counts)


def decode_segment_map(record: Mapping[str, Any], header: MaskHeader | None = None) -> tuple[npt.NDArray[Any],
                                                                                            npt.NDArray[np.int64]]:
    """Decode to `(segment_map [H,W], labels [N] int64)`.

    A segment map holds, per pixel, the index into `labels`; ignored pixels hold 255. It is uint8 for up to 255 labels,
    else uint16 with 65535 for ignored. Raises CorruptShardError on any malformed record; memory is bounded by the
    declared size, which is checked. `header` is `decode_header(record)`, if already known.
    """
    if header is None:
        header = decode_header(record)
    return segment_map_from_runs(header.height, header.width, *decode_runs(record, header),
                                 ignore_value(header.labels.size)), header.labels


def segment_map_from_runs(height: int, width: int, start: npt.NDArray[np.int64], length: npt.NDArray[np.int64],
                          value: IntArray, ignored: int) -> npt.NDArray[Any]:
    """The map `[H,W]` with these disjoint runs, in the order of pixels, and `ignored` elsewhere; uint8 if `ignored` is
    255, else uint16."""
    end = start + length
    # Alternate the gap before each run with the run itself; zero-length gaps repeat nothing.
    repeats = np.empty(2 * start.size + 1, np.int64)
    repeats[1::2] = length
    repeats[0:-1:2] = start - np.concatenate(([0], end[:-1])) if start.size else start
    repeats[-1] = height * width - (end[-1] if end.size else 0)
    values = np.full(repeats.size, ignored, np.uint8 if ignored == IGNORE_8_BIT else np.uint16)
    values[1::2] = value
    return np.repeat(values, repeats).reshape(height, width)


def decode_masks(record: Mapping[str, Any]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Decode to the dense form `(masks [N,H,W] bool, labels [N] int64)`; one mask per class present."""
    segment_map, labels = decode_segment_map(record)
    return segment_map[None] == np.arange(labels.size, dtype=segment_map.dtype)[:, None, None], labels


def decode_runs(record: Mapping[str, Any], header: MaskHeader) -> Runs:
    """The runs of all classes in pixel order, checked to lie inside the map, be non-empty and not overlap."""
    total = int(header.run_counts.sum())
    gap_bytes, length_bytes = (_integer(record, name, 1, 4) for name in ("gap_bytes", "length_bytes"))
    planes = _inflate(record.get("data"), total * (gap_bytes + length_bytes))
    gap = _from_planes(planes[: total * gap_bytes], gap_bytes)
    length = _from_planes(planes[total * gap_bytes :], length_bytes)
    if not total:
        return Runs(gap, length, gap)
    first_run = np.cumsum(header.run_counts) - header.run_counts
    gap_is_legal = gap > 0
    gap_is_legal[first_run] = True  # only a class's first run may have gap 0; other runs would touch the previous one
    if not gap_is_legal.all() or not (length > 0).all():
        raise CorruptShardError("mask has an empty run or two touching runs of one class")
    step = gap + length
    travelled = np.cumsum(step)  # at most 2^28 runs of less than 2^33 pixels: fits int64
    end = travelled - np.repeat(travelled[first_run] - step[first_run], header.run_counts)
    start = end - length
    if end.max() > header.height * header.width:
        raise CorruptShardError(f"mask has a run that ends at pixel {end.max()} of {header.height * header.width}")
    index = np.repeat(np.arange(header.labels.size), header.run_counts)
    order = np.argsort(start, kind="stable")  # timsort merges the sorted runs of each class in a quarter of the time
    start, length, index, end = start[order], length[order], index[order], end[order]
    if (start[1:] < end[:-1]).any():
        raise CorruptShardError("mask has overlapping runs")
    return Runs(start, length, index)


def label_map_from_segments(segment_map: IntArray, labels: IntArray, ignore_index: int = 255) -> npt.NDArray[Any]:
    """Class ids `[H,W]`: uint8 if ids and `ignore_index` fit, else uint16.

    Raises ValueError when `ignore_index` is one of the labels, which would be ambiguous.
    """
    if not 0 <= ignore_index <= 65535:
        raise ValueError(f"ignore_index is {ignore_index}, legal: 0..65535")
    if ignore_index in labels:
        raise ValueError(f"ignore_index {ignore_index} is a class of this sample; choose another (65535 always works)")
    dtype = np.uint8 if max([ignore_index, *labels.tolist()]) <= 255 else np.uint16
    table = np.full(np.iinfo(segment_map.dtype).max + 1, ignore_index, dtype)
    table[: labels.size] = labels
    return table[segment_map]


def runs_of(flat: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], IntArray]:
    """Maximal runs of equal values in a flat array: (start, length, value)."""
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start = np.concatenate(([0], changes))
    length = np.diff(np.concatenate((start, [flat.size])))
    return start, length, flat[start]


def _previous_end(end: npt.NDArray[np.int64], run_counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """End of the previous run of the same class; 0 for a class's first run."""
    previous = np.concatenate(([0], end[:-1])) if end.size else end.copy()
    previous[np.cumsum(run_counts) - run_counts] = 0
    return previous


def _byte_width(values: npt.NDArray[np.int64]) -> int:
    return max(1, (int(values.max()).bit_length() + 7) // 8) if values.size else 1


def _to_planes(values: npt.NDArray[np.int64], width: int) -> bytes:
    return values.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width].T.tobytes()


def _from_planes(planes: bytes, width: int) -> npt.NDArray[np.int64]:
    """Inverse of `_to_planes`: plane p holds byte p of every value."""
    rows = np.frombuffer(planes, np.uint8).reshape(width, -1)
    values: npt.NDArray[np.int64] = rows[-1].astype(np.int64)
    for row in rows[-2::-1]:
        values <<= 8
        values |= row
    return values


def _inflate(data: Any, expected: int) -> bytes:
    """Inflate to exactly `expected` bytes; stops after one byte more, so zip bombs are harmless."""
    if not isinstance(data, bytes):
        raise CorruptShardError(f"mask field 'data' is {type(data).__name__}, expected bytes")
    if expected == 0:
        if data:
            raise CorruptShardError("mask declares no runs but carries data")
        return b""
    inflater = zlib.decompressobj()
    try:
        planes = inflater.decompress(data, expected + 1)
    except zlib.error as error:
        raise CorruptShardError(f"mask field 'data' cannot be inflated: {error}") from error
    if len(planes) != expected or not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
        raise CorruptShardError(f"mask field 'data' does not inflate to exactly {expected} bytes")
    return planes


def _integer(record: Mapping[str, Any], field: str, low: int, high: int) -> int:
    value = record.get(field)
    if type(value) is not int or not low <= value <= high:
        raise CorruptShardError(f"mask field {field!r} is {value!r}, legal: an integer from {low} to {high}")
    return value


def _integer_list(record: Mapping[str, Any], field: str, low: int, high: int) -> npt.NDArray[np.int64]:
    values = record.get(field)
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) > MAX_CLASSES:
        raise CorruptShardError(f"mask field {field!r} must be a list of at most {MAX_CLASSES} integers")
    if not all(type(value) is int and low <= value <= high for value in values):
        raise CorruptShardError(f"mask field {field!r} must hold integers from {low} to {high}")
    return np.asarray(values, np.int64)
