"""Verify a shard set: every byte against its hash, every sample by decoding it, all counts by recounting.

Memory is bounded by one piece and the largest sample, whatever the size of the shards. A shard whose size differs from
the manifest's is not read at all.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from shards.errors import MaskStreamError, StorageError
from shards.files.storage import Storage, open_storage
from shards.manifest import MANIFEST_NAME, Manifest, ShardInfo, SplitInfo, load_manifest, manifest_bytes
from shards.reader import load_index, parse_span
from shards.sample import CropSample

_END_OF_ARCHIVE = bytes(1024)
_PIECE = 8 << 20  # bytes per read


def verify(root: str | Path | Storage, progress: Callable[[str], object] = lambda shard: None) -> list[str]:
    """All problems found, each a sentence naming the file; an empty list means the set is intact.

    `progress` is called with the name of each shard once it has been read.
    """
    storage = open_storage(root)
    try:
        manifest = load_manifest(storage)
    except MaskStreamError as error:
        return [str(error)]
    problems = []
    if storage.read(MANIFEST_NAME) != manifest_bytes(manifest):
        problems.append(f"{storage.where(MANIFEST_NAME)} is not in canonical form: it was edited or damaged")
    problems += _unlisted_files(storage, manifest)
    for name in manifest.splits:
        problems += _verify_split(storage, manifest, name, progress)
    return problems


def _verify_split(storage: Storage, manifest: Manifest, name: str, progress: Callable[[str], object]) -> Iterator[str]:
    split = manifest.splits[name]
    try:
        index = load_index(storage, manifest, name)
    except MaskStreamError as error:
        yield str(error)
        return
    counts, most_pixels = _Counts(manifest.num_classes), manifest.most_pixels(name)
    first, sound = 0, True
    for shard in split.shards:
        entries = index[first : first + shard.samples]
        first += shard.samples
        parse = partial(parse_span, ignore_index=manifest.ignore_index, most_pixels=most_pixels)
        problems = list(_verify_shard(storage, shard, entries, parse, counts))
        yield from problems
        sound = sound and not problems
        progress(shard.name)
    if sound:
        yield from counts.compare(split, f"{storage.where(MANIFEST_NAME)}, split {name!r}")


def _verify_shard(storage: Storage, shard: ShardInfo, entries: np.ndarray, parse: Callable[[bytes, str], CropSample],
                  counts: _Counts) -> Iterator[str]:
    path = storage.where(shard.name)
    try:
        size = storage.size(shard.name)
        if size != shard.bytes:
            yield f"{path} has {size} bytes, the manifest says {shard.bytes}"
            return
        content = _Pass(storage, shard)
        yield from _verify_samples(content, entries, path, parse, counts)
        if content.sha256() != shard.sha256:
            yield f"{path} does not match its sha256 in the manifest"
    except (OSError, MaskStreamError) as error:
        yield f"{path} cannot be read: {error}"


def _verify_samples(content: _Pass, entries: np.ndarray, path: str, parse: Callable[[bytes, str], CropSample],
                    counts: _Counts) -> Iterator[str]:
    for number, (offset, length, crc32) in enumerate(entries.tolist()):
        where = f"{path}, sample {number} (offset {offset})"
        if offset != content.position:
            yield f"{where}: the index has a gap or an overlap at byte {content.position}"
            if offset < content.position:
                continue  # already past its bytes
            content.skip(offset - content.position)
        span = content.take(length)
        if zlib.crc32(span) != crc32:
            yield f"{where}: CRC-32 differs from the index"
            continue
        try:
            sample = parse(span, where)
            counts.add(sample.key, sample.segment_map, sample.labels)
            assert sample.image.shape[:2] == sample.segment_map.shape
        except (MaskStreamError, ValueError) as error:
            yield f"{where}: {error}"
    if content.left != len(_END_OF_ARCHIVE) or content.take(content.left) != _END_OF_ARCHIVE:
        yield f"{path}: the end-of-archive blocks are damaged, or there is data that the index does not list"


class _Pass:
    """One sequential pass over a shard, in pieces, hashing it on the way."""

    def __init__(self, storage: Storage, shard: ShardInfo) -> None:
        self.storage, self.shard, self.position = storage, shard, 0
        self._hash = hashlib.sha256()
        self._piece = memoryview(b"")  # read ahead, not yet returned

    @property
    def left(self) -> int:
        """Bytes from the current position to the end."""
        return self.shard.bytes - self.position

    def take(self, length: int) -> bytes:
        """The next bytes; fewer at the end. Raises as `Storage.read`."""
        parts = []
        while length and self.left:
            part = self._next(length)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def skip(self, length: int) -> None:
        """Skip bytes; they are still hashed."""
        while length and self.left:
            length -= len(self._next(length))

    def sha256(self) -> str:
        """Hash of the whole shard; reads it to its end."""
        self.skip(self.left)
        return self._hash.hexdigest()

    def _next(self, most: int) -> memoryview:
        if not self._piece:
            self._piece = memoryview(self.storage.read(self.shard.name, self.position, min(_PIECE, self.left)))
            if not self._piece:
                raise StorageError(f"it ends after {self.position} of {self.shard.bytes} bytes")
            self._hash.update(self._piece)
        part, self._piece = self._piece[:most], self._piece[most:]
        self.position += len(part)
        return part


def _unlisted_files(storage: Storage, manifest: Manifest) -> list[str]:
    listed = {shard.name for split in manifest.splits.values() for shard in split.shards}
    return [
        f"{storage.where(name)} is not in the manifest: a leftover of an interrupted run? Remove it"
        for name in sorted(storage.sizes() or ())
        if name.endswith((".tar", ".tmp")) and name not in listed
    ]


class _Counts:
    """Recounts the class statistics of the manifest, and checks that keys are unique."""

    def __init__(self, num_classes: int) -> None:
        self.pixels, self.samples = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self.ignored = 0
        self.keys: Counter[str] = Counter()

    def add(self, key: str, segment_map: np.ndarray, labels: np.ndarray) -> None:
        self.keys[key] += 1
        if labels.size and labels.max() >= self.pixels.size:
            raise ValueError(f"label {labels.max()}, legal: 0..{self.pixels.size - 1}")
        area = np.bincount(segment_map.reshape(-1), minlength=labels.size)[: labels.size]
        self.pixels[labels] += area
        self.samples[labels] += 1
        self.ignored += segment_map.size - int(area.sum())

    def compare(self, split: SplitInfo, where: str) -> Iterator[str]:
        for key in (key for key, count in self.keys.items() if count > 1):
            yield f"{where}: the key {key!r} occurs {self.keys[key]} times"
        if self.pixels.tolist() != split.class_pixels or self.samples.tolist() != split.class_samples:
            yield f"{where}: class counts differ from the samples"
        if self.ignored != split.ignored_pixels:
            yield f"{where}: ignored_pixels is {split.ignored_pixels}, the samples have {self.ignored}"
