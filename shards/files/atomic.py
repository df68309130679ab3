"""Publish files whole: written under a temporary name, synced, then renamed. Errors name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

# Of files of a shard set or a run, as `temporary_name` makes them; and of trainer.run.checkpoint_writer.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.checkpoint\.tmp")


def write_atomically(path: Path, data: bytes, *, create: bool = False) -> None:
    """Write a whole file under a temporary name, sync it, then rename: readers see all of it or nothing.

    With `create`, raises FileExistsError when the file is there, even if another process has just made it.
    """
    _publish(path, lambda file: file.write(data), create)


@contextlib.contextmanager
def opened(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    """A file to read from its beginning, named or open; one that came open stays so."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file
    else:
        source.seek(0)
        yield source


def copy_atomically(source: Path | BinaryIO, path: Path) -> None:
    """Copy a file as `write_atomically` writes one."""
    with opened(source) as original:
        _publish(path, lambda file: shutil.copyfileobj(original, file))


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write; nobody else may be writing to the folder."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give the OSErrors of what is done with a file its name: only those of opening it have one by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:  # a library's own; without a number its name would get lost between processes
            raise OSError(errno.EIO, str(error), str(path)) from error
        error.filename = str(path)
        raise


def _publish(path: Path, fill: Callable[[BinaryIO], object], create: bool = False) -> None:
    with atomic_path(path, create=create) as temporary, temporary.open("xb") as file:
        fill(file)


@contextlib.contextmanager
def atomic_path(path: Path, *, create: bool = False) -> Iterator[Path]:
    """A temporary name to write to, for libraries that want a name; at the end it is synced and becomes `path`.

    After an error nothing is left. `create` as in `write_atomically`.
    """
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)  # of a killed process of the same number; or a link, which is not followed
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        if create:
            _link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Unlike a rename it refuses a name that is taken; where there are no links, looking first has to do."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(f"{path} is there already") from None
        temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
