"""Locks that the system drops with the process, and what to do where the file system has none: warn, and go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from shards.errors import ConfigError


def open_lock(path: str | Path, folder: int | None = None) -> IO[str]:
    """Open a lock file, to read and write, as it is; it is made where there is none. `folder` is a descriptor.

    Raises ConfigError for a link, which may lead to anybody's file, and for all else that is no file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666 if folder is None else 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise ConfigError(f"the lock {path} is a link, a folder or a socket, legal: a plain file; remove it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"the lock {path} is no plain file; remove it")
    return open(descriptor, "r+", encoding="utf-8")  # noqa: PTH123 - a descriptor


def try_lock(file: IO[Any], *, shared: bool = False) -> OSError | None:
    """Lock an open file. Returns the reason where that is not possible at all (ENOSYS, ENOLCK, EOPNOTSUPP and so on,
    as network file systems answer). Raises BlockingIOError when another process has it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None


def warn_unlocked(folder: Path, reason: OSError, advice: str = "take care that no other run uses it") -> None:
    """Say that nobody keeps others out of the folder."""
    warnings.warn(f"{folder} cannot be locked ({reason}): {advice}", stacklevel=2)


@contextlib.contextmanager
def only_writer(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock file `path` while writing into `folder`. Raises ConfigError when another process holds it."""
    with open_lock(path) as file:
        try:
            reason = try_lock(file)
        except BlockingIOError:
            raise ConfigError(f"another run is writing {folder}; wait for it, or use another --output") from None
        if reason is not None:
            warn_unlocked(folder, reason)
        yield


@contextlib.contextmanager
def among_writers(path: Path, tidy: Callable[[], None]) -> Iterator[None]:
    """Several processes may write into the folder of the lock file `path`, which is made and, by the last one, removed.

    The one that finds no other there calls `tidy` first, so that this never takes what another is at.
    """
    with open_lock(path) as file:
        with contextlib.suppress(BlockingIOError):
            reason = try_lock(file)
            if reason is not None:
                warn_unlocked(path.parent, reason)
            tidy()
        with contextlib.suppress(OSError):  # waits for another's tidying; warned already where there are no locks
            fcntl.flock(file, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with contextlib.suppress(BlockingIOError):
                try_lock(file)
                path.unlink(missing_ok=True)
