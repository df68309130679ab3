"""Verify a shard set: every byte against its hash, every sample by decoding it, all counts by recounting.

`shards.recount` says what can be recounted, and what only the dataset could show.

Shards are checked one by one, in several processes; memory is bounded by one piece and the largest sample in each, and
16 bytes per sample: for finding keys that occur twice, and for counting the images of crops. A shard whose size differs
from the manifest's is not read at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import zlib
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.errors import MaskStreamError, StorageError
from shards.files.storage import Storage, open_storage
from shards.manifest import MANIFEST_NAME, FileInfo, Manifest, ShardInfo, SplitInfo, load_manifest, manifest_bytes
from shards.reader import parse_span
from shards.recount import Expected, Recount, inconsistencies
from shards.sample import CropSample
from shards.sampling import ClassLists
from shards.shard_table import SampleIndex, ShardTable
from shards.workers import exit_with_parent, use_own_temporary_folder

_END_OF_ARCHIVE = bytes(1024)
_PIECE = 8 << 20  # bytes per read
_QUEUED = 4  # shards handed to each process


def verify(root: str | Path | Storage, progress: Callable[[str], object] = lambda shard: None, *, deep: bool = True,
           workers: int = 1) -> list[str]:
    """All problems found, each a sentence naming the file; an empty list means the set is intact.

    `progress` is called with the name of each shard once it has been read. Without `deep`, shards are compared with
    their hashes only, and no sample is decoded.
    """
    storage = open_storage(root)
    try:
        manifest = load_manifest(storage)
    except MaskStreamError as error:
        return [str(error)]
    problems = []
    if storage.read(MANIFEST_NAME) != manifest_bytes(manifest):
        problems.append(f"{storage.where(MANIFEST_NAME)} is not in canonical form: it was edited or damaged")
    if manifest.config.get("crops", manifest.crops) != manifest.crops:
        problems.append(f"{storage.where(MANIFEST_NAME)}: crops differs from config.crops")
    listed: set[str] | None = set()  # None: a table is damaged, so nobody knows what is listed
    for name, split in manifest.splits.items():
        try:
            table = ShardTable.load(storage, name, split)
        except MaskStreamError as error:
            problems.append(str(error))
            listed = None
            continue
        if listed is not None:
            listed.update(shard.name for shard in table)
        problems += _verify_files(storage, split.files)
        problems += _verify_split(_Facts(storage, manifest, name, table, deep), progress, workers)
    return [*problems, *(_unlisted_files(storage, listed) if listed is not None else ())]


class _Facts(NamedTuple):
    """What checking a split takes; sent to the processes."""

    storage: Storage
    manifest: Manifest
    name: str
    table: ShardTable
    deep: bool

    @property
    def split(self) -> SplitInfo:
        return self.manifest.splits[self.name]

    @property
    def expected(self) -> Expected:
        return Expected.of(self.manifest, self.name)


@dataclass
class _Report:
    """What was found in a shard: problems, and counts of its samples."""

    shard: int
    counts: Recount
    problems: list[str] = field(default_factory=list)
    contradiction: str | None = None  # of the first sample that is not what the manifest says, though it is intact


def _verify_split(facts: _Facts, progress: Callable[[str], object], workers: int) -> Iterator[str]:
    where = f"{facts.storage.where(MANIFEST_NAME)}, split {facts.name!r}"
    yield from inconsistencies(facts.manifest, facts.name, facts.table, where)
    whole, sound, lists = Recount.start(facts.expected), True, None
    if facts.split.classes is not None and facts.deep:
        try:
            lists = ClassLists.load(facts.storage, facts.split)
        except MaskStreamError as error:
            yield str(error)
    order: list[tuple[int, int]] = []  # (shard, samples) in the order of `whole.keys`
    for report in _reports(facts, workers):
        yield from report.problems
        if report.contradiction is not None:
            yield report.contradiction
        sound = sound and not report.problems
        if lists is not None and not report.problems:
            yield from _other_classes(lists, report, facts)
        whole.merge(report.counts)
        order.append((report.shard, len(report.counts.keys)))
        progress(facts.table.name(report.shard))
    if sound and facts.deep:
        yield from whole.differences(facts.split, where)
        yield from _repeated(facts, whole.keys, order, where)


def _other_classes(lists: ClassLists, report: _Report, facts: _Facts) -> Iterator[str]:
    """The first sample of an intact shard whose list of classes is not that of its labels."""
    first, last = (int(number) for number in facts.table.first_sample[report.shard : report.shard + 2])
    found, said = ClassLists.of([labels.tolist() for labels in report.counts.labels]), lists.part(first, last)
    if found.tobytes() != said.tobytes():
        number = next(number for number, labels in enumerate(report.counts.labels)
                      if said.part(number, number + 1).ids.tolist() != labels.tolist())
        assert facts.split.classes is not None
        yield (f"{facts.storage.where(facts.split.classes.name)}: the classes of sample {number} of "
               f"{facts.table.name(report.shard)} are {said.part(number, number + 1).ids.tolist()}, its labels are "
               f"{report.counts.labels[number].tolist()}")


def _reports(facts: _Facts, workers: int) -> Iterator[_Report]:
    """The reports of all shards, in any order."""
    if workers == 1 or len(facts.table) == 1:
        yield from (_verify_shard(facts, shard) for shard in range(len(facts.table)))
        return
    use_own_temporary_folder()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(facts.table)), context, _start, (facts,)) as pool:
        left, running = iter(range(len(facts.table))), set[Future[_Report]]()
        try:
            while True:
                while len(running) < _QUEUED * workers and (shard := next(left, None)) is not None:
                    running.add(pool.submit(_verify_numbered, shard))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise StorageError("a process that checked shards died (killed, or out of memory): try again, with fewer "
                               "--workers if memory ran out") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_facts: _Facts


def _start(facts: _Facts) -> None:
    global _facts
    _facts = facts
    exit_with_parent()


def _verify_numbered(shard: int) -> _Report:
    return _verify_shard(_facts, shard)


def _verify_shard(facts: _Facts, number: int) -> _Report:
    storage, table, report = facts.storage, facts.table, _Report(number, Recount.start(facts.expected))
    name = table.name(number)
    path = storage.where(name)
    try:
        size, expected = storage.size(name), table.bytes(number)
        if size != expected:
            report.problems.append(f"{path} has {size} bytes, the manifest says {expected}")
            return report
        content = _Pass(storage, ShardInfo(name=name, bytes=expected, sha256=table.sha256(number), samples=0))
        if facts.deep:
            entries = SampleIndex(storage, table, facts.split.index).entries(number)
            if facts.split.table is not None and zlib.crc32(entries.tobytes()) != table.index_crc32(number):
                report.problems.append(f"{path}: its part of the index does not match its CRC-32 in the table")
            parse = partial(parse_span, ignore_index=facts.manifest.ignore_index,
                            most_pixels=facts.manifest.most_pixels(facts.name))
            report.problems += _verify_samples(content, entries, path, parse, report, facts)
        if content.sha256() != table.sha256(number):
            report.problems.append(f"{path} does not match its sha256 in the manifest")
    except (OSError, MaskStreamError) as error:
        report.problems.append(f"{path} cannot be read: {error}")
    return report


def _verify_samples(content: _Pass, entries: np.ndarray, path: str, parse: Callable[[bytes, str], CropSample],
                    report: _Report, facts: _Facts) -> Iterator[str]:
    expected, shard = facts.expected, facts.table.number(report.shard)
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
            report.counts.add(sample, expected)
            assert sample.image.shape[:2] == sample.segment_map.shape
            if report.contradiction is None and (found := expected.contradiction(sample, shard)):
                report.contradiction = f"{where}: {found}"
        except (MaskStreamError, ValueError) as error:
            yield f"{where}: {error}"
    if content.left != len(_END_OF_ARCHIVE) or content.take(content.left) != _END_OF_ARCHIVE:
        yield f"{path}: the end-of-archive blocks are damaged, or there is data that the index does not list"


class _Pass:
    """One sequential pass over a shard, in pieces, hashing it on the way."""

    def __init__(self, storage: Storage, shard: ShardInfo | FileInfo) -> None:
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


def _verify_files(storage: Storage, files: list[FileInfo]) -> Iterator[str]:
    """Table, index and sources: whole, against their hashes."""
    for file in files:
        path = storage.where(file.name)
        try:
            if storage.size(file.name) != file.bytes or _Pass(storage, file).sha256() != file.sha256:
                yield f"{path} does not match its size or sha256 in the manifest"
        except (OSError, MaskStreamError) as error:
            yield f"{path} cannot be read: {error}"


def _unlisted_files(storage: Storage, listed: set[str]) -> list[str]:
    return [
        f"{storage.where(name)} is not in the manifest: a leftover of an interrupted run? Remove it"
        for name in sorted(storage.sizes() or ())
        if name.endswith((".tar", ".tmp")) and name not in listed
    ]


def _repeated(facts: _Facts, keys: array[int], order: list[tuple[int, int]], where: str) -> Iterator[str]:
    """Keys that occur more than once: found by their hashes, then read again to name them."""
    hashes = np.frombuffer(keys, np.uint64)
    places = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(hashes[places[1:]] == hashes[places[:-1]])
    ends = np.cumsum([samples for _, samples in order])
    counts: dict[str, int] = {}
    for place in np.unique(places[np.concatenate((twice, twice + 1))]).tolist():
        turn = int(np.searchsorted(ends, place, side="right"))
        shard, samples = order[turn]
        with contextlib.suppress(MaskStreamError):
            key = _key_of(facts, shard, place - int(ends[turn]) + samples)
            counts[key] = counts.get(key, 0) + 1
    for key, count in sorted(counts.items()):
        if count > 1:  # 1: another key with the same hash
            yield f"{where}: the key {key!r} occurs {count} times"


def _key_of(facts: _Facts, shard: int, number: int) -> str:
    entry = SampleIndex(facts.storage, facts.table, facts.split.index).entries(shard)[number]
    name = facts.table.name(shard)
    return parse_span(facts.storage.read(name, int(entry["offset"]), int(entry["length"])), name).key
