"""Write files atomically: under a temporary name, synced, then renamed. Errors name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

# Names made by `temporary_name`, for files of a shard set or run, and by trainer.run.checkpoint_writer.
_TEMPORARY = re.compile(r"\..+\.\d+(-[0-9a-f]{8})?\.tmp|\.checkpoint\.tmp")


def write_atomically(path: Path, data: bytes, *, create: bool = False) -> None:
    """Write a file under a temporary name, sync it, then rename it: readers see all of it or nothing.

    With `create`, raises FileExistsError when the file exists, even if another process has just created it.
    """
    _publish(path, lambda file: file.write(data), create)


@contextlib.contextmanager
def opened(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    """A file, given by path or open, positioned at its beginning; one passed in open stays open."""
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
    """Where this process writes a file before renaming it.

    Never the same twice: on a shared folder, processes of several hosts or containers may have the same number.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes; no other process may be writing to the folder."""
    for path in folder.glob(".*.tmp"):
        if is_leftover(path.name):
            path.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a file has a name that `temporary_name` makes."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add a file's name to OSErrors raised inside: by default, only errors of opening a file have one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:  # raised by a library; without an errno, pickling would lose the file name
            raise OSError(errno.EIO, str(error), str(path)) from error
        error.filename = str(path)
        raise


@contextlib.contextmanager
def temporary_file(place: Path, pieces: Iterable[bytes]) -> Iterator[BinaryIO]:
    """A file holding `pieces`, in the folder of `place` but without a name: it is gone when this process is.

    Errors of writing it name `place`.
    """
    with naming(place):
        file = tempfile.TemporaryFile(dir=place.parent)  # noqa: SIM115 - closed below
    try:
        for piece in pieces:
            with naming(place):
                file.write(piece)
        with naming(place):
            file.flush()
        yield file
    finally:
        with contextlib.suppress(OSError):  # closing tries once more to write what could not be written
            file.close()


def _publish(path: Path, fill: Callable[[BinaryIO], object], create: bool = False) -> None:
    with atomic_path(path, create=create) as temporary, temporary.open("xb") as file:
        fill(file)


@contextlib.contextmanager
def atomic_path(path: Path, *, create: bool = False) -> Iterator[Path]:
    """A temporary path to write to, for libraries that need a path; on exit it is synced and renamed to `path`.

    Nothing is left after an error. `create` as in `write_atomically`.
    """
    temporary = temporary_name(path)
    try:
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
    """Unlike a rename, a hard link never overwrites; without hard links, checking for existence has to suffice."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(f"{path} already exists") from None
        temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (no-op where folders cannot be opened, as on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
