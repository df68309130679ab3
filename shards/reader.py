"""Read samples of a complete shard set by number, verified before use."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptShardError, ShardError
from shards.manifest import INDEX_DTYPE, Manifest, ShardInfo, load_manifest
from shards.sample import IMAGE_SUFFIXES, CropSample, decode_sample

_BLOCK = 512
_OPEN_FILES = 64  # shards kept open per reader; far below the usual limit of 1024 descriptors


class ShardReader:
    """Random access to the samples of one split, numbered 0..len-1 in storage order.

    Opening reads the manifest and the index and compares every shard's size. Each read is one `pread`
    of the sample's span, checked against its CRC-32. Safe to hand to spawned or forked workers: files
    are opened on first use in each process. Not for several threads at once: give each a reader of its own.
    """

    def __init__(self, root: str | Path, split: str, manifest: Manifest | None = None) -> None:
        self.root, self.split = Path(root), split
        self.manifest = manifest if manifest is not None else load_manifest(root)
        self.info = self.manifest.split(split)
        self._index = load_index(self.root, self.manifest, split)
        self._first_sample = np.cumsum([0] + [shard.samples for shard in self.info.shards])
        for shard in self.info.shards:
            _check_size(self.root / shard.name, shard)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return self.info.samples

    def read(self, number: int) -> CropSample:
        """Sample `number`. Raises CorruptShardError naming shard and sample; IndexError when out of range."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of split {self.split!r}, legal: 0..{len(self) - 1}")
        shard_number = int(np.searchsorted(self._first_sample, number, side="right")) - 1
        shard = self.info.shards[shard_number]
        offset, length, crc32 = (int(value) for value in self._index[number])
        where = f"{self.root / shard.name}, sample {number - int(self._first_sample[shard_number])} (offset {offset})"
        try:
            span = os.pread(self._file(shard_number), length, offset)
        except OSError as error:
            raise ShardError(f"{where}: {error}") from error
        if len(span) != length:
            raise CorruptShardError(f"{where}: got {len(span)} of {length} bytes, the shard is cut short")
        if zlib.crc32(span) != crc32:
            raise CorruptShardError(f"{where}: CRC-32 differs from the index, the shard is damaged")
        return parse_span(span, where, self.manifest.ignore_index)

    def close(self) -> None:
        """Close the shard files of this process."""
        if self._owner == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors mean nothing in another process

    def _file(self, shard_number: int) -> int:
        if self._owner != os.getpid():  # forked or unpickled: the parent's descriptors are not ours to use
            self._files, self._owner = OrderedDict(), os.getpid()
        descriptor = self._files.pop(shard_number, None)
        if descriptor is None:
            descriptor = os.open(self.root / self.info.shards[shard_number].name, os.O_RDONLY)
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard_number] = descriptor  # newest last
        return descriptor


def iter_samples(root: str | Path, split: str) -> Iterator[CropSample]:
    """Verified samples of a split in storage order."""
    reader = ShardReader(root, split)
    try:
        for number in range(len(reader)):
            yield reader.read(number)
    finally:
        reader.close()


def load_index(root: Path, manifest: Manifest, split: str) -> npt.NDArray[np.void]:
    """The `INDEX_DTYPE` records of a split, checked against size and hash in the manifest."""
    info = manifest.split(split).index
    path = root / info.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: the index of split {split!r} cannot be read: {error}") from error
    if len(data) != info.bytes or hashlib.sha256(data).hexdigest() != info.sha256:
        raise CorruptShardError(f"{path}: the index differs from the size or sha256 in the manifest")
    return np.frombuffer(data, INDEX_DTYPE)


def parse_span(span: bytes, where: str, ignore_index: int = 255) -> CropSample:
    """The sample in a span of tar members (an image, then its msgpack)."""
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
        record = decode_sample(members[f"{stem}.mp"])
    except ShardError as error:
        raise type(error)(f"{where}: {error}") from error
    return CropSample(
        key=record["key"],
        image_bytes=members[f"{stem}.{image_suffix}"],
        image_suffix=image_suffix,
        record=record,
        ignore_index=ignore_index,
    )


def _read_member(stream: io.BytesIO, where: str) -> tuple[str, bytes]:
    try:
        header = tarfile.TarInfo.frombuf(stream.read(_BLOCK), "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise CorruptShardError(f"{where}: bad tar header: {error}") from error
    data = stream.read(header.size) if 0 <= header.size <= len(stream.getbuffer()) else b""
    if not header.isreg() or len(data) != header.size:
        raise CorruptShardError(f"{where}: tar member {header.name!r} is not a whole regular file")
    stream.seek(-header.size % _BLOCK, io.SEEK_CUR)
    return header.name, data


def _check_size(path: Path, shard: ShardInfo) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path} cannot be read, but the manifest lists it: {error}") from error
    if found != shard.bytes:
        raise CorruptShardError(f"{path} has {found} bytes, the manifest says {shard.bytes}")
