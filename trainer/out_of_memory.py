"""Telling an error of an allocator from others."""

from __future__ import annotations

import torch

from shards.errors import RunError

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(RunError):
    """The message says which settings take memory, and what they are now."""


def allocator_error(error: Exception) -> str | None:
    """The error in one line if memory was short, on the host or on a GPU; else None."""
    text = str(error).strip()
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in text for sign in _SIGNS):
        return None
    return text.splitlines()[0][:300] if text else type(error).__name__
