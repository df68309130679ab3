"""Files without a name, for processes of one machine to share: who gets a descriptor can map it, no mount limits it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

_IOV_MAX = 1024  # buffers in one call of writev


def write_anonymous_file(name: str, pieces: Sequence[memoryview | bytes]) -> int:
    """The descriptor of a new file with this content, in memory where the system has such (Linux). Raises OSError.

    `name` is for people who look into /proc.
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
    """Written, not mapped and copied: where memory is short, writing is an error and touching a page is a crash."""
    left = [memoryview(piece) for piece in pieces if len(piece)]
    while left:
        written = os.writev(descriptor, left[:_IOV_MAX])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
