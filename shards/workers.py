"""Worker processes: exit with their parent, clean up sockets and semaphores, reuse freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import shutil
import signal
import stat
import tempfile
import threading
from pathlib import Path
from typing import IO

from shards.errors import ConfigError
from shards.files.locks import open_lock, try_lock

_PREFIX, _LOCK = "mstream-", "lock"
_SEMAPHORES = Path("/dev/shm")  # where Linux keeps named semaphores
_MAX_FOLDER = 100 - len(f"/{_PREFIX}12345678/listener-12345678")  # socket paths: 107 bytes on Linux, 103 on macOS
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h


def default_workers() -> int:
    """One process per CPU that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_with_parent() -> None:
    """Call in a worker: it exits as soon as its parent process is gone, however that ended.

    After `kill -9` a parent cannot stop its workers, and an idle worker would never notice.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def die_with_parent() -> None:
    """Call first in a program started by a launcher: the kernel kills it when the launcher ends (Linux only).

    Then even `kill -9` of the launcher leaves no process behind, whether this one is waiting, blocked or stopped.
    """
    try:
        set_option = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return
    set_option(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_and_exit(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def use_own_temporary_folder() -> None:
    """Call before starting processes: puts their sockets and semaphores under names that belong to this process.

    They are removed on a normal exit. If this process is killed with all its helpers, nobody holds the lock on its
    folder any more, and this user's next run cleans up. Batch systems may set TMPDIR to paths too long for a socket;
    then the folder is made elsewhere. Raises ConfigError when no folder is writable.
    """
    names = vars(multiprocessing.current_process())["_config"]  # children inherit it
    if names.get("tempdir") is not None:
        return
    place = Path(_short_folder())
    _remove_dead(place)
    folder, lock = _make_folder(place)
    names.update(tempdir=str(folder), semprefix=f"/{folder.name}")
    multiprocessing.util.Finalize(None, _remove, args=(folder, lock), exitpriority=-100)  # after sockets are closed


def _short_folder() -> str:
    folders = [tempfile.gettempdir(), *_SHORT_FOLDERS]
    for folder in folders:
        if len(os.fsencode(folder)) <= _MAX_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(f"TMPDIR is {folders[0]}, which is too long for a socket path or not writable, and none of "
                      f"{', '.join(_SHORT_FOLDERS)} is writable; set TMPDIR to a writable folder of at most "
                      f"{_MAX_FOLDER} bytes")


def _make_folder(place: Path) -> tuple[Path, IO[str]]:
    """A new folder and its held lock. Retries if another process removed the folder as stale before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = open_lock(folder / _LOCK)
            try_lock(lock)  # on file systems without locks, no other process can find it stale
            if (folder / _LOCK).exists():
                return folder, lock


def _remove_dead(place: Path) -> None:
    """Remove what killed processes of this user left behind."""
    for folder in place.glob(f"{_PREFIX}????????"):
        with contextlib.suppress(OSError, ConfigError):
            state = folder.lstat()
            if stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid():
                with open_lock(folder / _LOCK) as lock:
                    if try_lock(lock) is None:
                        _remove(folder, lock)


def _remove(folder: Path, lock: IO[str]) -> None:
    """Remove a process's semaphores and its folder, whose lock is held."""
    for semaphore in _SEMAPHORES.glob(f"sem.{folder.name}-*"):
        semaphore.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def keep_freed_memory() -> None:
    """Call in a process that makes batch after batch: freed memory is kept for reuse.

    By default glibc returns large blocks to the system, which must zero every page when they are allocated again: a
    tenth of a loader's time. Has no effect with other C libraries.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(_MMAP_THRESHOLD, 32 << 20)  # glibc's maximum
    set_option(_TRIM_THRESHOLD, 256 << 20)
