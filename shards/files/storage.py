"""Storage of shard sets: a folder or object storage. All reads and writes of a set go through here.

    path                    reads by `pread`; writes go to a temporary name, are synced, then renamed
    s3://bucket/prefix      \\
    gs://bucket/prefix       } obstore; credentials, region, endpoint etc. from the usual environment variables
    az://container/prefix   /  (AWS_*, GOOGLE_*, AZURE_*; the account is AZURE_STORAGE_ACCOUNT_NAME)
    https://host/prefix     obstore, read-only; redirects restricted by `shards.files.web`
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from shards.errors import ConfigError, CorruptShardError, StorageError
from shards.files.atomic import copy_atomically, write_atomically
from shards.files.plain_file import OpenFiles, check_size, plain_size, read_plain
from shards.shown_text import MASK, is_masked, masked, masked_value

REMOTE_SCHEMES = ("s3", "gs", "az", "https", "http")
READS_OF_DAMAGED = 4
LARGEST_WHOLE = 4 << 30  # bytes; limit for reading a whole file into memory
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Retry limits. A request fails for good after at most about tries x (timeout + longest_pause) seconds."""

    tries: int = 8
    timeout: float = 30.0  # seconds for one request, including its body
    longest_pause: float = 15.0  # seconds; pauses start at 0.2 s and double, reduced by up to half at random


class Storage(Protocol):
    """Flat, named blobs under one root."""

    @property
    def root(self) -> str:
        """Path or URL of the set, for messages."""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, or all that follow. May return fewer at the end of a local file.

        Raises FileNotFoundError when there is no such blob, StorageError when it cannot be read.
        """

    def size(self, name: str) -> int:
        """Size of a blob in bytes. Raises FileNotFoundError, and StorageError when it is not a file."""

    def sizes(self, *, deep: bool = False) -> dict[str, int] | None:
        """Size of each blob in bytes, with `deep` also of those in sub-folders; None if the storage cannot list."""

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        """Write a blob atomically. With `create`, raises StorageError when it already exists."""

    def upload(self, name: str, source: Path | BinaryIO) -> None:
        """Write the content of a file, given by path or open, to a blob, atomically, whatever its size."""

    def delete(self, name: str) -> None:
        """Delete a blob, if it exists."""

    def where(self, name: str) -> str:
        """Path or URL of a blob, for messages."""


def open_storage(root: str | Path | Storage, policy: RetryPolicy | None = None) -> Storage:
    """The storage at a path or URL; makes no request. Raises ConfigError for other schemes than those above."""
    if not isinstance(root, str | Path):
        return root
    found = _URL.match(str(root))
    if isinstance(root, Path) or found is None or (found[2] is None and Path(root).exists()):
        return LocalStorage(Path(root))
    if found[2] is None and len(found[1]) > 1 and found[1].lower() not in (*REMOTE_SCHEMES, "pipe", "file"):
        return LocalStorage(Path(root))  # a file name with a colon
    if is_masked(root):
        raise ConfigError(f"{root} has {MASK} in place of its credentials, which are never stored; pass the full URL "
                          "again, as data.root=URL, train.checkpoint_dir=URL or --output URL")
    named = str(root)[found.end():].strip("/")  # bucket and folder, or host and path
    if found[2] is None or not named or found[1].lower() not in REMOTE_SCHEMES:
        raise ConfigError(f"{masked(root)!r} is not a supported location, legal: a path, or a URL such as "
                          "s3://bucket/folder (likewise gs://, az:// and https://)")
    from shards.files.object_storage import ObjectStorage  # imports obstore and tenacity, which folders do not need

    return ObjectStorage(str(root), policy or RetryPolicy())


def below(root: str, folder: str) -> str:
    """The path or URL of a folder below another; a query (as in a signed URL) stays at the end."""
    if isinstance(open_storage(root), LocalStorage):
        return str(Path(root) / folder)
    location, mark, query = root.partition("?")
    return f"{location.rstrip('/')}/{folder}{mark}{query}"


def read_checked(storage: Storage, name: str, check: Callable[[bytes], _Value], most: int = LARGEST_WHOLE) -> _Value:
    """Read a whole blob and return `check(data)`. From object storage it is read again when `check` raises
    CorruptShardError, as a bit may have flipped in transit. Raises StorageError, before reading, for more than `most`
    bytes."""
    size = storage.size(name)
    check_size(storage.where(name), size, most)
    tries = 1 if isinstance(storage, LocalStorage) else READS_OF_DAMAGED
    for left in reversed(range(tries)):
        try:
            return check(storage.read(name, 0, size))
        except CorruptShardError as error:
            if not left:
                raise
            _log.warning("%s; fetching it again", error)
    raise AssertionError("unreachable")


def is_remote(root: str | Path) -> bool:
    """True for a URL of object storage. Raises ConfigError as `open_storage`."""
    return not isinstance(open_storage(root), LocalStorage)


def local_path(text: str, option: str, kind: str = "folder") -> Path:
    """The path given by `option`, of what must be local: as a path, a URL would mean a folder called `s3:`.

    Raises ConfigError for any URL, and for the empty text, which would mean the current folder.
    """
    with contextlib.suppress(ConfigError):  # another scheme
        if text and not is_remote(text):
            return Path(text)
    raise ConfigError(f"{option} is {masked_value(text)!r}, legal: a local {kind}")


def output_folder(text: str, option: str) -> Path:
    """As `local_path`, of a folder to write to. Raises ConfigError also where a file is in its way."""
    folder = local_path(text, option)
    in_the_way = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if in_the_way is not None and not in_the_way.is_dir():
        raise ConfigError(f"{option} is {text}, but {in_the_way} is a file, legal: a folder")
    return folder


class LocalStorage:
    """A local folder. Keeps files open; safe to fork and pickle, as each process opens its own descriptors."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder)
        self._files = OpenFiles(folder)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is None:  # not through the open files: it may have been replaced
            return read_plain(self.folder / name, LARGEST_WHOLE)[offset:]
        return self._files.read(name, offset, length)

    def size(self, name: str) -> int:
        return plain_size(self.folder / name)

    def sizes(self, *, deep: bool = False) -> dict[str, int]:
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size
                for path in self.folder.glob("**/*" if deep else "*") if path.is_file()}

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files.forget(name)
        try:
            write_atomically(self.folder / name, data, create=create)
        except FileExistsError as error:
            raise StorageError(f"{self.where(name)} already exists") from error

    def upload(self, name: str, source: Path | BinaryIO) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files.forget(name)
        copy_atomically(source, self.folder / name)

    def delete(self, name: str) -> None:
        self._files.forget(name)
        (self.folder / name).unlink(missing_ok=True)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def close(self) -> None:
        """Close the files of this process."""
        self._files.close()
