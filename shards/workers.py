"""What worker processes do first: end with the program that started them, and keep the memory they will need again."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import tempfile
import threading

from shards.errors import ConfigError

_SOCKET_PATH = 100  # bytes of a Unix socket's address: 107 on Linux, 103 on macOS
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


def use_short_temporary_folder() -> None:
    """Call before processes are started: their sockets get a folder whose path fits into a socket's address.

    Batch systems set TMPDIR to long paths. Raises ConfigError when no other folder can be written.
    """
    longest = len(os.fsencode(tempfile.gettempdir())) + len("/pymp-12345678/listener-12345678")
    if longest <= _SOCKET_PATH:
        return
    for folder in _SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            before, tempfile.tempdir = tempfile.tempdir, folder
            try:
                multiprocessing.util.get_temp_dir()  # made once, then used by this process and its children
            finally:
                tempfile.tempdir = before
            return
    raise ConfigError(f"TMPDIR is {tempfile.gettempdir()}, too long for the address of a socket, and none of "
                      f"{', '.join(_SHORT_FOLDERS)} can be written; set TMPDIR to a folder of at most "
                      f"{_SOCKET_PATH - 32} characters")


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
