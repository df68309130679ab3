"""Convert masks to and from COCO RLE: column-major run lengths, as read and written by pycocotools.

COCO counts alternate background and foreground pixels down the columns, starting with background. The
compressed string codes count k as a signed difference to count k-2 (from the fourth count on), in
little-endian groups of 5 bits plus a continuation bit, each shifted into printable ASCII by 48.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptShardError
from shards.rle import MAX_CLASSES, MAX_SIDE, MaskRecord, decode_segment_map, encode_rle, ignore_value

_ASCII_OFFSET = 48


def to_coco_rle(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One `{"category_id", "size": [H,W], "counts": bytes}` per class of a mask record, in label order."""
    segment_map, labels = decode_segment_map(record)
    height, width = segment_map.shape
    columns = segment_map.T.reshape(-1)
    changes = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    start = np.concatenate(([0], changes))
    end = np.concatenate((changes, [columns.size]))
    value = columns[start]
    coded = []
    for index, label in enumerate(labels.tolist()):
        mine = value == index
        edges = np.stack((start[mine], end[mine]), axis=1).reshape(-1)
        counts = np.diff(np.concatenate(([0], edges, [columns.size])))
        counts = counts[:-1] if counts[-1] == 0 else counts  # no empty trailing background, like pycocotools
        coded.append({"category_id": label, "size": [height, width], "counts": compress_counts(counts.tolist())})
    return coded


def from_coco_rle(rles: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None) -> MaskRecord:
    """Mask record from disjoint COCO RLEs with `category_id`; `counts` may be bytes, str or a list.

    `size` (H,W) is needed only when `rles` is empty. Raises CorruptShardError on differing sizes, counts that exceed
    the map, repeated categories or overlapping masks.
    """
    if not rles and size is None:
        raise CorruptShardError("no COCO mask and no size given")
    height, width = size if size is not None else _size_of(rles[0])
    labels = [rle.get("category_id") for rle in rles]
    if not _integers(labels, 0, MAX_CLASSES - 1):
        raise CorruptShardError(f"COCO category_id values are {labels}, legal: integers from 0 to {MAX_CLASSES - 1}")
    if len(set(labels)) != len(rles):
        raise CorruptShardError("two COCO masks have the same category_id; merge them first")
    label_map = np.full(height * width, 65535, np.uint16)
    for rle in rles:
        if _size_of(rle) != (height, width):
            raise CorruptShardError(f"COCO mask has size {_size_of(rle)}, expected {(height, width)}")
        inside = _foreground(rle.get("counts"), height * width)
        if (label_map[inside] != 65535).any():
            raise CorruptShardError(f"COCO mask of category {rle['category_id']} overlaps another")
        label_map[inside] = rle["category_id"]
    return encode_rle(np.ascontiguousarray(label_map.reshape(width, height).T), ignore_value(65535))


def rle_mask(rle: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """The mask [H, W] of one COCO RLE, compressed or not. Raises CorruptShardError as `from_coco_rle`."""
    height, width = _size_of(rle)
    return np.ascontiguousarray(_foreground(rle.get("counts"), height * width).reshape(width, height).T)


def compress_counts(counts: Sequence[int]) -> bytes:
    """COCO's printable string of run lengths."""
    text = bytearray()
    for position, count in enumerate(counts):
        rest = count - counts[position - 2] if position > 2 else count
        more = True
        while more:
            group = rest & 0x1F
            rest >>= 5  # arithmetic shift: keeps the sign
            more = rest != (-1 if group & 0x10 else 0)
            text.append((group | (0x20 if more else 0)) + _ASCII_OFFSET)
    return bytes(text)


def expand_counts(text: bytes | str) -> list[int]:
    """Inverse of `compress_counts`. Raises CorruptShardError on bytes outside the alphabet or a truncated string."""
    counts: list[int] = []
    value, shift = 0, 0
    for byte in text.encode("latin-1", "replace") if isinstance(text, str) else text:
        group = byte - _ASCII_OFFSET
        if not 0 <= group < 64 or shift > 35:
            raise CorruptShardError(f"COCO counts contain the illegal byte {byte}")
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        value -= (1 << shift) if group & 0x10 else 0
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise CorruptShardError("COCO counts end inside a number")
    return counts


def _size_of(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not _integers(size, 1, MAX_SIDE):
        raise CorruptShardError(f"COCO mask has size {size}, legal: [height, width], 1 to {MAX_SIDE} pixels each")
    return int(size[0]), int(size[1])


def _foreground(counts: Any, pixels: int) -> npt.NDArray[np.bool_]:
    """Flat column-major mask of one RLE."""
    values = expand_counts(counts) if isinstance(counts, bytes | str) else counts
    if not isinstance(values, list | tuple) or not _integers(values, 0, pixels):
        raise CorruptShardError(f"COCO counts must be a string or a list of integers from 0 to {pixels} pixels")
    lengths = np.asarray(values, np.int64)
    if lengths.sum() > pixels:
        raise CorruptShardError(f"COCO counts do not fit {pixels} pixels")
    lengths = np.concatenate((lengths, [pixels - lengths.sum()])) if lengths.sum() < pixels else lengths
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths)


def _integers(values: Sequence[Any], low: int, high: int) -> bool:
    """Whether all are integers (Python's or numpy's) from `low` to `high`."""
    return all(isinstance(value, int | np.integer) and low <= value <= high for value in values)
