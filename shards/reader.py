"""Read the samples of a complete shard set by number; each is verified before use."""

from __future__ import annotations

import io
import logging
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.errors import CorruptShardError, ShardError, StorageError
from shards.files.cache import DiskCache
from shards.files.storage import READS_OF_DAMAGED, LocalStorage, Storage, open_storage
from shards.manifest import Manifest, ShardInfo, SplitInfo, load_manifest
from shards.rle import MAX_SIDE
from shards.sample import IMAGE_SUFFIXES, CropSample, decode_sample
from shards.shard_table import SampleIndex, ShardTable

_MOST_LISTED = 10_000  # shards; the sizes of more are not compared at the start, as listing them takes too long
_BLOCK = 512
_NAME, _SIZE, _KIND = 100, slice(124, 136), slice(156, 157)  # fields of a tar header: length or position
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Location of a sample's bytes."""

    shard: int  # number within the split
    offset: int
    length: int


class ShardReader:
    """Random access to the samples of one split, numbered 0..len-1 in storage order.

    Opening reads the manifest, the table of shards and a small index; if the storage can list files, it checks the size
    of every shard, unless there are very many. Each
    read is one byte range, verified by its CRC-32; damaged data from object storage is fetched again. May be passed to
    spawned workers and, for local folders, to forked ones. With `cache`, ranges from object storage are kept on local
    disk.
    """

    def __init__(self, root: str | Path | Storage, split: str, manifest: Manifest | None = None,
                 cache: DiskCache | None = None) -> None:
        self.storage, self.split, self.cache = open_storage(root), split, cache
        self._manifest: Manifest | None = manifest if manifest is not None else load_manifest(self.storage)
        self.num_classes, self.ignore_index = self._manifest.num_classes, self._manifest.ignore_index
        self._most_pixels = self._manifest.most_pixels(split)
        self._index_info = self.info.index
        self.table = ShardTable.load(self.storage, split, self.info)
        self._index = SampleIndex(self.storage, self.table, self._index_info)
        if len(self.table) <= _MOST_LISTED:
            _check_sizes(self.storage, self.table)

    @property
    def manifest(self) -> Manifest:
        """The set's manifest. A spawned process loads it on first use (see `__getstate__`).

        Raises as `load_manifest`, and ShardError when the set was replaced in the meantime.
        """
        if self._manifest is None:
            found = load_manifest(self.storage)
            if found.split(self.split).index != self._index_info:
                raise ShardError(f"{self.storage.root} has been replaced by another shard set since it was opened")
            self._manifest = found
        return self._manifest

    @property
    def info(self) -> SplitInfo:
        """The manifest's entry for the split."""
        return self.manifest.split(self.split)

    def __getstate__(self) -> dict[str, Any]:
        """State without the manifest when spawning a process: with many shards it is slow to pickle and large."""
        return self.__dict__ if get_spawning_popen() is None else {**self.__dict__, "_manifest": None}

    def __len__(self) -> int:
        return int(self.table.first_sample[-1])

    def read(self, number: int, data: bytes | None = None) -> CropSample:
        """Sample `number`, parsed from `data` if its bytes were already fetched (see `fetch`).

        Raises CorruptShardError or StorageError naming shard and sample; IndexError when out of range.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of split {self.split!r}, legal: 0..{len(self) - 1}")
        where = self._where(number)
        tries = 1 if self.is_local else READS_OF_DAMAGED
        for left in reversed(range(tries)):
            if data is None:
                data = self.fetch([number])[0]
            problem = self._problem(number, data)
            if problem is None:
                return parse_span(data, where, self.ignore_index, self._most_pixels)
            if left:
                _log.warning("%s: %s; fetching it again", where, problem)
                self._forget(number)
            data = None
        raise CorruptShardError(f"{where}: {problem}")

    def fetch(self, numbers: Sequence[int]) -> list[bytes]:
        """The unverified bytes of samples; consecutive ones in a shard share one request. Thread-safe."""
        found: list[bytes] = []
        for run in self._runs(numbers):
            places = [self.place(number) for number in run]
            shard, first, _ = places[0]
            data = self._range(shard, first, places[-1].offset + places[-1].length - first)
            found += [data[place.offset - first : place.offset - first + place.length] for place in places]
        return found

    def place(self, number: int) -> Place:
        """Location of a sample. Raises as `read`, where the index is read in parts."""
        return Place(*self._index.entry(number)[:3])

    def bytes_of(self, numbers: Sequence[int]) -> int:
        """Number of bytes that `fetch` would return."""
        return sum(self.place(int(number)).length for number in np.asarray(numbers).tolist())

    @property
    def is_local(self) -> bool:
        """Whether the set is in a local folder, so that prefetching is unnecessary."""
        return isinstance(self.storage, LocalStorage)

    def close(self) -> None:
        """Close the files of this process."""
        if isinstance(self.storage, LocalStorage):
            self.storage.close()

    def _runs(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Split numbers into runs of consecutive samples of one shard."""
        run: list[int] = []
        for number in map(int, numbers):
            if run and (number != run[-1] + 1 or self.place(number).shard != self.place(run[0]).shard):
                yield run
                run = []
            run.append(number)
        if run:
            yield run

    def _range(self, shard: int, offset: int, length: int) -> bytes:
        name = self.table.name(shard)

        def from_storage() -> bytes:
            try:
                return self.storage.read(name, offset, length)
            except FileNotFoundError as error:
                raise StorageError(f"{self.storage.where(name)} (offset {offset}): the manifest lists this "
                                   f"shard, but it does not exist: {error}") from error
            except OSError as error:
                raise ShardError(f"{self.storage.where(name)} (offset {offset}): {error}") from error

        if self.cache is None or self.is_local:
            return from_storage()
        return self.cache.get(self._cache_key(Place(shard, offset, length)), from_storage)

    def _forget(self, number: int) -> None:
        if self.cache is not None:
            self.cache.remove(self._cache_key(self.place(number)))

    def _cache_key(self, place: Place) -> str:
        """Key by content, not by location, so that identical shards share cache entries."""
        return f"{self.table.sha256(place.shard)}-{place.offset}-{place.length}"

    def _problem(self, number: int, data: bytes) -> str | None:
        _, _, length, crc32 = self._index.entry(number)
        if len(data) != length:
            return f"got {len(data)} of {length} bytes, the shard is truncated"
        damaged = zlib.crc32(data) != crc32
        return "CRC-32 differs from the index, the shard is damaged or was replaced" if damaged else None

    def _where(self, number: int) -> str:
        shard, offset, _ = self.place(number)
        name = self.storage.where(self.table.name(shard))
        return f"{name}, sample {number - int(self.table.first_sample[shard])} (offset {offset})"


def iter_samples(root: str | Path | Storage, split: str) -> Iterator[CropSample]:
    """Iterate over the verified samples of a split in storage order."""
    reader = ShardReader(root, split)
    try:
        for number in range(len(reader)):
            yield reader.read(number)
    finally:
        reader.close()


def parse_span(span: bytes, where: str, ignore_index: int = 255, most_pixels: int = MAX_SIDE**2) -> CropSample:
    """Parse the tar members of one sample (an image, then its msgpack), of at most `most_pixels` pixels.

    Raises CorruptShardError, FormatVersionError. Decodes no pixels: the size comes from the mask record, and an image
    of a different size is refused later, by its header.
    """
    members: dict[str, bytes] = {}
    with io.BytesIO(span) as stream:
        while stream.tell() < len(span):
            name, data = _read_member(stream, where)
            members[name] = data
    stems = {name.split(".", 1)[0] for name in members}
    suffixes = {name.split(".", 1)[-1] for name in members}
    image_suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in suffixes), None)
    if len(members) != 2 or len(stems) != 1 or image_suffix is None or "mp" not in suffixes:
        raise CorruptShardError(f"{where}: expected one image and one msgpack, found {sorted(members)}")
    (stem,) = stems
    try:
        record, header = decode_sample(members[f"{stem}.mp"])
    except ShardError as error:
        raise type(error)(f"{where}: {error}") from error
    if header.height * header.width > most_pixels:
        raise CorruptShardError(f"{where}: it is {header.height}x{header.width}, but according to the manifest no "
                                f"sample of its split has more than {most_pixels} pixels")
    return CropSample(
        key=record["key"],
        image_bytes=members[f"{stem}.{image_suffix}"],
        image_suffix=image_suffix,
        record=record,
        header=header,
        payload=members[f"{stem}.mp"],
        ignore_index=ignore_index,
    )


def _read_member(stream: io.BytesIO, where: str) -> tuple[str, bytes]:
    """Name and data of the tar member at the stream's position.

    Only regular files with plain ustar names, as our writer makes them, are accepted. The header checksum is not
    checked, as the CRC-32 covers it; parsing every field like tarfile would take a tenth of the image decoding time.
    """
    header = stream.read(_BLOCK)
    name, digits, kind = header[:_NAME].rstrip(b"\0"), header[_SIZE].strip(b" \0"), header[_KIND]
    if len(header) != _BLOCK or kind != tarfile.REGTYPE or not digits.isdigit() or not name.isascii():
        raise CorruptShardError(f"{where}: bad tar header of member {name.decode(errors='replace')!r}, or not a "
                                "regular file")
    size = int(digits, 8) if not digits.translate(None, b"01234567") else -1
    data = stream.read(size) if 0 <= size <= len(stream.getbuffer()) else b""
    if len(data) != size:
        raise CorruptShardError(f"{where}: tar member {name.decode()!r} is truncated")
    stream.seek(-size % _BLOCK, io.SEEK_CUR)
    return name.decode(), data


def _check_sizes(storage: Storage, shards: Iterable[ShardInfo]) -> None:
    """Check that every shard exists with the manifest's size, if the storage can list files."""
    try:
        sizes = storage.sizes()
    except OSError as error:
        raise ShardError(f"{storage.root} cannot be read: {error}") from error
    for shard in shards if sizes is not None else ():
        path, found = storage.where(shard.name), sizes.get(shard.name) if sizes else None
        if found is None:
            raise ShardError(f"{path} is missing, but the manifest lists it")
        if found != shard.bytes:
            raise CorruptShardError(f"{path} has {found} bytes, the manifest says {shard.bytes}")
