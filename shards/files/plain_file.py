"""Open files that others named: only regular ones. A named pipe would hang, a device never end, a folder say EISDIR."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

from shards.errors import StorageError
from shards.files.atomic import naming

LARGEST_PICTURE = 1 << 30  # bytes of an encoded image, or of a sample that holds one
_MOST_AT_ONCE = 0x7FFFF000  # bytes; Linux reads no more in one call
_OPEN_FILES = 256  # more than data.lanes, which read one shard each
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def open_plain(path: str | Path) -> int:
    """A descriptor to read a regular file (or what a link leads to). Raises StorageError for others, and OSError.

    Looked at before it is opened, as opening a device may do something, and after, as it may have been exchanged.
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
    """A whole regular file of at most `most` bytes. Raises StorageError, without reading, for others; OSError."""
    with naming(path), open(open_plain(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check_size(str(path), size, most)
        return file.read(size)


def plain_size(path: str | Path) -> int:
    """Bytes of a regular file. Raises StorageError for others, and OSError."""
    state = os.stat(path)  # noqa: PTH116
    _check_kind(state, path)
    return state.st_size


def check_size(name: str, size: int, most: int) -> None:
    """Raise StorageError for a file that is too large to be what it should be, and to be read whole."""
    if size > most:
        raise StorageError(f"{name} has {size} bytes, legal for a file read whole: at most {most}")


class OpenFiles:
    """Files of a folder that stay open. Descriptors are this process's own, so it may be forked or pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()
        self._owner = os.getpid()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Some bytes of a file, fewer at its end. Raises as `open_plain`."""
        with naming(self.folder / name):
            data = os.pread(self._descriptor(name), length, offset)
        if len(data) < _MOST_AT_ONCE:
            return data
        return b"".join([data, self.read(name, offset + len(data), length - len(data))])

    def forget(self, name: str) -> None:
        """Close a file that will be another one under its name."""
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
