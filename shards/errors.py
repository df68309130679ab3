"""The errors users can meet in the data path.

MaskStreamError            everything below; entry points print it as one line and exit with its exit_code: 2
├── RunError               a run cannot go on, though its input is sound: 1
├── ConfigError            a setting is unknown, of the wrong type or out of range (also a ValueError)
├── DatasetError           a source image or label map cannot be used (preprocess)
└── ShardError             a shard set cannot be used
    ├── CorruptShardError      bytes differ from what the manifest or the payload promises
    ├── FormatVersionError     written by a newer MaskStream than this one
    └── StorageError           object storage does not answer, or not with what was asked for
"""

from __future__ import annotations

from shards.shown_text import shown_lines


class MaskStreamError(Exception):
    """Root of all errors that are the input's or the surroundings' fault, not the program's."""

    exit_code = 2
    label = "error"  # what the line begins with

    def __init__(self, *arguments: object) -> None:
        """Messages quote URLs and what others wrote: nothing secret and no control character stays in them."""
        super().__init__(*(shown_lines(item) if isinstance(item, str) else item for item in arguments))


class RunError(MaskStreamError):
    """A process died or hangs, memory or disk is short, numbers are not finite; the message says what to do."""

    exit_code = 1


class ConfigError(MaskStreamError, ValueError):
    """A configuration value is missing, unknown, of the wrong type or out of its legal range."""


class DatasetError(MaskStreamError):
    """A source image or label map is unreadable, has no partner, or holds an illegal label."""


class ShardError(MaskStreamError):
    """A shard set is missing, incomplete or inconsistent."""


class CorruptShardError(ShardError):
    """Stored bytes are not what was written; the message names file, sample and field."""


class FormatVersionError(ShardError):
    """The set, sample or mask payload has a format version that this code does not know."""


class StorageError(ShardError):
    """A place that holds shards cannot be read or written; the message names object, offset and cause."""
