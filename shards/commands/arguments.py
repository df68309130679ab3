"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.errors import ConfigError
from shards.files.storage import local_path

_MOST_DIGITS = 18


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    return whole_number(text, 1)


def whole_number(text: str, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}, legal: a whole number of at least {least}")
    return int(text)


def picture_file(option: str, text: str) -> Path:
    """A file that `save_picture` can write, in an existing folder or a new one."""
    if not text.lower().endswith((".png", ".jpg", ".jpeg")):
        raise ConfigError(f"{option} is {text}, legal: a .png or .jpg file")
    path = local_path(text, option, "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
