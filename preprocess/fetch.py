"""Fetch a published file: resumed where it broke off, published under its name only when its checksum is right.

    DIR/NAME.0123abcd.part   what has arrived; the 8 digits stand for the file's version on the server (size and ETag)
    DIR/.NAME.lock           held while writing, and removed at the end, also of a failed download
    DIR/NAME                 the complete file: synced, compared with the published size and checksum, then renamed

Bytes of two versions never meet: a file that was replaced on the server has another part, and the old one is removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from obstore.exceptions import NotSupportedError
from tqdm import tqdm

from preprocess.published import PublishedFile
from shards.errors import ConfigError, StorageError
from shards.files.atomic import naming, sync_folder
from shards.files.locks import only_writer
from shards.files.object_storage import ObjectStorage, ObjectVersion
from shards.files.plain_file import open_plain, plain_size
from shards.files.storage import RetryPolicy, open_storage
from shards.shown_text import masked_value

_PIECE = 2 << 20  # bytes; small enough for one request's time limit at 70 kB/s, beyond which it is tried again
_log = logging.getLogger(__name__)


def fetch(file: PublishedFile, folder: Path, url: str | None = None, policy: RetryPolicy | None = None) -> bool:
    """Get a file into `folder`, from `url` if given; False if it is already there. Checked in either case.

    Raises ConfigError for a URL that cannot be one, or while another process fetches the same file; StorageError when
    the file cannot be had, is not the published one, or there is too little space; OSError when it cannot be written.
    """
    server, name = _server(file.url if url is None else url, policy)
    path = folder / file.name
    if _is_there(path, file):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / f".{file.name}.lock", folder):
        is_new = not _is_there(path, file)  # another process may have completed it just now
        if is_new:
            _download(file, path, server, name)
    return is_new


def _server(url: str, policy: RetryPolicy | None) -> tuple[ObjectStorage, str]:
    """(the storage of a URL's folder, the name in it)"""
    location, mark, query = url.partition("?")
    root, _, name = location.rpartition("/")
    storage = open_storage(f"{root}{mark}{query}", policy) if name and not re.search(r"\s", url) else None
    if not isinstance(storage, ObjectStorage):
        raise ConfigError(f"--url {masked_value(url)!r} does not name a file on a server, legal: a URL such as "
                          "https://host/folder/file.zip (likewise s3://, gs:// and az://), with %20 for a space")
    return storage, unquote(name)


def _is_there(path: Path, file: PublishedFile) -> bool:
    """Whether the complete file exists. Raises StorageError when it is another one: it is the user's to remove."""
    try:
        plain_size(path)
    except FileNotFoundError:
        return False
    if problem := _difference(path, file):
        raise StorageError(f"{path} exists but is not the published file: {problem}; move or remove it, then run this "
                           "again")
    return True


def _difference(path: Path, file: PublishedFile) -> str | None:
    """How a file differs from the published one, or None."""
    size = plain_size(path)
    if size != file.size:
        return f"it has {size} bytes, published are {file.size}"
    algorithm, _, wanted = file.checksum.partition(":")
    digest = hashlib.new(algorithm)
    with naming(path), os.fdopen(open_plain(path), "rb") as content, _progress("checking", file.size) as bar:
        while piece := content.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != wanted:
        return f"its {algorithm} is {digest.hexdigest()}, published is {wanted}"
    return None


def _progress(what: str, size: int, done: int = 0) -> tqdm[Any]:
    return tqdm(total=size, initial=done, unit="B", unit_scale=True, disable=None, desc=what)


def _download(file: PublishedFile, path: Path, server: ObjectStorage, name: str) -> None:
    """Complete the part of the server's version, check it, and rename it to `path`."""
    version = _version(file, path, server, name)
    part = _part(path, file, version)
    for other in _parts(path):
        if other != part:
            _log.warning("%s is of another version than %s now has: removed, starting over", other, server.where(name))
            other.unlink()
    _fill(part, file, server, name, version)
    if problem := _difference(part, file):
        part.unlink()  # nothing in it can be trusted, so it must not be resumed
        raise StorageError(f"{server.where(name)} arrived different from the published file: {problem}; the download "
                           "was removed. Run the command again; if this repeats, the server has another file: name "
                           "another one with --url")
    part.replace(path)
    sync_folder(path.parent)


def _version(file: PublishedFile, path: Path, server: ObjectStorage, name: str) -> ObjectVersion:
    """The server's version of the file. Raises StorageError when it cannot be the published one, or not be resumed."""
    try:
        version = server.version(name)
    except FileNotFoundError as error:
        raise StorageError(f"{error}; name another server with --url") from error
    except StorageError as error:
        if not isinstance(error.__cause__, NotSupportedError):
            raise
        raise StorageError(f"{server.where(name)}: the server ignores HTTP ranges, so nothing could be resumed; name "
                           f"another server with --url, or get the file by other means, put it at {path}, and run "
                           "this again to check it") from error
    if version.size != file.size:
        raise StorageError(f"{server.where(name)} has {version.size} bytes, published are {file.size}: it is another "
                           "file; name another server with --url")
    return version


def _part(path: Path, file: PublishedFile, version: ObjectVersion) -> Path:
    """Where the bytes of one version of the file are collected."""
    key = hashlib.sha256(f"{file.checksum} {version.size} {version.tag}".encode()).hexdigest()[:8]
    return path.with_name(f"{path.name}.{key}.part")


def _parts(path: Path) -> Iterator[Path]:
    """The parts of all versions."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.part")
    return (other for other in sorted(path.parent.iterdir()) if pattern.fullmatch(other.name))


def _fill(part: Path, file: PublishedFile, server: ObjectStorage, name: str, version: ObjectVersion) -> None:
    """Append to a part what it lacks, and sync it."""
    with naming(part), part.open("ab") as out:
        done = plain_size(part)
        _check_space(part.parent, file.size - done, file.name)
        with _progress(f"{file.name}, resumed" if done else file.name, file.size, done) as bar:
            while done < file.size:
                piece = _read(server, name, done, min(_PIECE, file.size - done), version)
                out.write(piece)
                out.flush()  # a killed process loses at most one piece
                done += len(piece)
                bar.update(len(piece))
        os.fsync(out.fileno())


def _read(server: ObjectStorage, name: str, offset: int, length: int, version: ObjectVersion) -> bytes:
    try:
        return server.read(name, offset, length, version)
    except FileNotFoundError as error:
        raise StorageError(f"{error}; run the command again to continue, or name another server with --url") from error


def _check_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder} has {free} bytes free, {name} needs {needed} more; make room, or choose another "
                           "--output")
