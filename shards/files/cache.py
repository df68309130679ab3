"""A node-local disk cache for ranges of shards, shared by all processes of a user on a node.

One file per entry, named by what it holds, so no two sets collide; published by a rename, so a kill leaves an entry
whole or absent. Entries carry a checksum. When the cache is over its limit the least recently used ones go.

Disks of a node are often open to all its users (/tmp, /scratch). So nothing is believed that another one may have put
there: folders are this user's alone (mode 0700), links are not followed, and only what is named like an entry is
deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import ConfigError
from shards.files.locks import open_lock, try_lock, warn_unlocked

_CHECKSUM_BYTES = 4
_STALE_SECONDS = 3600  # after which a temporary file's writer is taken for dead
_CHECKS_PER_LIMIT = 50  # the folder is measured each time a fiftieth of the limit was added
_SHELF, _ENTRY, _TEMPORARY = (re.compile(pattern) for pattern in ("[0-9a-f]{2}", "[0-9a-f]{64}", r"\..+\.tmp"))


class _NotOurs(OSError):
    """A folder of another user's, or that others may write to."""


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """`limit` bytes under `folder`; may exceed it by what its users add between two looks, a fiftieth each."""

    folder: Path
    limit: int

    @classmethod
    def in_folder(cls, folder: str | Path, limit: int) -> DiskCache:
        """This user's cache in a folder that may be everybody's. Raises as `prepare`."""
        cache = cls(folder=Path(folder) / f"maskstream-{os.geteuid()}", limit=limit)
        cache.prepare()
        return cache

    def prepare(self) -> None:
        """Make the folder. Raises ConfigError for one that is not this user's alone; that none can be made costs speed
        only."""
        try:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700, parents=True)
            if self.folder.is_symlink():
                raise _NotOurs("is a link, legal: a folder")
            with _own_folder(self.folder):
                return
        except _NotOurs as error:
            raise ConfigError(f"the cache {self.folder} {error}; remove it, or set another data.cache_dir") from error
        except OSError:
            return

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The entry of a key; fetched, and kept when there is room on the disk, if it is absent or damaged."""
        name = hashlib.sha256(key.encode()).hexdigest()
        try:
            stored = self._stored(name)
        except OSError:
            stored = b""
        data = stored[_CHECKSUM_BYTES:]
        if len(stored) >= _CHECKSUM_BYTES and _checksum(data) == stored[:_CHECKSUM_BYTES]:
            return data
        data = fetch()
        self._put(name, data)
        return data

    def remove(self, key: str) -> None:
        """Forget an entry."""
        name = hashlib.sha256(key.encode()).hexdigest()
        with contextlib.suppress(OSError), self._shelf(name) as shelf:
            os.unlink(name, dir_fd=shelf)

    @contextlib.contextmanager
    def _shelf(self, name: str) -> Iterator[int]:
        """A descriptor of the folder that holds an entry. Raises OSError where there is none that is ours."""
        with _own_folder(self.folder) as folder, _own_folder(name[:2], folder) as shelf:
            yield shelf

    def _stored(self, name: str) -> bytes:
        """An entry's file, as it is. Raises OSError."""
        with self._shelf(name) as shelf:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=shelf)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid() or state.st_size > self.limit:
                raise _NotOurs(f"holds {name}, which is no entry")
            os.utime(descriptor)  # most recently used
            return file.read(state.st_size)

    def _put(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full or read-only disk costs speed, not the run
            self._write(name, data)
        added = _added.get(self.folder, self.limit) + len(data)  # a process begins with a look
        _added[self.folder] = added
        if added * _CHECKS_PER_LIMIT >= self.limit:
            self._shrink()

    def _write(self, name: str, data: bytes) -> None:
        temporary = f".{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700, parents=True)
        with _own_folder(self.folder) as folder, contextlib.suppress(FileExistsError):
            os.mkdir(name[:2], 0o700, dir_fd=folder)
        with self._shelf(name) as shelf:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with open(os.open(temporary, flags, 0o600, dir_fd=shelf), "wb") as file:  # noqa: PTH123
                    file.write(_checksum(data) + data)
                os.rename(temporary, name, src_dir_fd=shelf, dst_dir_fd=shelf)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=shelf)
                raise

    def _shrink(self) -> None:
        """Delete the least recently used entries; one process at a time, others go on."""
        _added[self.folder] = 0
        try:
            with _own_folder(self.folder) as folder, open_lock("lock", folder) as lock:
                reason = try_lock(lock)
                if reason is not None:
                    warn_unlocked(self.folder, reason, "several processes may tidy it up at once")
                self._delete_oldest(folder)
        except (OSError, ConfigError):  # another process is at it, or there is no cache
            return

    def _delete_oldest(self, folder: int) -> None:
        entries = []
        for shelf in filter(_SHELF.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError), _own_folder(shelf, folder) as opened:
                for name in os.listdir(opened):  # noqa: PTH208 - a descriptor
                    state = os.stat(name, dir_fd=opened, follow_symlinks=False)
                    if _TEMPORARY.fullmatch(name) and time.time() - state.st_mtime > _STALE_SECONDS:
                        os.unlink(name, dir_fd=opened)
                    elif _ENTRY.fullmatch(name):
                        entries.append((state.st_mtime_ns, state.st_size, name))
        total = sum(size for _, size, _ in entries)
        for _, size, name in sorted(entries):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError), self._shelf(name) as opened:
                os.unlink(name, dir_fd=opened)
            total -= size


@contextlib.contextmanager
def _own_folder(path: str | Path, inside: int | None = None) -> Iterator[int]:
    """A descriptor of a folder, in the folder of another descriptor. Raises _NotOurs, and OSError for links."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid():
            raise _NotOurs(f"belongs to user {state.st_uid}, legal: your own ({os.geteuid()})")
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _NotOurs(f"can be written by others (mode {stat.S_IMODE(state.st_mode):o}), legal: 700")
        yield descriptor
    finally:
        os.close(descriptor)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little")


_added: dict[Path, int] = {}  # bytes this process has put into each folder since its last look
