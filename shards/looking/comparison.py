"""Compare two shard sets: first what their manifests say, then their samples.

Samples are read only where needed. Shards of equal sha256 are equal. Of the rest, the indexes are compared: a sample
whose length and CRC-32 also occur in the other set is taken for the same one (its bytes include its key). What remains
is read whole, in both sets, and compared by key; of it only digests are kept, 52 bytes per sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.files.storage import Storage
from shards.looking.selection import read_in_order
from shards.manifest import INDEX_DTYPE, ClassInfo, Manifest, ShardInfo
from shards.reader import ShardReader
from shards.rle import decode_runs
from shards.sample import CropSample
from shards.shard_table import SampleIndex, ShardTable

_DIGEST = np.dtype("S16")
_READ_DTYPE = np.dtype([("key", _DIGEST), ("image", _DIGEST), ("masks", _DIGEST), ("number", "<u4")])
_ABSENT = object()
Numbers = npt.NDArray[np.int64]


class Change(NamedTuple):
    """A value that differs; None where a set has none."""

    what: str
    ours: Any
    theirs: Any


def setting_changes(ours: Manifest, theirs: Manifest) -> Iterator[Change]:
    """Settings and provenance that differ, by dotted name: of `config` and `crops`, and seed, layout and encoders."""
    repeated = "crops" in ours.config and "crops" in theirs.config
    for name in ("dataset", "format_version", "seed", "ignore_index", "crops", "config", "producer"):
        if name != "crops" or not repeated:
            yield from _changes(name, getattr(ours, name), getattr(theirs, name))
    blocks = Counter(ours.sources.items())  # of version 1
    blocks.subtract(theirs.sources.items())
    if different := len({block for (block, _), count in blocks.items() if count}):
        yield Change(f"source files ({different} blocks differ)", f"{len(ours.sources)} blocks",
                     f"{len(theirs.sources)} blocks")
    for name in sorted(ours.splits.keys() & theirs.splits.keys()):
        hashes = [None if info.sources is None else info.sources.sha256 for info in
                  (ours.splits[name], theirs.splits[name])]
        if hashes[0] != hashes[1]:
            yield Change(f"source files of {name}", *(found and found[:12] for found in hashes))


def other_changes(ours: Manifest, theirs: Manifest) -> list[str]:
    """Names of the manifests' fields that differ, for what nothing else here tells apart."""
    names = [field.name for field in dataclasses.fields(Manifest)]
    return [name for name in names if getattr(ours, name) != getattr(theirs, name)]


def class_changes(ours: Sequence[ClassInfo], theirs: Sequence[ClassInfo]) -> Iterator[str]:
    """Sentences about classes: renamed, moved to another id, added, removed, recoloured."""
    old, new = ({info.name: number for number, info in enumerate(classes)} for classes in (ours, theirs))
    renamed = _renamed(ours, theirs)
    for number, info in enumerate(ours):
        if number in renamed:
            yield f"class {number} {info.name!r} is renamed to {theirs[number].name!r}"
        elif info.name not in new:
            yield f"class {number} {info.name!r} is only in A"
        elif new[info.name] != number:
            yield f"class {info.name!r} has id {number} in A, {new[info.name]} in B"
    for number, info in enumerate(theirs):
        if number not in renamed and info.name not in old:
            yield f"class {number} {info.name!r} is only in B"
    for info in ours:
        other = theirs[new[info.name]] if info.name in new else info
        if other.color != info.color:
            yield f"class {info.name!r} has colour {_code(info)} in A, {_code(other)} in B"


def _renamed(ours: Sequence[ClassInfo], theirs: Sequence[ClassInfo]) -> set[int]:
    """Ids whose names differ, and each name is in one set only."""
    old, new = ({info.name for info in classes} for classes in (ours, theirs))
    return {number for number, (one, other) in enumerate(zip(ours, theirs, strict=False))
            if one.name not in new and other.name not in old}


def count_changes(ours: Manifest, theirs: Manifest, split: str) -> Iterator[Change]:
    """Counts of a split that differ: as a whole, then per class, by name; those of the largest difference first."""
    one, other = ours.splits[split], theirs.splits[split]
    for name in ("kind", "images", "samples", "labelled_pixels", "ignored_pixels"):
        yield from _changes(name, getattr(one, name), getattr(other, name))
    skipped = [(sum(info.skipped_crops.values()), len(info.skipped_images)) for info in (one, other)]
    yield from _changes("skipped crops and images", *skipped)
    names = [[info.name for info in manifest.classes] for manifest in (ours, theirs)]
    for number in _renamed(ours.classes, theirs.classes):
        names[1][number] = names[0][number]
    counts = [dict(zip(known, zip(part.class_pixels, part.class_samples, strict=True), strict=True))
              for known, part in zip(names, (one, other), strict=True)]
    found = [(counts[0].get(name, (0, 0)), counts[1].get(name, (0, 0)), name) for name in counts[0] | counts[1]]
    for (pixels, samples), (their_pixels, their_samples), name in sorted(
            found, key=lambda item: (-abs(item[0][0] - item[1][0]), -abs(item[0][1] - item[1][1]), item[2])):
        if (pixels, samples) != (their_pixels, their_samples):
            yield Change(name, f"{pixels} pixels in {samples} samples", f"{their_pixels} in {their_samples}")


@dataclass(frozen=True, kw_only=True)
class SampleChanges:
    """Numbers of the samples of a split that differ; those of A where a sample is in both. Ascending."""

    only_ours: Numbers
    only_theirs: Numbers
    image: Numbers  # other image bytes
    masks: Numbers  # another size or other masks, by class id; may also be in `image`
    record: Numbers  # the same image and masks, other provenance or encoding
    is_reordered: bool  # the samples that are the same are stored in another order
    skipped: int  # samples of A that were not read
    read: int  # samples read, of both sets

    @property
    def is_empty(self) -> bool:
        """Whether the samples and their order are the same."""
        parts = (self.only_ours, self.only_theirs, self.image, self.masks, self.record)
        return not self.is_reordered and not any(part.size for part in parts)


class SplitComparison:
    """The samples of one split in two sets."""

    def __init__(self, ours: tuple[Storage, Manifest], theirs: tuple[Storage, Manifest], split: str) -> None:
        self.split, self._sets = split, (ours, theirs)
        self._tables = [ShardTable.load(storage, split, manifest.split(split)) for storage, manifest in self._sets]
        self.shards = [list(table) for table in self._tables]
        self._are_equal = [(shard.sha256, shard.samples) for shard in self.shards[0]] == [
            (shard.sha256, shard.samples) for shard in self.shards[1]]
        self.unmatched: tuple[Numbers, Numbers] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._is_reordered = False
        if not self._are_equal:
            self._match()

    def compare(self, progress: Callable[[], object] = lambda: None) -> SampleChanges:
        """Read the unmatched samples of both sets; `progress` is called for each. Raises as `ShardReader.read`."""
        ours, theirs = (self._read(place, numbers, progress)
                        for place, numbers in zip(self._sets, self.unmatched, strict=True))
        _, mine, yours = np.intersect1d(_with_repeats(ours["key"]), _with_repeats(theirs["key"]), assume_unique=True,
                                        return_indices=True)
        pairs, other = ours[mine], theirs[yours]
        image, masks = (pairs[part] != other[part] for part in ("image", "masks"))
        alone = [np.delete(table["number"], used) for table, used in ((ours, mine), (theirs, yours))]
        order = np.argsort(pairs["number"])
        return SampleChanges(
            only_ours=np.sort(alone[0]).astype(np.int64), only_theirs=np.sort(alone[1]).astype(np.int64),
            image=_numbers(pairs, image), masks=_numbers(pairs, masks), record=_numbers(pairs, ~(image | masks)),
            is_reordered=self._is_reordered or bool((np.diff(other["number"][order].astype(np.int64)) < 0).any()),
            skipped=self._sets[0][1].split(self.split).samples - len(ours), read=len(ours) + len(theirs))

    def keys(self, which: int, numbers: Numbers) -> Iterator[str]:
        """Keys of samples of set 0 or 1, which are read again."""
        storage, manifest = self._sets[which]
        reader = ShardReader(storage, self.split, manifest)
        for _, sample in read_in_order(reader, numbers.tolist()):
            yield sample.key
        reader.close()

    def _match(self) -> None:
        """Find the samples that have no counterpart of equal length and CRC-32, leaving out equal shards."""
        indexes = [self._index(which) for which in (0, 1)]
        common = Counter(shard.sha256 for shard in self.shards[0]) & Counter(shard.sha256 for shard in self.shards[1])
        rest = [_outside(part, common) for part in self.shards]
        prints = [(index["length"].astype(np.uint64) << np.uint64(32)) | index["crc32"] for index in indexes]
        partners = [_with_repeats(part[numbers]) for part, numbers in zip(prints, rest, strict=True)]
        left = [np.isin(mine, other, invert=True)
                for mine, other in (partners, partners[::-1])]
        self.unmatched = (rest[0][left[0]], rest[1][left[1]])
        kept = [np.delete(part, numbers) for part, numbers in zip(prints, self.unmatched, strict=True)]
        self._is_reordered = not np.array_equal(kept[0], kept[1])

    def _index(self, which: int) -> npt.NDArray[np.void]:
        """The whole index of set 0 or 1."""
        (storage, manifest), table = self._sets[which], self._tables[which]
        index = SampleIndex(storage, table, manifest.split(self.split).index)
        return np.concatenate([np.empty(0, INDEX_DTYPE), *(index.entries(shard) for shard in range(len(table)))])

    def _read(self, place: tuple[Storage, Manifest], numbers: Numbers, progress: Callable[[], object]
              ) -> npt.NDArray[np.void]:
        table = np.empty(len(numbers), _READ_DTYPE)
        if not numbers.size:
            return table
        reader = ShardReader(place[0], self.split, place[1])
        for row, (number, sample) in enumerate(read_in_order(reader, numbers.tolist())):
            try:
                table[row] = (*digests_of(sample), number)
            except ShardError as error:
                raise type(error)(f"{place[0].root}, split {self.split!r}, sample {number}: {error}") from error
            progress()
        reader.close()
        return table


def digests_of(sample: CropSample) -> tuple[bytes, bytes, bytes]:
    """16 bytes each for the key, the image file, and size and masks, however these are encoded.

    Digests never end in a zero byte, which numpy would drop.
    """
    header = sample.header
    runs = decode_runs(sample.record, header)
    masks = [np.array([header.height, header.width], np.int64), header.labels, header.run_counts, *runs]
    contents = (sample.key.encode(), sample.image_bytes, b"".join(part.tobytes() for part in masks))
    key, image, decoded = map(_digest, contents)
    return key, image, decoded


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:15] + b"."


def _outside(shards: Sequence[ShardInfo], common: Counter[str]) -> Numbers:
    """Numbers of the samples in shards that the other set does not have."""
    left, first, found = common.copy(), 0, [np.empty(0, np.int64)]
    for shard in shards:
        if left[shard.sha256]:
            left[shard.sha256] -= 1
        else:
            found.append(np.arange(first, first + shard.samples))
        first += shard.samples
    return np.concatenate(found)


def _with_repeats(values: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """Each value with the number of equal ones before it: then all differ, and the n-th of one set meets the n-th of
    the other."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.ones(len(values), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    places = np.arange(len(values))
    repeats = np.empty(len(values), np.int64)
    repeats[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    paired = np.empty(len(values), [("value", values.dtype), ("repeat", "<i8")])
    paired["value"], paired["repeat"] = values, repeats
    return paired


def _numbers(table: npt.NDArray[np.void], chosen: npt.NDArray[np.bool_]) -> Numbers:
    return np.sort(table["number"][chosen]).astype(np.int64)


def _changes(name: str, ours: Any, theirs: Any) -> Iterator[Change]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _changes(f"{name}.{key}", ours.get(key, _ABSENT), theirs.get(key, _ABSENT))
    elif ours is _ABSENT or theirs is _ABSENT or type(ours) is not type(theirs) or ours != theirs:
        yield Change(name, *(None if value is _ABSENT else value for value in (ours, theirs)))


def _code(info: ClassInfo) -> str:
    return f"#{bytes(info.color).hex()}"
