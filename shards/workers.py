"""Worker processes: they end with the program that started them, leave nothing behind, and keep memory for reuse."""

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
_SEMAPHORES = Path("/dev/shm")  # where Linux keeps named ones
_LONGEST = 100 - len(f"/{_PREFIX}12345678/listener-12345678")  # a socket's address: 107 bytes on Linux, 103 on macOS
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them, malloc.h


def exit_with_parent() -> None:
    """Call in a worker: it exits as soon as the process that started it is gone, however that died.

    `kill -9` gives a parent no chance to stop its workers, and a worker that waits for work never notices.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def die_with_parent() -> None:
    """Call first in a program that another process launched: the kernel kills it when that process ends (Linux).

    Even `kill -9` of a launcher then leaves nothing behind, whatever this process waits for, and if it is stopped.
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
    """Call before processes are started: their sockets and semaphores get names of this process's own.

    A process that ends in order removes them. One that is killed with all its helpers cannot; no living process then
    holds the lock on its folder, so this user's next start knows, and tidies up here. Batch systems set TMPDIR to long
    paths, which do not fit into a socket's address: then the folder is made elsewhere. Raises ConfigError when none can
    be written.
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
        if len(os.fsencode(folder)) <= _LONGEST and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(f"TMPDIR is {folders[0]}, too long for the address of a socket, and none of "
                      f"{', '.join(_SHORT_FOLDERS)} can be written; set TMPDIR to a folder of at most {_LONGEST} "
                      "characters")


def _make_folder(place: Path) -> tuple[Path, IO[str]]:
    """A new folder and its lock, held. Another process may take it for dead before it is locked: then once more."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = open_lock(folder / _LOCK)
            try_lock(lock)  # where there are no locks nobody can take it for dead either
            if (folder / _LOCK).exists():
                return folder, lock


def _remove_dead(place: Path) -> None:
    """Remove what processes of this user left that were killed."""
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
    """Call in a process that makes one batch after the other: freed memory stays with it for the next.

    By default glibc returns large pieces to the system, which has to clear each page when it is asked for it again: a
    tenth of a loader's time. Other C libraries are left as they are.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(_MMAP_THRESHOLD, 32 << 20)  # the highest that glibc knows
    set_option(_TRIM_THRESHOLD, 256 << 20)
