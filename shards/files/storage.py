"""Where shard sets live: a folder, or object storage. Everything that reads or writes a set goes through here.

    path                    reads are `pread`s; writes take a temporary name, are synced, then renamed
    s3://bucket/prefix      \\
    gs://bucket/prefix       } obstore; credentials, region, endpoint and so on from the usual environment variables
    az://container/prefix   /  (AWS_*, GOOGLE_*, AZURE_*; the account is AZURE_STORAGE_ACCOUNT_NAME)
    https://host/prefix     obstore, read only; redirects as `shards.files.web` says

A read that is cut, stalls, trickles or meets a server error goes on from the byte reached, after a pause. One that
cannot succeed (no such object, no permission) or has used up its tries raises StorageError naming object and offset.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import obstore
from obstore import exceptions
from obstore.store import from_url
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from shards.errors import ConfigError, CorruptShardError, StorageError
from shards.files.atomic import copy_atomically, opened, write_atomically
from shards.files.plain_file import OpenFiles, check_size, plain_size, read_plain
from shards.files.storage_errors import brief, may_pass, refused_by
from shards.files.web import check_redirects, say_if_unprotected
from shards.shown_text import MASK, is_masked, masked

REMOTE_SCHEMES = ("s3", "gs", "az", "https", "http")
READS_OF_DAMAGED = 4
_PIECE = 8 << 20  # bytes asked for in one request, and held twice at most
LARGEST_WHOLE = 4 << 30  # bytes; of what is read whole
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "MASKSTREAM_")
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to try. A read takes at most about tries x (timeout + longest_pause) seconds before it fails."""

    tries: int = 8
    timeout: float = 30.0  # seconds for one request, its body included
    longest_pause: float = 15.0  # seconds; pauses double from a fifth of a second, less a random part


class Storage(Protocol):
    """Flat, named blobs under one root."""

    @property
    def root(self) -> str:
        """Path or URL, for messages."""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, or all of them. May return fewer at the end of a local file.

        Raises FileNotFoundError when there is no such blob, StorageError when it cannot be read.
        """

    def size(self, name: str) -> int:
        """Bytes of a blob. Raises FileNotFoundError, and StorageError for what is no file."""

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each blob; None where the store cannot say."""

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        """Publish a whole blob at once. With `create`, raises StorageError when it is there already."""

    def upload(self, name: str, source: Path | BinaryIO) -> None:
        """Publish the content of a file, named or open, as a blob, at once, however large."""

    def delete(self, name: str) -> None:
        """Remove a blob, if it is there."""

    def where(self, name: str) -> str:
        """Path or URL, for messages."""


def open_storage(root: str | Path | Storage, patience: Patience | None = None) -> Storage:
    """The storage at a path or URL. Raises ConfigError for schemes other than those above; no request is made."""
    if not isinstance(root, str | Path):
        return root
    found = _URL.match(str(root))
    if isinstance(root, Path) or found is None or (found[2] is None and Path(root).exists()):
        return LocalStorage(Path(root))
    if found[2] is None and len(found[1]) > 1 and found[1].lower() not in (*REMOTE_SCHEMES, "pipe", "file"):
        return LocalStorage(Path(root))  # a colon in a file name
    if is_masked(root):
        raise ConfigError(f"{root} has {MASK} where its credentials were, which are never stored; type the whole URL "
                          "again, as data.root=URL, train.checkpoint_dir=URL or --output URL")
    named = str(root)[found.end():].strip("/")  # bucket and folder, or host and path
    if found[2] is None or not named or found[1].lower() not in REMOTE_SCHEMES:
        raise ConfigError(f"{masked(root)!r} is not a place for shards, legal: a path, or a URL such as "
                          "s3://bucket/folder, gs://, az:// and https:// likewise")
    return ObjectStorage(str(root), patience or Patience())


def read_checked(storage: Storage, name: str, check: Callable[[bytes], _Value], most: int = LARGEST_WHOLE) -> _Value:
    """What `check` makes of a whole blob. From object storage it is read again when `check` raises CorruptShardError:
    a bit may have flipped on the way. Raises StorageError, before reading, for more than `most` bytes."""
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
    return isinstance(open_storage(root), ObjectStorage)


class LocalStorage:
    """A folder. Files stay open; descriptors are this process's own, so it may be forked or pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder)
        self._files = OpenFiles(folder)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is None:  # opened anew: it may have been exchanged
            return read_plain(self.folder / name, LARGEST_WHOLE)[offset:]
        return self._files.read(name, offset, length)

    def size(self, name: str) -> int:
        return plain_size(self.folder / name)

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files.forget(name)
        try:
            write_atomically(self.folder / name, data, create=create)
        except FileExistsError as error:
            raise StorageError(f"{self.where(name)} is there already") from error

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


class ObjectStorage:
    """Object storage by URL. The client is made on first use, in each process; may be shared by threads."""

    def __init__(self, url: str, patience: Patience) -> None:
        location, _, self._query = url.partition("?")
        self._url, self.patience = f"{location.rstrip('/')}{'?' if self._query else ''}{self._query}", patience
        self._location = masked(location.rstrip("/"))
        self._asked: set[str] = set()  # names whose redirects were looked at
        self.retries = 0  # of this process, for the warnings
        self._store: Any = None
        # A loader's fork server may have been started before these were set, and its children have its environment.
        self._settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        received = bytearray()
        if length is None:
            length = self.size(name) - offset
            check_size(self.where(name), length, LARGEST_WHOLE)
        while len(received) < length:  # in pieces, so that no single request takes long
            self._read_piece(name, offset, min(length, len(received) + _PIECE), received)
        return bytes(received)

    def size(self, name: str) -> int:
        def head() -> int:
            self._check_redirects(name)
            return int(obstore.head(self._client(), name)["size"])

        return self._patiently(name, 0, head)

    def sizes(self) -> dict[str, int] | None:
        if self._is_web:
            return None
        found: dict[str, int] = {}

        def listed() -> None:
            for batch in obstore.list(self._client()):
                found.update({item["path"]: item["size"] for item in batch if "/" not in item["path"]})

        self._patiently("", 0, listed)
        return found

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        self._check_writable()
        try:
            self._patiently(name, 0, lambda: obstore.put(self._client(), name, data, use_multipart=False,
                                                         mode="create" if create else "overwrite"))
        except exceptions.AlreadyExistsError as error:
            raise StorageError(f"{self.where(name)} is there already") from error

    def upload(self, name: str, source: Path | BinaryIO) -> None:
        self._check_writable()

        def put() -> None:
            with opened(source) as file:
                obstore.put(self._client(), name, file)  # in parts when it is large; visible when all are there

        self._patiently(name, 0, put)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._patiently(name, 0, lambda: obstore.delete(self._client(), name))

    def where(self, name: str) -> str:
        return f"{self._location}{f'/{name}' if name else ''}{f'?{MASK}' if self._query else ''}"

    @property
    def root(self) -> str:
        """The URL without credentials."""
        return self.where("")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}

    @property
    def _is_web(self) -> bool:
        return self._url.startswith("http")

    def _check_writable(self) -> None:
        if self._is_web:
            raise ConfigError(f"{self.root} can only be read; write to a path, or to s3://, gs:// or az://")

    def _check_redirects(self, name: str) -> None:
        if self._is_web and name not in self._asked:
            location, mark, query = self._url.partition("?")
            check_redirects(f"{location}/{name}{mark}{query}", self.patience.timeout)
            self._asked.add(name)

    def _read_piece(self, name: str, offset: int, end: int, received: bytearray) -> None:
        """Append bytes of an object until there are `end`, counted from `offset`."""

        def go_on() -> None:
            self._check_redirects(name)
            start = offset + len(received)
            answer = obstore.get(self._client(), name, options={"range": (start, offset + end)})
            if next(iter(answer.range)) != start:
                raise exceptions.GenericError(f"asked for bytes from {start}, got {answer.range}")
            for chunk in answer.stream(min_chunk_size=1):
                received.extend(bytes(chunk)[: end - len(received)])
            if len(received) < end:
                raise exceptions.GenericError(f"the body ended after {len(received)} of {end} bytes")

        self._patiently(name, offset, go_on, lambda: f" after {len(received)} of {end} bytes")

    def _patiently(self, name: str, offset: int, call: Callable[[], _Value],
                   reached: Callable[[], str] = lambda: "") -> _Value:
        """`call`, again after failures that may pass. Raises FileNotFoundError; StorageError for all else."""
        place = f"{self.where(name)} (offset {offset})"

        def warn(state: RetryCallState) -> None:
            self.retries += 1
            cause = brief(state.outcome.exception() if state.outcome else None, self._url)
            _log.warning("%s: try %d of %d failed%s: %s; going on from there (%d retries in this process so far)",
                         place, state.attempt_number, self.patience.tries, reached(), cause, self.retries)

        def pause(state: RetryCallState) -> float:
            whole = min(self.patience.longest_pause, 0.2 * 2.0 ** (state.attempt_number - 1))
            return whole * random.Random(f"{place} {os.getpid()} {state.attempt_number}").uniform(0.5, 1.0)

        retrying = Retrying(stop=stop_after_attempt(self.patience.tries), wait=pause, before_sleep=warn, reraise=True,
                            retry=retry_if_exception(may_pass))
        try:
            return retrying(call)
        except FileNotFoundError as error:
            said = brief(error, self._url)
            raise FileNotFoundError(f"{place}: there is no such object or bucket: {said}") from error
        except exceptions.AlreadyExistsError:
            raise
        except (exceptions.BaseError, OSError, ValueError) as error:
            if refused_by(error) == "404":  # of a listing: no such bucket
                raise FileNotFoundError(f"{place}: there is no such bucket: {brief(error, self._url)}") from error
            times = f" after {self.patience.tries} tries{reached()}" if may_pass(error) else ""
            raise StorageError(f"{place}: failed{times}: {brief(error, self._url)}") from error

    def _client(self) -> Any:
        if _fork_broke_clients:
            raise StorageError(f"{self.root}: this process was forked from one that had used object storage, which "
                               "would hang; start workers with multiprocessing_context='forkserver' or 'spawn'")
        if self._store is None:
            global _clients_used
            _clients_used = True
            os.environ.update(self._settings)
            pause = timedelta(seconds=self.patience.timeout)
            say_if_unprotected(self._url)
            options = {"timeout": pause, "connect_timeout": pause, "read_timeout": pause,
                       "allow_http": not self._url.startswith("https:")}  # an endpoint in the environment may be one
            try:
                # Its own retries are off: ours go on from the byte reached, for every cause, and say so.
                make: Callable[..., Any] = from_url
                self._store = make(self._url, client_options=options,
                                   retry_config={"max_retries": 0, "retry_timeout": pause})
            except (exceptions.BaseError, ValueError) as error:
                raise StorageError(f"{self.root}: {brief(error, self._url)}") from error
        return self._store


_clients_used = _fork_broke_clients = False


def _after_fork() -> None:
    global _fork_broke_clients
    _fork_broke_clients = _fork_broke_clients or _clients_used


os.register_at_fork(after_in_child=_after_fork)
