"""Copy a shard set between folders and URLs: verified, resumable, and never complete by mistake."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.errors import ConfigError, CorruptShardError, ShardError, StorageError
from shards.files.atomic import is_leftover, remove_leftovers, temporary_file
from shards.files.locks import among_writers
from shards.files.storage import LocalStorage, Storage, open_storage
from shards.manifest import MANIFEST_NAME, FileInfo, Manifest, ShardInfo, load_manifest, manifest_bytes
from shards.shard_table import ShardTable

_PIECE, _LOCK = 8 << 20, ".copying"

File = ShardInfo | FileInfo


def copy_set(source: str | Path | Storage, destination: str | Path | Storage,
             progress: Callable[[File], object] = lambda file: None) -> int:
    """Copy what `destination` lacks; returns the number of files copied. `progress` is called with each finished file.

    Each file is read back and verified by its sha256; the manifest is written last and never overwritten, so readers
    see a complete set or none. Intact files left by an earlier run are kept. Raises ConfigError when the destination
    holds another set, or anything else but an earlier copy of this one; CorruptShardError when a file arrives changed.
    """
    source, destination = open_storage(source), open_storage(destination)
    if _is_same_place(source, destination):
        raise ConfigError(f"{destination.root} is the source itself; choose another destination")
    manifest = load_manifest(source)
    content = manifest_bytes(manifest)
    existing = _existing_manifest(destination)
    if existing is not None and existing != content:
        raise ConfigError(f"{destination.where(MANIFEST_NAME)} is another one, so {destination.root} holds another "
                          "complete shard set; choose another destination, or remove that set first")
    if existing is None:
        _refuse_other_files(source, destination, manifest)
    with _without_leftovers(destination):
        return _copy_missing(source, destination, manifest, progress, content if existing is None else None)


@contextlib.contextmanager
def _without_leftovers(destination: Storage) -> Iterator[None]:
    """Remove temporary files of killed copies from a local folder (object storage keeps none), then lock it."""
    if not isinstance(destination, LocalStorage):
        yield
        return
    folder = destination.folder
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a complete copy may be read-only; if not complete, writing will fail
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(among_writers(folder / _LOCK, lambda: remove_leftovers(folder)))
        yield


def _refuse_other_files(source: Storage, destination: Storage, manifest: Manifest) -> None:
    """Raise ConfigError when a destination without a manifest holds anything but an earlier copy of this set.

    Other files must not be mixed with the set, nor those of the same names be overwritten. A split's first file is
    written before its other ones and has their hashes, so it shows whose they are.
    """
    there = _names(destination)
    if not there:
        return
    others = set(there)
    for name, split in manifest.splits.items():
        first = split.files[0]
        found = [file.name for file in (*split.files, *ShardTable.load(source, name, split)) if file.name in there]
        if found and not (first.name in there and destination.size(first.name) == first.bytes
                          and _is_intact(destination, first)):
            raise ConfigError(f"{destination.where(found[0])} is of another set than {source.root}, or damaged, as "
                              f"{first.name} there is not {source.where(first.name)}; choose another destination, or "
                              "remove what is there")
        others.difference_update(found)
    if others:
        raise ConfigError(f"{destination.root} holds {min(others)!r}, which is not of this set; legal: a new or an "
                          "empty folder, or one with an earlier copy of this set")


def _names(storage: Storage) -> set[str]:
    """What a place holds, but for the lock and temporary files of copies; nothing if it does not exist."""
    try:
        if isinstance(storage, LocalStorage):  # folders, too
            return {path.name for path in storage.folder.iterdir() if path.name != _LOCK and not is_leftover(path.name)}
        return set(storage.sizes() or ())
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise ConfigError(f"{storage.root} is a file, legal: a folder to copy to") from None


def _copy_missing(source: Storage, destination: Storage, manifest: Manifest, progress: Callable[[File], object],
                  content: bytes | None) -> int:
    """Copy missing and damaged files, then publish `content` as the manifest, if given."""
    try:
        sizes = destination.sizes() or {}
    except FileNotFoundError:  # the folder or bucket will be created, or the upload will report the error
        sizes = {}
    copied = 0
    for file in files_of(source, manifest):
        if sizes.get(file.name) != file.bytes or not _is_intact(destination, file):
            copy_file(source, destination, file)
            copied += 1
        progress(file)
    if content is not None:
        publish_manifest(destination, content)
    return copied


def publish_manifest(destination: Storage, content: bytes) -> None:
    """Write the manifest of a set whose files are there. Raises StorageError when there is another one already."""
    try:
        destination.write(MANIFEST_NAME, content, create=True)
    except StorageError:  # another copy has just created it; or ours has, and the response was lost
        if _existing_manifest(destination) != content:
            raise


def files_of(storage: Storage, manifest: Manifest) -> Iterator[File]:
    """All files of a set except the manifest. Raises as `ShardTable.load`."""
    for name, split in manifest.splits.items():
        yield from split.files
        yield from ShardTable.load(storage, name, split)


def bytes_of(manifest: Manifest) -> int:
    """The bytes of all files of a set except the manifest."""
    return sum(split.bytes + sum(file.bytes for file in split.files) for split in manifest.splits.values())


def _is_same_place(one: Storage, other: Storage) -> bool:
    if isinstance(one, LocalStorage) and isinstance(other, LocalStorage):
        return one.folder.resolve() == other.folder.resolve()
    return str(one.root).rstrip("/") == str(other.root).rstrip("/")


def copy_file(source: Storage, destination: Storage, file: File) -> None:
    """Copy a file of a set and read it back. Raises ShardError when the source has no such file, CorruptShardError when
    it has another size or arrives changed."""
    try:
        size = source.size(file.name)
    except FileNotFoundError as error:
        raise ShardError(f"{source.where(file.name)} does not exist: {error}") from error
    if size != file.bytes:
        raise CorruptShardError(f"{source.where(file.name)} has {size} bytes, the manifest says {file.bytes}")
    if isinstance(source, LocalStorage):
        destination.upload(file.name, source.folder / file.name)
    else:
        with temporary_file(Path(tempfile.gettempdir()) / file.name, _pieces(source, file)) as temporary:
            destination.upload(file.name, temporary)
    if not _is_intact(destination, file):
        destination.delete(file.name)
        intact = _is_intact(source, file)
        raise CorruptShardError(f"{destination.where(file.name)} does not match its sha256 in the manifest: "
                                f"{'it was damaged in transit; try again' if intact else 'the source is damaged'}")


def _is_intact(storage: Storage, file: File) -> bool:
    """Whether the sha256 matches; read twice before saying no, as the damage may have happened in transit."""
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
            raise ShardError(f"{storage.where(file.name)} does not exist: {error}") from error


def _existing_manifest(storage: Storage) -> bytes | None:
    try:
        return storage.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
