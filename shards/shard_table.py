"""What reading needs of a split's shards and of the index of its samples, shared by all loader processes.

The table of shards is read whole: 52 bytes a shard, and the order of training depends on all of them. A spawned process
does not receive it, but the descriptor of an anonymous file that holds it. The index, 16 bytes a sample, is read whole
where it is small, or where the set is of version 1; of a large set, each process reads the parts of the shards that it
reads, and keeps the last ones.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptShardError, ShardError
from shards.files.anonymous_file import write_anonymous_file
from shards.files.plain_file import LARGEST_PICTURE
from shards.files.storage import LARGEST_WHOLE, READS_OF_DAMAGED, Storage, read_checked
from shards.manifest import INDEX_DTYPE, MIN_SAMPLE_BYTES, SHARD_DTYPE, FileInfo, ShardInfo, SplitInfo

WHOLE_INDEX = 64 << 20  # bytes; a larger index is read in parts
_PARTS_KEPT = 1024  # per process: parts of the index, of one shard each
_ALIGNMENT = 64  # bytes between the starts of arrays
Array = npt.NDArray[Any]


class ShardTable:
    """Names, sizes, hashes and sample ranges of a split's shards, in order. Read-only."""

    def __init__(self, split: str, records: Array, first_sample: Array, names: Array, index: Array) -> None:
        self.split = split
        self._arrays = (records, first_sample, names, index)  # the last two may be empty
        self._descriptor: int | None = None  # of the file that holds the arrays, once they are shared

    @classmethod
    def load(cls, storage: Storage, split: str, info: SplitInfo) -> ShardTable:
        """Read and check the table, and the index if that is to be read whole.

        Raises CorruptShardError when one does not match the manifest or its own limits, ShardError when it cannot be
        read.
        """
        records, names = _records(storage, info)
        first_sample = np.concatenate(([0], np.cumsum(records["samples"], dtype=np.int64)))
        if first_sample[-1] != info.samples or int(records["bytes"].sum(dtype=np.uint64)) != info.bytes:
            raise CorruptShardError(f"{_where(storage, info)}: the shards hold {first_sample[-1]} samples, the "
                                    f"manifest says {info.samples}; or their bytes do not add up to {info.bytes}")
        index = np.empty(0, INDEX_DTYPE)
        if info.table is None or info.index.bytes <= WHOLE_INDEX:
            index = read_records(storage, info.index, INDEX_DTYPE, "index")
            check_entries(index, np.repeat(records["bytes"], records["samples"]), storage.where(info.index.name))
        return cls(split, records, first_sample, names, index)

    def __len__(self) -> int:
        return len(self._arrays[0])

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """Samples of each shard."""
        found: npt.NDArray[np.int64] = self._arrays[0]["samples"].astype(np.int64)
        return found

    @property
    def first_sample(self) -> Array:
        """Number of the first sample of each shard, and the number of samples."""
        return self._arrays[1]

    @property
    def index(self) -> Array | None:
        """The `INDEX_DTYPE` records of all samples; None if the index is to be read in parts."""
        return self._arrays[3] if len(self._arrays[3]) else None

    def name(self, shard: int) -> str:
        """File name of a shard."""
        names = self._arrays[2]
        if len(names):
            return bytes(names[shard]).decode()
        return f"{self.split}-{self._arrays[0]['number'][shard]:06d}.tar"

    def number(self, shard: int) -> int:
        """The number in a shard's name."""
        if len(self._arrays[2]):
            digits = self.name(shard).removesuffix(".tar").rpartition("-")[2]
            return int(digits) if digits.isdecimal() else shard
        return int(self._arrays[0]["number"][shard])

    def sha256(self, shard: int) -> str:
        """Hash of a shard."""
        return str(self._arrays[0]["sha256"][shard].tobytes().hex())

    def bytes(self, shard: int) -> int:
        """Size of a shard."""
        return int(self._arrays[0]["bytes"][shard])

    def index_crc32(self, shard: int) -> int:
        """CRC-32 of a shard's part of the index; only in tables of version 2."""
        return int(self._arrays[0]["index_crc32"][shard])

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1

    def __iter__(self) -> Iterator[ShardInfo]:
        return (ShardInfo(name=self.name(shard), bytes=self.bytes(shard), sha256=self.sha256(shard),
                          samples=int(self._arrays[0]["samples"][shard])) for shard in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        starts_process = get_spawning_popen() is not None  # descriptors can only be passed while spawning
        descriptor = self._shared_file() if starts_process else None
        if descriptor is None:
            return ShardTable, (self.split, *self._arrays)
        return _from_file, (self.split, [(array.dtype, len(array)) for array in self._arrays], DupFd(descriptor))

    def __del__(self) -> None:
        if (descriptor := self.__dict__.get("_descriptor")) is not None:
            os.close(descriptor)

    def _shared_file(self) -> int | None:
        """Move the arrays, also this process's, into a file. None if that is impossible (`ulimit -f`, a sandbox)."""
        if self._descriptor is None:
            pieces: list[memoryview | bytes] = []
            for array in self._arrays:
                pieces += [np.ascontiguousarray(array).view(np.uint8).data, bytes(-array.nbytes % _ALIGNMENT)]
            try:
                self._descriptor = write_anonymous_file("maskstream-shards", pieces)
                self._arrays = _map(self._descriptor, [(array.dtype, len(array)) for array in self._arrays])
            except OSError:
                return None
        return self._descriptor


class SampleIndex:
    """Offset, length and CRC-32 of samples: from the whole index, or read shard by shard. Thread-safe."""

    def __init__(self, storage: Storage, table: ShardTable, info: FileInfo) -> None:
        self.storage, self.table, self.info = storage, table, info
        self._part = functools.lru_cache(maxsize=_PARTS_KEPT)(self._read_part)

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIndex, (self.storage, self.table, self.info)

    def entry(self, sample: int) -> tuple[int, int, int, int]:
        """(shard, offset, length, CRC-32) of a sample. Raises CorruptShardError, StorageError."""
        shard = self.table.shard_of(sample)
        whole = self.table.index
        record = whole[sample] if whole is not None else self._part(shard)[sample - int(self.table.first_sample[shard])]
        return shard, int(record["offset"]), int(record["length"]), int(record["crc32"])

    def entries(self, shard: int) -> Array:
        """The `INDEX_DTYPE` records of a shard's samples, checked."""
        if self.table.index is None:
            return self._part(shard)
        return self.table.index[self.table.first_sample[shard] : self.table.first_sample[shard + 1]]

    def _read_part(self, shard: int) -> Array:
        first, after = (int(number) * INDEX_DTYPE.itemsize for number in self.table.first_sample[shard : shard + 2])
        where = f"{self.storage.where(self.info.name)}, part of {self.table.name(shard)}"
        for left in reversed(range(READS_OF_DAMAGED)):
            try:
                data = self.storage.read(self.info.name, first, after - first)
            except OSError as error:
                raise ShardError(f"{where}: {error}") from error
            if len(data) == after - first and zlib.crc32(data) == self.table.index_crc32(shard):
                break
            if not left:
                raise CorruptShardError(f"{where}: the index does not match its CRC-32 in the table of shards")
        entries = np.frombuffer(data, INDEX_DTYPE)
        check_entries(entries, np.uint64(self.table.bytes(shard)), where)
        return entries


def check_entries(entries: Array, room: Array | np.uint64, where: str) -> None:
    """Raise CorruptShardError for a sample that does not lie within its shard of `room` bytes, or is too large."""
    outside = (entries["length"] > room) | (entries["offset"] > room - entries["length"])
    if outside.any():
        number = int(outside.argmax())
        bytes_there = int(np.broadcast_to(room, entries.shape)[number])
        raise CorruptShardError(f"{where}: sample {number} has offset {entries['offset'][number]} and length "
                                f"{entries['length'][number]}, legal: within the {bytes_there} bytes of its shard")
    longest = int(entries["length"].max(initial=0))
    if longest > LARGEST_PICTURE:
        raise CorruptShardError(f"{where}: sample {int(entries['length'].argmax())} has length {longest}, legal: at "
                                f"most {LARGEST_PICTURE}")


def _records(storage: Storage, info: SplitInfo) -> tuple[Array, Array]:
    """(SHARD_DTYPE records, names where these are not made from numbers)"""
    if info.table is None:
        listed = info.listed or []
        records = np.zeros(len(listed), SHARD_DTYPE)
        for name in ("samples", "bytes"):
            records[name] = [getattr(shard, name) for shard in listed]
        records["sha256"] = np.array([bytes.fromhex(shard.sha256) for shard in listed], "V32")
        return records, np.array([shard.name.encode() for shard in listed] or [b""])
    records = read_records(storage, info.table, SHARD_DTYPE, "table of shards")
    numbers = records["number"].astype(np.int64)
    if (np.diff(numbers) <= 0).any():
        raise CorruptShardError(f"{_where(storage, info)}: the numbers of shards are not ascending")
    if (records["samples"].astype(np.int64) * MIN_SAMPLE_BYTES > records["bytes"]).any():
        raise CorruptShardError(f"{_where(storage, info)}: a shard has fewer than {MIN_SAMPLE_BYTES} bytes per sample")
    return records, np.empty(0, "S1")


def _where(storage: Storage, info: SplitInfo) -> str:
    return storage.where(info.table.name if info.table is not None else "manifest.json")


def read_records(storage: Storage, info: FileInfo, dtype: np.dtype[Any], what: str) -> Array:
    """The records of a whole file. Raises CorruptShardError when its size or hash is not the manifest's, ShardError
    when it cannot be read."""
    path = storage.where(info.name)

    def check(data: bytes) -> Array:
        if len(data) != info.bytes or hashlib.sha256(data).hexdigest() != info.sha256:
            raise CorruptShardError(f"{path}: the {what} does not match its size or sha256 in the manifest")
        return np.frombuffer(data, dtype)

    try:
        return read_checked(storage, info.name, check, min(info.bytes, LARGEST_WHOLE))
    except OSError as error:
        raise ShardError(f"{path}: the {what} cannot be read: {error.strerror or error}") from error


def _from_file(split: str, places: Sequence[tuple[np.dtype[Any], int]], descriptor: Any) -> ShardTable:
    opened = descriptor.detach()
    try:
        return ShardTable(split, *_map(opened, places))
    finally:
        os.close(opened)


def _map(descriptor: int, places: Sequence[tuple[np.dtype[Any], int]]) -> tuple[Array, Array, Array, Array]:
    """Memory-map the arrays of a file, which follow one another. Raises OSError."""
    contents = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    arrays, start = [], 0
    for dtype, count in places:
        arrays.append(np.frombuffer(contents, dtype, count, start) if count else np.empty(0, dtype))
        start += -(-dtype.itemsize * count // _ALIGNMENT) * _ALIGNMENT
    records, first_sample, names, index = arrays
    return records, first_sample, names, index
