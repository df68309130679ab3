"""Node-local disk cache for byte ranges of shards, shared by all of a user's processes on a node.

One file per entry, named by the hash of its key, so that different sets do not collide; written atomically and with a
checksum, so that a killed process leaves an entry complete or absent. When the cache exceeds its limit, the least
recently used entries are deleted.

Local disks are often writable by all users of a node (/tmp, /scratch). So nothing that another user may have put there
is trusted: folders belong to this user alone (mode 0700), links are not followed, and only files named like entries
are deleted.
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
_STALE_SECONDS = 3600  # after which the writer of a temporary file is presumed dead
_CHECKS_PER_LIMIT = 50  # the folder is measured each time a process has added a fiftieth of the limit
_SHELF, _ENTRY, _TEMPORARY = (re.compile(pattern) for pattern in ("[0-9a-f]{2}", "[0-9a-f]{64}", r"\..+\.tmp"))


class _NotOurs(OSError):
    """A folder or file that another user owns or may write to."""


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """Up to `limit` bytes in `folder`, plus what processes add between measurements, at most a fiftieth each."""

    folder: Path
    limit: int

    @classmethod
    def in_folder(cls, folder: str | Path, limit: int) -> DiskCache:
        """This user's cache in a folder that may be shared with other users. Raises as `prepare`."""
        cache = cls(folder=Path(folder) / f"maskstream-{os.geteuid()}", limit=limit)
        cache.prepare()
        return cache

    def prepare(self) -> None:
        """Make the folder. Raises ConfigError if it exists but is not this user's alone. Other failures only leave
        the cache unused."""
        try:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700, parents=True)
            if self.folder.is_symlink():
                raise _NotOurs("is a symbolic link, legal: a folder")
            with _own_folder(self.folder):
                return
        except _NotOurs as error:
            raise ConfigError(f"the cache {self.folder} {error}; remove it, or change data.cache_dir") from error
        except OSError:
            return

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The entry for a key; if absent or damaged, it is fetched and, if the disk has room, stored."""
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
        """Delete an entry."""
        name = hashlib.sha256(key.encode()).hexdigest()
        with contextlib.suppress(OSError), self._shelf(name) as shelf:
            os.unlink(name, dir_fd=shelf)

    @contextlib.contextmanager
    def _shelf(self, name: str) -> Iterator[int]:
        """A descriptor of the folder of an entry. Raises OSError if it does not exist or is not ours."""
        with _own_folder(self.folder) as folder, _own_folder(name[:2], folder) as shelf:
            yield shelf

    def _stored(self, name: str) -> bytes:
        """The unverified content of an entry's file. Raises OSError."""
        with self._shelf(name) as shelf:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=shelf)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid() or state.st_size > self.limit:
                raise _NotOurs(f"holds {name}, which is not an entry")
            os.utime(descriptor)  # most recently used
            return file.read(state.st_size)

    def _put(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full or read-only disk only costs speed
            self._write(name, data)
        added = _added.get(self.folder, self.limit) + len(data)  # the default makes a process measure at first
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
        """Delete the least recently used entries; one process at a time, the others skip it."""
        _added[self.folder] = 0
        try:
            with _own_folder(self.folder) as folder, open_lock("lock", folder) as lock:
                reason = try_lock(lock)
                if reason is not None:
                    warn_unlocked(self.folder, reason, "several processes may clean it up at once")
                self._delete_oldest(folder)
        except (OSError, ConfigError):  # another process is already doing it, or there is no cache
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
    """A descriptor of a folder, relative to the descriptor `inside`. Raises _NotOurs, and OSError for links."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid():
            raise _NotOurs(f"belongs to user {state.st_uid}, legal: your own ({os.geteuid()})")
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _NotOurs(f"is writable by others (mode {stat.S_IMODE(state.st_mode):o}), legal: 700")
        yield descriptor
    finally:
        os.close(descriptor)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little")


_added: dict[Path, int] = {}  # bytes this process has added to each folder since it last measured it
