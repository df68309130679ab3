"""File locks, released by the kernel when the process ends; on file systems without locks: warn and continue."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from shards.errors import ConfigError

_OWN, _LOCK = "run-", "lock"
_TRIES = 100  # of locking a file that has its name; more only where file systems give no lasting inode numbers


def open_lock(path: str | Path, folder: int | None = None) -> IO[str]:
    """Open a lock file for reading and writing, creating it if needed. `folder`: descriptor that `path` is relative to.

    Raises ConfigError for a symbolic link, which might lead to anyone's file, and for anything but a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666 if folder is None else 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise ConfigError(f"the lock {path} is a link, a folder or a socket, legal: a regular file; remove "
                          "it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"the lock {path} is not a regular file; remove it")
    return open(descriptor, "r+", encoding="utf-8")  # noqa: PTH123 - a descriptor


def try_lock(file: IO[Any], *, shared: bool = False) -> OSError | None:
    """Lock an open file. Returns the error if the file system has no locks (ENOSYS, ENOLCK, EOPNOTSUPP and the like, as
    on network file systems). Raises BlockingIOError when another process holds the lock."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None


def warn_unlocked(folder: Path, reason: OSError, advice: str = "make sure that no other run uses it") -> None:
    """Warn that the folder is not protected against other runs."""
    warnings.warn(f"{folder} cannot be locked ({reason}): {advice}", stacklevel=2)


@contextlib.contextmanager
def only_writer(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock file `path` while writing into `folder`; it is removed at the end. Raises ConfigError when another
    process holds it."""

    def take(file: IO[str]) -> None:
        try:
            reason = try_lock(file)
        except BlockingIOError:
            raise ConfigError(f"another run is writing to {folder}; wait for it, or choose another --output") from None
        if reason is not None:
            warn_unlocked(folder, reason)

    with _locked(path, take) as file:
        try:
            yield
        finally:
            _remove(file, path)


@contextlib.contextmanager
def among_writers(path: Path, tidy: Callable[[], None]) -> Iterator[None]:
    """Hold a shared lock on `path` while writing into its folder; the last process to leave removes the lock file.

    A process that finds no other one calls `tidy` first, so that it never removes files that another is writing.
    """

    def take(file: IO[str]) -> None:
        with contextlib.suppress(BlockingIOError):
            reason = try_lock(file)
            if reason is not None:
                warn_unlocked(path.parent, reason)
            if _has_name(file, path):
                tidy()
        with contextlib.suppress(OSError):  # waits while another process tidies; without locks, we have warned already
            fcntl.flock(file, fcntl.LOCK_SH)

    with _locked(path, take) as file:
        try:
            yield
        finally:
            with contextlib.suppress(BlockingIOError):
                try_lock(file)
                _remove(file, path)


@contextlib.contextmanager
def _locked(path: Path, take: Callable[[IO[str]], None]) -> Iterator[IO[str]]:
    """Open the lock file `path` and `take` its lock; again if the file no longer has that name once it is locked.

    Its last holder may have removed it since we opened it. A lock on it would then mean nothing, as the next process
    locks a new file.
    """
    for left in reversed(range(_TRIES)):
        with _opened(path) as file:
            take(file)
            if _has_name(file, path) or not left:
                yield file
                return


def _opened(path: Path) -> IO[str]:
    try:
        return open_lock(path)
    except FileNotFoundError:  # the folder may have been removed together with the lock file
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_lock(path)


def _has_name(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove(file: IO[str], path: Path) -> None:
    """Remove a lock file that we hold, but not another one that has its name by now."""
    with contextlib.suppress(OSError):
        if _has_name(file, path):
            path.unlink()


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A new folder below `parent`, removed in the end. Those left by killed processes are removed first.

    A folder belongs to a process as long as its lock is held.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.glob(f"{_OWN}*"):
        with contextlib.suppress(OSError, ConfigError), open_lock(folder / _LOCK) as lock:
            if try_lock(lock) is None:
                shutil.rmtree(folder, ignore_errors=True)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _locked_folder(parent: Path) -> tuple[Path, IO[str]]:
    """A new folder and its held lock; again if another process took it for dead before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_OWN, dir=parent))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = open_lock(folder / _LOCK)
            try_lock(lock)
            if (folder / _LOCK).exists():
                return folder, lock
