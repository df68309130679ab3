"""Object storage and web servers through obstore: the `Storage` of s3://, gs://, az:// and https:// URLs.

A read that breaks off, stalls, is too slow or meets a server error is resumed from the last byte received, after a
pause. One that cannot succeed (no such object, no permission) or has used up its tries raises an error naming object
and offset.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote

import obstore
from obstore import exceptions
from obstore.store import from_url
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from shards.errors import ConfigError, StorageError
from shards.files.atomic import opened
from shards.files.plain_file import check_size
from shards.files.storage import LARGEST_WHOLE, RetryPolicy
from shards.files.storage_errors import brief, is_transient, refused_by
from shards.files.web import check_redirects, warn_if_unencrypted
from shards.shown_text import MASK, masked

_PIECE = 8 << 20  # bytes per request; at most twice as many are held
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "MASKSTREAM_")
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class ObjectVersion(NamedTuple):
    """Differs when an object was replaced by another one."""

    size: int  # bytes
    tag: str  # the ETag, or else the time of the last change; empty when the server gives neither


class ObjectStorage:
    """Object storage by URL. Each process makes its client on first use; threads may share it."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        location, _, self._query = url.partition("?")
        self._url, self.policy = f"{location.rstrip('/')}{'?' if self._query else ''}{self._query}", policy
        self._location = masked(location.rstrip("/"))
        self._redirects_checked: set[str] = set()  # names
        self.retries = 0  # of this process, for warnings
        self._store: Any = None
        # Loader processes inherit their fork server's environment, which may have been started before these were set.
        self._settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}

    def read(self, name: str, offset: int = 0, length: int | None = None,
             version: ObjectVersion | None = None) -> bytes:
        """As in `Storage`. With `version`, raises StorageError when the object has become another one."""
        received = bytearray()
        if length is None:
            length = self.size(name) - offset
            check_size(self.where(name), length, LARGEST_WHOLE)
        while len(received) < length:  # in pieces, to keep each request short
            self._read_piece(name, offset, min(length, len(received) + _PIECE), received, version)
        return bytes(received)

    def version(self, name: str) -> ObjectVersion:
        """The object's version now, taken from a response to a range, as reading compares it with such responses.

        Raises as `read`, also for a server that does not support ranges.
        """

        def first_byte() -> ObjectVersion:
            self._check_redirects(name)
            answer = obstore.get(self._client(), name, options={"range": (0, 1)})
            answer.bytes()  # so that the connection can be used again
            return _version_of(answer.meta)

        return self._with_retries(name, 0, first_byte)

    def size(self, name: str) -> int:
        def head() -> int:
            self._check_redirects(name)
            return int(obstore.head(self._client(), name)["size"])

        return self._with_retries(name, 0, head)

    def sizes(self, *, deep: bool = False) -> dict[str, int] | None:
        if self._is_web:
            return None
        found: dict[str, int] = {}

        def listed() -> None:
            for batch in obstore.list(self._client()):
                found.update({item["path"]: item["size"] for item in batch
                              if deep or "/" not in item["path"]})

        self._with_retries("", 0, listed)
        return found

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        self._check_writable()
        try:
            self._with_retries(name, 0, lambda: obstore.put(self._client(), name, data, use_multipart=False,
                                                         mode="create" if create else "overwrite"))
        except exceptions.AlreadyExistsError as error:
            raise StorageError(f"{self.where(name)} already exists") from error

    def upload(self, name: str, source: Path | BinaryIO) -> None:
        self._check_writable()

        def put() -> None:
            with opened(source) as file:
                obstore.put(self._client(), name, file)  # multipart if large; visible only once complete

        self._with_retries(name, 0, put)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._with_retries(name, 0, lambda: obstore.delete(self._client(), name))

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
            raise ConfigError(f"{self.root} is read-only; write to a path, or to s3://, gs:// or az://")

    def _check_redirects(self, name: str) -> None:
        if self._is_web and name not in self._redirects_checked:
            location, mark, query = self._url.partition("?")
            check_redirects(f"{location}/{quote(name)}{mark}{query}", self.policy.timeout)
            self._redirects_checked.add(name)

    def _read_piece(self, name: str, offset: int, end: int, received: bytearray,
                    version: ObjectVersion | None) -> None:
        """Append an object's bytes to `received` until it has `end` of them; its first byte is at `offset`."""

        def read_rest() -> None:
            self._check_redirects(name)
            start = offset + len(received)
            answer = obstore.get(self._client(), name, options={"range": (start, offset + end)})
            if next(iter(answer.range)) != start:
                raise exceptions.GenericError(f"requested bytes from {start}, got {answer.range}")
            if version is not None and _version_of(answer.meta) != version:
                raise StorageError(f"{self.where(name)} was replaced on the server while it was read (size and ETag "
                                   f"were {tuple(version)}, now they are {tuple(_version_of(answer.meta))})")
            for chunk in answer.stream(min_chunk_size=1):
                received.extend(bytes(chunk)[: end - len(received)])
            if len(received) < end:
                raise exceptions.GenericError(f"the body ended after {len(received)} of {end} bytes")

        self._with_retries(name, offset, read_rest, lambda: f" after {len(received)} of {end} bytes")

    def _with_retries(self, name: str, offset: int, call: Callable[[], _Value],
                      reached: Callable[[], str] = lambda: "") -> _Value:
        """Run `call`, retrying transient errors. Raises FileNotFoundError, or StorageError for other failures."""
        place = f"{self.where(name)} (offset {offset})"

        def warn(state: RetryCallState) -> None:
            self.retries += 1
            cause = brief(state.outcome.exception() if state.outcome else None, self._url)
            _log.warning("%s: try %d of %d failed%s: %s; continuing from there (%d retries in this process so far)",
                         place, state.attempt_number, self.policy.tries, reached(), cause, self.retries)

        def pause(state: RetryCallState) -> float:
            whole = min(self.policy.longest_pause, 0.2 * 2.0 ** (state.attempt_number - 1))
            return whole * random.Random(f"{place} {os.getpid()} {state.attempt_number}").uniform(0.5, 1.0)

        retrying = Retrying(stop=stop_after_attempt(self.policy.tries), wait=pause, before_sleep=warn, reraise=True,
                            retry=retry_if_exception(is_transient))
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
            times = f" after {self.policy.tries} tries{reached()}" if is_transient(error) else ""
            raise StorageError(f"{place}: failed{times}: {brief(error, self._url)}") from error

    def _client(self) -> Any:
        if _fork_broke_clients:
            raise StorageError(f"{self.root}: this process was forked from one that had used object storage, so its "
                               "client would hang; start workers with multiprocessing_context='forkserver' or 'spawn'")
        if self._store is None:
            _note_client()
            os.environ.update(self._settings)
            pause = timedelta(seconds=self.policy.timeout)
            warn_if_unencrypted(self._url)
            options = {"timeout": pause, "connect_timeout": pause, "read_timeout": pause,
                       "allow_http": not self._url.startswith("https:")}  # an endpoint in the environment may be one
            try:
                # The client's own retries are off: ours resume mid-object, cover every cause, and are logged.
                make: Callable[..., Any] = from_url
                self._store = make(self._url, client_options=options,
                                   retry_config={"max_retries": 0, "retry_timeout": pause})
            except (exceptions.BaseError, ValueError) as error:
                raise StorageError(f"{self.root}: {brief(error, self._url)}") from error
        return self._store


def _version_of(meta: Any) -> ObjectVersion:
    changed = meta["last_modified"]  # 1970 when the server does not say
    return ObjectVersion(meta["size"], meta["e_tag"] or (changed.isoformat() if changed.timestamp() else ""))


_clients_used = _fork_broke_clients = False


def _note_client() -> None:
    """From now on, clients would hang in forks of this process, so forks must refuse to use them."""
    global _clients_used
    if not _clients_used:
        _clients_used = True
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    global _fork_broke_clients
    _fork_broke_clients = True
