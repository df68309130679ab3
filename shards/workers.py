"""What worker processes do first: end with the program that started them, and keep the memory they will need again."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import threading

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them, malloc.h


def exit_with_parent() -> None:
    """Call in a worker: it exits as soon as the process that started it is gone, however that died.

    `kill -9` gives a parent no chance to stop its workers, and a worker that waits for work never notices.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


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
