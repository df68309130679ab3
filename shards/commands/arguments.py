"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.errors import ConfigError
from shards.files.storage import local_path

MOST = 10**18  # of a number that only has to fit 64 bits
MOST_WORKERS = 4096


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    return whole_number(text, 1)


def number_of_workers(text: str) -> int:
    """A number of processes; far more than 4096 would be started before the first is done."""
    return whole_number(text, 1, MOST_WORKERS)


def whole_number(text: str, least: int = 0, most: int = MOST) -> int:
    """A whole number from `least` to `most`."""
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}, legal: a whole number from {least} to {most}")
    return int(text)


def picture_file(option: str, text: str) -> Path:
    """A file that `save_picture` can write, in an existing folder or a new one."""
    if not text.lower().endswith((".png", ".jpg", ".jpeg")):
        raise ConfigError(f"{option} is {text}, legal: a .png or .jpg file")
    path = local_path(text, option, "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
