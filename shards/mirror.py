"""Mirror a shard set between any two places: verified, resumable, complete or visibly not."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.errors import ConfigError, CorruptShardError, ShardError, StorageError
from shards.files.atomic import naming, remove_leftovers
from shards.files.locks import among_writers
from shards.files.storage import LocalStorage, Storage, open_storage
from shards.manifest import MANIFEST_NAME, IndexInfo, Manifest, ShardInfo, load_manifest, manifest_bytes

_PIECE = 8 << 20

File = ShardInfo | IndexInfo


def copy_set(source: str | Path | Storage, destination: str | Path | Storage,
             progress: Callable[[File], object] = lambda file: None) -> int:
    """Copy what `destination` lacks; returns the number of files copied. `progress` hears of each file that is there.

    Each file is read back and compared with its sha256; the manifest comes last and is only ever created, never
    overwritten, so a reader sees a complete set or none. Files that an earlier run left are kept if they are right.
    Raises ConfigError when the destination holds another set, CorruptShardError when a file arrives changed.
    """
    source, destination = open_storage(source), open_storage(destination)
    if _is_same_place(source, destination):
        raise ConfigError(f"{destination.root} is the set itself; give another place to copy it to")
    manifest = load_manifest(source)
    content = manifest_bytes(manifest)
    there = _existing_manifest(destination)
    if there is not None and there != content:
        raise ConfigError(f"{destination.root} holds another complete shard set; give another place, or remove that")
    with _tidied(destination):
        return _copy_missing(source, destination, manifest, progress, content if there is None else None)


@contextlib.contextmanager
def _tidied(destination: Storage) -> Iterator[None]:
    """While writing there; what killed copies left in a folder is removed (object storage keeps nothing unfinished)."""
    if not isinstance(destination, LocalStorage):
        yield
        return
    folder = destination.folder
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a complete mirror may be read-only; what has to be written will say so
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(among_writers(folder / ".copying", lambda: remove_leftovers(folder)))
        yield


def _copy_missing(source: Storage, destination: Storage, manifest: Manifest, progress: Callable[[File], object],
                  content: bytes | None) -> int:
    """Copy files that are not there, then publish `content` as the manifest, if it is given."""
    try:
        sizes = destination.sizes() or {}
    except FileNotFoundError:  # a folder or bucket that will be made, or an upload that will say what is wrong
        sizes = {}
    copied = 0
    for file in files_of(manifest):
        if sizes.get(file.name) != file.bytes or not _is_right(destination, file):
            _copy(source, destination, file)
            copied += 1
        progress(file)
    if content is not None:
        _create_manifest(destination, content)
    return copied


def _create_manifest(destination: Storage, content: bytes) -> None:
    try:
        destination.write(MANIFEST_NAME, content, create=True)
    except StorageError:  # another copy has just made it; or ours did, and the answer was lost
        if _existing_manifest(destination) != content:
            raise


def files_of(manifest: Manifest) -> Iterator[File]:
    """All files of a set but the manifest."""
    for split in manifest.splits.values():
        yield from split.shards
        yield split.index


def _is_same_place(one: Storage, other: Storage) -> bool:
    if isinstance(one, LocalStorage) and isinstance(other, LocalStorage):
        return one.folder.resolve() == other.folder.resolve()
    return str(one.root).rstrip("/") == str(other.root).rstrip("/")


def _copy(source: Storage, destination: Storage, file: File) -> None:
    try:
        size = source.size(file.name)
    except FileNotFoundError as error:
        raise ShardError(f"{source.where(file.name)} is not there: {error}") from error
    if size != file.bytes:
        raise CorruptShardError(f"{source.where(file.name)} has {size} bytes, the manifest says {file.bytes}")
    if isinstance(source, LocalStorage):
        destination.upload(file.name, source.folder / file.name)
    else:
        with tempfile.TemporaryFile() as temporary:  # without a name, so that a killed copy leaves none
            with naming(tempfile.gettempdir()):
                for piece in _pieces(source, file):
                    temporary.write(piece)
                temporary.flush()
            destination.upload(file.name, temporary)
    if not _is_right(destination, file):
        destination.delete(file.name)
        right = _is_right(source, file)
        raise CorruptShardError(f"{destination.where(file.name)} has another sha256 than the manifest says: "
                                f"{'it changed on the way; try again' if right else 'the source is damaged'}")


def _is_right(storage: Storage, file: File) -> bool:
    """Compared twice before it is called wrong: the bit may have flipped on the way here."""
    return any(_sha256(storage, file) == file.sha256 for _ in range(2))


def _sha256(storage: Storage, file: File) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(storage, file):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(storage: Storage, file: File) -> Iterator[bytes]:
    for offset in range(0, file.bytes, _PIECE):
        try:
            yield storage.read(file.name, offset, min(_PIECE, file.bytes - offset))
        except FileNotFoundError as error:
            raise ShardError(f"{storage.where(file.name)} is not there: {error}") from error


def _existing_manifest(storage: Storage) -> bytes | None:
    try:
        return storage.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
