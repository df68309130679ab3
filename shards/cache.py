"""A node-local disk cache for ranges of shards, shared by all processes of a node.

One file per entry, named by what it holds, so no two sets collide; published by a rename, so a kill leaves an entry
whole or absent. Entries carry a checksum. When the cache is over its limit the least recently used ones go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.locks import try_lock, warn_unlocked

_CHECKSUM_BYTES = 4
_STALE_SECONDS = 3600  # after which a temporary file's writer is taken for dead
_CHECKS_PER_LIMIT = 50  # the folder is measured each time a fiftieth of the limit was added


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """`limit` bytes under `folder`; may exceed it by what its users add between two looks, a fiftieth each."""

    folder: Path
    limit: int

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The entry of a key; fetched, and kept when there is room on the disk, if it is absent or damaged."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)  # most recently used
        except OSError:
            stored = b""
        data = stored[_CHECKSUM_BYTES:]
        if len(stored) >= _CHECKSUM_BYTES and zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little") == stored[:4]:
            return data
        data = fetch()
        self._put(path, data)
        return data

    def remove(self, key: str) -> None:
        """Forget an entry."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def _put(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little") + data)
            temporary.replace(path)
        except OSError:  # a full or read-only disk costs speed, not the run
            with contextlib.suppress(OSError):
                temporary.unlink()
        added = _added.get(self.folder, self.limit) + len(data)  # a process begins with a look
        _added[self.folder] = added
        if added * _CHECKS_PER_LIMIT >= self.limit:
            self._shrink()

    def _shrink(self) -> None:
        """Delete the least recently used entries; one process at a time, others go on."""
        _added[self.folder] = 0
        try:
            with (self.folder / "lock").open("w") as lock:
                reason = try_lock(lock)
                if reason is not None:
                    warn_unlocked(self.folder, reason, "several processes may tidy it up at once")
                self._delete_oldest()
        except OSError:  # another process is at it
            return

    def _delete_oldest(self) -> None:
        entries = []
        for path in self.folder.glob("??/*"):
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".tmp" and time.time() - state.st_mtime > _STALE_SECONDS:
                path.unlink(missing_ok=True)
            elif path.suffix != ".tmp":
                entries.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


_added: dict[Path, int] = {}  # bytes this process has put into each folder since its last look
