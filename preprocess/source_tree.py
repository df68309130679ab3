"""Read files from a dataset folder or zip archive through one small interface.

Symbolic links are followed in both, and two links to one folder count as two folders. Only a link to a folder that
contains the link itself is skipped, as it would recurse forever.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import posixpath
import stat
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from preprocess.zip_names import names_in
from shards.errors import DatasetError, StorageError
from shards.files.plain_file import LARGEST_PICTURE, LARGEST_TEXT, plain_size, read_plain
from shards.files.storage import local_path

_OF_THE_SYSTEM = {".DS_Store", "__MACOSX", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints"}
_MAX_LINKS = 40  # links followed to resolve one path, as in Linux
_LONGEST_LINK = 4096  # bytes of the path that a link holds, as in Linux
_log = logging.getLogger(__name__)
# What zipfile raises on damaged, encrypted or unusual archives; all have a useful message.
_ZIP_ERRORS = (OSError, KeyError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
               struct.error)


class SourceTree(Protocol):
    """A read-only tree of files, addressed by '/'-separated paths relative to its root.

    left_out   the hidden files and folders, and those of operating systems, that `files` has skipped so far
    """

    name: str
    left_out: set[str]

    def files(self, folder: str) -> dict[str, int]:
        """Path -> size in bytes of every file below `folder`, in name order, without hidden files.

        Empty if there is no such folder. Raises DatasetError when a folder cannot be read.
        """

    def has_files(self, folder: str) -> bool:
        """Whether `files` would find any; stops at the first one."""

    def read(self, path: str, most: int = LARGEST_PICTURE) -> bytes:
        """Content of a file of at most `most` bytes. Raises NoSuchFile, or DatasetError naming it."""


class NoSuchFile(DatasetError):
    """A tree does not have a file; one that cannot be read is another error."""


class HashedTree:
    """Wraps a tree and records the sha256 of every file read through it."""

    def __init__(self, tree: SourceTree) -> None:
        self.tree, self.name, self.left_out = tree, tree.name, tree.left_out
        self.sha256: dict[str, str] = {}

    def files(self, folder: str) -> dict[str, int]:
        return self.tree.files(folder)

    def has_files(self, folder: str) -> bool:
        return self.tree.has_files(folder)

    def read(self, path: str, most: int = LARGEST_PICTURE) -> bytes:
        data = self.tree.read(path, most)
        self.sha256[path] = hashlib.sha256(data).hexdigest()
        return data


class _Entry(NamedTuple):
    """One entry of a folder."""

    name: str
    real: str  # path with links resolved; '/'-separated
    size: int | None  # bytes of a file; None for a folder
    is_link: bool


class _LinkedTree(ABC):
    """A `SourceTree` that follows links; subclasses look up folders and links."""

    name: str

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self._warned: set[str] = set()  # skipped links, so that each is reported once

    def files(self, folder: str) -> dict[str, int]:
        return dict(self._below(folder))

    def has_files(self, folder: str) -> bool:
        return any(True for _ in self._below(folder))

    def _below(self, folder: str) -> Iterator[tuple[str, int]]:
        names = [name for name in folder.split("/") if name]
        above = [self._real("/".join(names[:depth])) for depth in range(len(names) + 1)]
        return self._walk("/".join(names), [real for real in above if real is not None]) if above[-1] else iter(())

    def _walk(self, folder: str, above: list[str]) -> Iterator[tuple[str, int]]:
        """`above`: resolved paths of the folders from the root down to `folder`, which comes last."""
        for entry in sorted(self._entries(above[-1])):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or is_of_the_system(entry.name):
                self.left_out.add(path)
                continue
            if entry.size is not None:
                yield path, entry.size
            elif entry.is_link and any(_holds(entry.real, place) for place in above):
                self._warn_of_cycle(path, entry.real)
            else:
                yield from self._walk(path, [*above, entry.real])

    def _warn_of_cycle(self, path: str, real: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            _log.warning("%s: skipping the link %s to its own parent folder %s, which would recurse forever", self.name,
                         path, real)

    @abstractmethod
    def _real(self, path: str) -> str | None:
        """The folder `path` with links resolved, never empty; None if there is no such folder."""

    @abstractmethod
    def _entries(self, real: str) -> Iterator[_Entry]:
        """The entries of a folder, given by its resolved path."""


def is_of_the_system(name: str) -> bool:
    """Whether an operating system or a tool has left this file or folder, which is never part of a dataset."""
    return name.startswith("._") or name in _OF_THE_SYSTEM


def _holds(folder: str, place: str) -> bool:
    return f"{place}/".startswith(f"{folder.rstrip('/')}/")


class FolderTree(_LinkedTree):
    """A directory on disk."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.name = root, str(root)

    def read(self, path: str, most: int = LARGEST_PICTURE) -> bytes:
        try:
            return read_plain(self.root / path, most)
        except StorageError as error:
            raise DatasetError(str(error)) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NoSuchFile(f"{self.root / path} cannot be read: {error.strerror}") from error
        except OSError as error:
            raise DatasetError(f"{self.root / path} cannot be read: {error.strerror or error}") from error

    def _real(self, path: str) -> str | None:
        place = self.root / path
        return os.path.realpath(place) if place.is_dir() else None

    def _entries(self, real: str) -> Iterator[_Entry]:
        try:
            with os.scandir(real) as items:
                found = list(items)
        except OSError as error:
            raise DatasetError(f"folder {real} cannot be read: {error.strerror or error}") from error
        for item in found:
            _check_name(item)
            is_link = item.is_symlink()
            place = os.path.realpath(item.path) if is_link else item.path
            yield _Entry(item.name, place, None if _is_folder(item) else _size(item), is_link)


def _check_name(item: os.DirEntry[str]) -> None:
    try:
        item.name.encode("utf-8")
    except UnicodeEncodeError:
        raise DatasetError(f"{item.path!r}: the file name is not valid UTF-8; rename it") from None


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself or to something inaccessible: reading it will report the error
        return False


def _size(item: os.DirEntry[str]) -> int:
    """Bytes of a file; 0 for a dangling link, which reading will report."""
    try:
        return item.stat().st_size
    except OSError:
        return 0


class ZipTree(_LinkedTree):
    """A zip archive, read in place; `inside` is the folder in the archive that acts as root ("" or "name/")."""

    def __init__(self, path: Path, inside: str = "") -> None:
        super().__init__()
        self.path, self.inside, self.name = path, inside, f"{path}:{inside}"
        try:
            self._archive = zipfile.ZipFile(path)
            self._names = names_in(self._archive)
            self._links = {member: self._content(item, _LONGEST_LINK).decode()
                           for member, item in self._names.files.items() if stat.S_ISLNK(item.external_attr >> 16)}
        except _ZIP_ERRORS as error:
            raise DatasetError(f"{path} is not a readable zip archive: {error}") from error
        self._folders: dict[str, dict[str, int | None]] = {}  # built by the first listing; workers never list

    def read(self, path: str, most: int = LARGEST_PICTURE) -> bytes:
        member = self._followed(self.inside + path)
        if member not in self._names.files:
            raise NoSuchFile(f"{self.name}{path} cannot be read: there is no such file in the archive")
        try:
            return self._content(self._names.files[member], most)
        except _ZIP_ERRORS as error:
            raise DatasetError(f"{self.name}{path} cannot be read: {error}") from error

    def _content(self, item: zipfile.ZipInfo, most: int) -> bytes:
        """The content of an entry; more than it is said to have is never unpacked."""
        if item.file_size > most:
            raise DatasetError(f"{self.path}:{item.filename} has {item.file_size} bytes unpacked, legal: at most "
                               f"{most}")
        with self._archive.open(item) as file:
            data = file.read(item.file_size)
        if len(data) != item.file_size:
            raise EOFError(f"it ends after {len(data)} of {item.file_size} bytes")
        return data

    def _followed(self, member: str) -> str:
        """The member a path leads to, with all links resolved; a name that does not exist if a link is dangling."""
        for _ in range(_MAX_LINKS if self._links else 0):
            parts = member.split("/")
            prefixes = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            link = next((prefix for prefix in prefixes if prefix in self._links), None)
            if link is None:
                break
            target = posixpath.join(posixpath.dirname(link), self._links[link])
            member = posixpath.normpath(target + member[len(link):])
        return "" if member == "." else member

    def _real(self, path: str) -> str | None:
        place = self._followed((self.inside + path).rstrip("/"))
        return f"/{place}" if place in self._listed() else None

    def _entries(self, real: str) -> Iterator[_Entry]:
        folder = real.strip("/")
        for name, size in self._listed()[folder].items():
            member = f"{folder}/{name}" if folder else name
            is_link = member in self._links
            place = self._followed(member) if is_link else member
            if is_link:
                size = None if place in self._listed() else self._size_of(place)
            yield _Entry(name, f"/{place}", size, is_link)

    def _size_of(self, member: str) -> int:
        return self._names.files[member].file_size if member in self._names.files else 0

    def _listed(self) -> dict[str, dict[str, int | None]]:
        """Folder -> name -> size of a file, or None for a folder; the archive's root is ""."""
        if not self._folders:
            self._folders = {folder: {} for folder in self._names.folders}
            sizes = {path: item.file_size for path, item in self._names.files.items()}
            for path, size in (dict.fromkeys(self._names.folders - {""}) | sizes).items():
                folder, _, name = path.rpartition("/")
                self._folders[folder][name] = size
        return self._folders

    def __reduce__(self) -> tuple[type[ZipTree], tuple[Path, str]]:
        return ZipTree, (self.path, self.inside)  # workers open the archive themselves


def open_tree(root: str | Path, markers: Sequence[str]) -> SourceTree:
    """The tree that has one of the folders `markers` at `root`, or one level below it; earlier markers come first.

    Raises DatasetError when `root` does not exist or has no such folder, ConfigError for a URL.
    """
    path = local_path(str(root), "dataset.root", "folder or zip archive")
    if not path.exists():
        raise DatasetError(f"{path} does not exist; dataset.root must be the dataset folder or zip archive")
    if path.is_dir():
        below = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        trees = [FolderTree(path), *map(FolderTree, below)]
        found = next((tree for marker in markers for tree in trees if tree.has_files(marker)), None)
        if found is not None:
            return found
    else:
        _check_archive(path)
        archive = ZipTree(path)
        insides = ["", *sorted({f"{name.partition('/')[0]}/" for name in archive.files("") if "/" in name})]
        inside = next((inside for marker in markers for inside in insides if archive.has_files(inside + marker)), None)
        if inside is not None:
            return ZipTree(path, inside) if inside else archive
    folders = " or ".join(map(repr, dict.fromkeys(markers)))
    raise DatasetError(f"{path} has no folder {folders} with files in it; check dataset.root and dataset.kind")


def _check_archive(path: Path) -> None:
    """Opening a named pipe would hang."""
    try:
        plain_size(path)
    except StorageError as error:
        raise DatasetError(f"dataset.root: {error}, which is a zip archive, or a folder") from error


def read_first(tree: SourceTree, paths: Sequence[str], most: int = LARGEST_TEXT) -> tuple[str, bytes]:
    """(path, content) of the first of `paths` that exists, of at most `most` bytes.

    Raises NoSuchFile naming the first one when there is none, DatasetError when it cannot be read.
    """
    problem: NoSuchFile | None = None
    for path in paths:
        try:
            return path, tree.read(path, most)
        except NoSuchFile as error:
            problem = problem or error
    assert problem is not None
    raise problem
