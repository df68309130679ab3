"""Recognise out-of-memory errors."""

from __future__ import annotations

import torch

from shards.errors import RunError

_PHRASES = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(RunError):
    """Memory ran out; the message lists the settings that reduce memory use, with their current values."""


def allocator_error(error: Exception) -> str | None:
    """The error's first line if host or GPU memory ran out; otherwise None."""
    text = str(error).strip()
    is_known = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(phrase in text for phrase in _PHRASES)
    if not is_known:
        return None
    return text.splitlines()[0][:300] if text else type(error).__name__
