"""Errors that users may see.

MaskStreamError            base class; entry points print it as one line and exit with its exit_code, 2 by default
├── RunError               a run cannot continue although its input is valid; exit code 1
├── ConfigError            a setting is unknown, of the wrong type or out of range (also a ValueError)
├── DatasetError           a source image or label map cannot be used (preprocess)
└── ShardError             a shard set cannot be used
    ├── CorruptShardError      bytes do not match the manifest, the index or their own header
    ├── FormatVersionError     written in a format version that this code does not know
    └── StorageError           a shard's storage cannot be read or written
"""

from __future__ import annotations

from shards.shown_text import shown_lines


class MaskStreamError(Exception):
    """Base class of all errors caused by the input or the environment rather than by a bug."""

    exit_code = 2
    label = "error"  # prefix of the printed line

    def __init__(self, *arguments: object) -> None:
        """Messages quote URLs and untrusted text, so secrets are masked and control characters escaped."""
        super().__init__(*(shown_lines(item) if isinstance(item, str) else item for item in arguments))


class RunError(MaskStreamError):
    """A process died or hangs, memory or disk space ran out, or values are not finite; the message says what to do."""

    exit_code = 1


class ConfigError(MaskStreamError, ValueError):
    """A configuration value is missing, unknown, of the wrong type or out of its legal range."""


class DatasetError(MaskStreamError):
    """A source image or label map is unreadable, unpaired, or holds an illegal label."""


class ShardError(MaskStreamError):
    """A shard set is missing, incomplete or inconsistent."""


class CorruptShardError(ShardError):
    """Stored bytes are damaged; the message names file, sample and field."""


class FormatVersionError(ShardError):
    """A set or sample has a format version that this code does not know."""


class StorageError(ShardError):
    """Storage cannot be read or written; the message names object, offset and cause."""
