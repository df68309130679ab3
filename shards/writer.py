"""Write one shard: a plain ustar file whose bytes depend only on its samples, published by renaming."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from shards.files.atomic import naming, sync_folder, temporary_name
from shards.files.plain_file import LARGEST_PICTURE
from shards.manifest import INDEX_DTYPE, ShardInfo
from shards.sample import IMAGE_SUFFIXES, member_stem

_BLOCK, _PIECE = 512, 8 << 20
# A ustar header of a regular file: name, mode and owner, size, time, checksum, type, magic (see docs/format.md).
_NAME, _SIZE = 100, 11
_OWNER, _TIME = b"0000644\0" + 2 * b"0000000\0", b"\0" + b"00000000000\0"
_REST = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(255, b"\0")
_HEADER_SUM = sum(_OWNER + _TIME + _REST) + 8 * ord(" ")  # a checksum is counted as blanks
_END_OF_ARCHIVE = bytes(2 * _BLOCK)


class ShardWriter:
    """Context manager: `write` samples, then `info` and `index` describe the finished shard.

    The file has a temporary name until the block ends without an exception; then it is synced and renamed, so a shard
    under its final name is always complete. Times, owners and modes of members are fixed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._temporary = temporary_name(self.path)
        self._entries: list[tuple[int, int, int]] = []
        self._keys: set[str] = set()
        self._hash = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        self._file = open(self._temporary, "xb")  # noqa: PTH123 - closed in __exit__
        return self

    def write(self, key: str, image_bytes: bytes, image_suffix: str, payload: bytes) -> None:
        """Append one sample. Raises ValueError on a repeated key, an unknown image suffix, or a sample too large to
        read."""
        if key in self._keys:
            raise ValueError(f"key {key!r} is written twice to {self.path.name}")
        self._keys.add(key)
        span = encode_span(key, image_bytes, image_suffix, payload)
        self._entries.append((self._offset, len(span), zlib.crc32(span)))
        self._append(span)

    def extend(self, spans: Path, entries: npt.NDArray[np.void]) -> None:
        """Append the samples in a file of spans, described by `INDEX_DTYPE` records with offsets in that file.

        Raises ValueError when the file has another size than the records say.
        """
        shift, size = self._offset, int(entries["length"].sum())
        with spans.open("rb") as file:
            while piece := file.read(_PIECE):
                self._append(piece)
        if self._offset - shift != size:
            raise ValueError(f"{spans} has {self._offset - shift} bytes, legal: the {size} of its samples")
        self._entries += [(shift + offset, length, crc32) for offset, length, crc32 in entries.tolist()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with contextlib.suppress(OSError):  # the file is already published, or abandoned after an error
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._append(_END_OF_ARCHIVE)
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    @property
    def info(self) -> ShardInfo:
        """Name, bytes, sha256 and sample count, as the manifest lists them."""
        return ShardInfo(
            name=self.path.name, bytes=self._offset, sha256=self._hash.hexdigest(), samples=len(self._entries)
        )

    @property
    def index(self) -> npt.NDArray[np.void]:
        """Offset, length and CRC-32 of every sample, as `INDEX_DTYPE` records."""
        return np.array(self._entries, INDEX_DTYPE)

    def _append(self, data: bytes) -> None:
        with naming(self.path):
            self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


def encode_span(key: str, image_bytes: bytes, image_suffix: str, payload: bytes) -> bytes:
    """The tar members of one sample. Raises ValueError on an unknown image suffix, or a sample too large to read."""
    if image_suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image suffix of {key!r} is {image_suffix!r}, legal: {', '.join(IMAGE_SUFFIXES)}")
    stem = member_stem(key)
    span = _member(f"{stem}.{image_suffix}", image_bytes) + _member(f"{stem}.mp", payload)
    if len(span) > LARGEST_PICTURE:
        raise ValueError(f"sample {key!r} has {len(span)} bytes, legal: at most {LARGEST_PICTURE}")
    return span


def _member(name: str, data: bytes) -> bytes:
    """A tar member. Raises ValueError for a name or size that a ustar header cannot hold."""
    encoded, size = name.encode("ascii"), b"%011o" % len(data)
    if len(encoded) > _NAME or len(size) > _SIZE:
        raise ValueError(f"member {name!r} of {len(data)} bytes, legal: names of {_NAME} and sizes of {_SIZE} digits")
    checksum = _HEADER_SUM + sum(encoded) + sum(size)
    header = b"".join((encoded.ljust(_NAME, b"\0"), _OWNER, size, _TIME, b"%06o\0 " % checksum, _REST))
    return b"".join((header, data, bytes(-len(data) % _BLOCK)))
