"""Open user-supplied paths, accepting only regular files: a named pipe would hang, a device might never end."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

from shards.errors import StorageError
from shards.files.atomic import naming

LARGEST_PICTURE = 1 << 30  # bytes of an encoded image, or of a sample that holds one
LARGEST_TEXT = 16 << 20  # bytes of a list of names, which people write
LARGEST_YAML = 4 << 20  # bytes of a configuration or a class table; parsing takes ten seconds or more for each million
_MAX_READ = 0x7FFFF000  # bytes that Linux reads in one call
_OPEN_FILES = 256  # more than data.lanes, each of which reads one shard
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def open_plain(path: str | Path) -> int:
    """A descriptor for reading a regular file; links are followed. Raises StorageError for other kinds, and OSError.

    Checked before opening, as opening a device may have side effects, and after, as the file may have been replaced.
    """
    plain_size(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_plain(path: str | Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes. Raises StorageError, before reading, for any other; OSError."""
    with naming(path), open(open_plain(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check_size(str(path), size, most)
        return file.read(size)


def read_plain_text(path: str | Path, most: int = LARGEST_TEXT) -> str:
    """Read a regular UTF-8 file of at most `most` bytes; lines end in \\n, and a byte order mark is left out.

    Raises as `read_plain`, and UnicodeDecodeError.
    """
    return read_plain(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def plain_size(path: str | Path) -> int:
    """Size in bytes of a regular file. Raises StorageError for other kinds, and OSError."""
    state = os.stat(path)  # noqa: PTH116
    _check_kind(state, path)
    return state.st_size


def check_size(name: str, size: int, most: int) -> None:
    """Raise StorageError for a file that is too large to be what it claims, and too large to read into memory."""
    if size > most:
        raise StorageError(f"{name} has {size} bytes, legal: at most {most} for a file read into memory")


class OpenFiles:
    """Keeps files of a folder open. Safe to fork and pickle: each process opens its own descriptors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()
        self._owner = os.getpid()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of a file from `offset`; fewer at its end. Raises as `open_plain`."""
        with naming(self.folder / name):
            data = os.pread(self._descriptor(name), length, offset)
        if len(data) < _MAX_READ:
            return data
        return b"".join([data, self.read(name, offset + len(data), length - len(data))])

    def forget(self, name: str) -> None:
        """Close a file that is about to be replaced."""
        if self._owner == os.getpid() and name in self._files:
            os.close(self._files.pop(name))

    def close(self) -> None:
        """Close the files of this process."""
        if self._owner == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors mean nothing in another process

    def _descriptor(self, name: str) -> int:
        if self._owner != os.getpid():  # forked or unpickled: the parent's descriptors are not ours to use
            self._files, self._owner = OrderedDict(), os.getpid()
        descriptor = self._files.pop(name, None)
        if descriptor is None:
            descriptor = open_plain(self.folder / name)
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[name] = descriptor  # newest last
        return descriptor


def _check_kind(state: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(state.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(state.st_mode)), "not a regular file")
        raise StorageError(f"{path} is {kind}, legal: a regular file")
