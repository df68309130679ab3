"""The parts of manifest and index needed for reading, as arrays shared by all loader processes.

A manifest of 10^5 shards is 160 MB of Python objects, in every process. As arrays it takes a tenth of that, and is in
memory only once: a spawned process receives the descriptor of an anonymous file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.files.anonymous_file import write_anonymous_file
from shards.manifest import ShardInfo

_ALIGNMENT = 64  # bytes between the starts of arrays
Array = npt.NDArray[Any]


class ShardTable:
    """Names, hashes and sample ranges of a split's shards, and the index of its samples, in order. Read-only."""

    def __init__(self, names: Array, sha256: Array, first_sample: Array, index: Array) -> None:
        self._arrays = (names, sha256, first_sample, index)
        self._descriptor: int | None = None  # of the file that holds the arrays, once they are shared
        self._use()

    @classmethod
    def of(cls, shards: Sequence[ShardInfo], index: npt.NDArray[np.void]) -> ShardTable:
        """Build the table from a split's shards and its `INDEX_DTYPE` records."""
        texts = ([shard.name for shard in shards], [shard.sha256 for shard in shards])
        names, sha256 = (np.array([text.encode() for text in column] or [b""]) for column in texts)
        return cls(names, sha256, np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64), index)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return bytes(self._arrays[0][shard]).decode()

    def sha256(self, shard: int) -> str:
        """Hash of a shard, from the manifest."""
        return bytes(self._arrays[1][shard]).decode()

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        starts_process = get_spawning_popen() is not None  # descriptors can only be passed while spawning
        descriptor = self._shared_file() if starts_process else None
        if descriptor is None:
            return ShardTable, self._arrays
        return _from_file, ([(array.dtype, len(array)) for array in self._arrays], DupFd(descriptor))

    def __del__(self) -> None:
        if (descriptor := self.__dict__.get("_descriptor")) is not None:
            os.close(descriptor)

    def _use(self) -> None:
        index = self._arrays[3]
        self.first_sample = self._arrays[2]
        self.offset, self.length, self.crc32 = (index[column] for column in ("offset", "length", "crc32"))

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
            self._use()
        return self._descriptor


def _from_file(places: Sequence[tuple[np.dtype[Any], int]], descriptor: Any) -> ShardTable:
    opened = descriptor.detach()
    try:
        return ShardTable(*_map(opened, places))
    finally:
        os.close(opened)


def _map(descriptor: int, places: Sequence[tuple[np.dtype[Any], int]]) -> tuple[Array, Array, Array, Array]:
    """Memory-map the arrays of a file, which follow one another. Raises OSError."""
    contents = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    arrays, start = [], 0
    for dtype, count in places:
        arrays.append(np.frombuffer(contents, dtype, count, start) if count else np.empty(0, dtype))
        start += -(-dtype.itemsize * count // _ALIGNMENT) * _ALIGNMENT
    names, sha256, first_sample, index = arrays
    return names, sha256, first_sample, index
