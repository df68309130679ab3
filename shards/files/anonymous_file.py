"""Anonymous files for sharing memory between processes: mapped through a descriptor, not limited by any mount."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

_IOV_MAX = 1024  # buffers in one call of writev


def write_anonymous_file(name: str, pieces: Sequence[memoryview | bytes]) -> int:
    """Create a file with this content, in memory on Linux, and return its descriptor. Raises OSError.

    `name` only appears in /proc.
    """
    descriptor = _new_file(name)
    try:
        _write_all(descriptor, pieces)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _new_file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, pieces: Sequence[memoryview | bytes]) -> None:
    """Write instead of copying into a mapping: out of memory, a write fails cleanly but touching a page crashes."""
    left = [memoryview(piece) for piece in pieces if len(piece)]
    while left:
        written = os.writev(descriptor, left[:_IOV_MAX])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
