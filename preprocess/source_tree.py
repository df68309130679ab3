"""Read files from a dataset's folder or zip archive through one small interface."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from shards.errors import DatasetError


class SourceTree(Protocol):
    """A read-only tree of files, addressed by '/'-separated paths relative to its root."""

    name: str

    def files(self, folder: str) -> dict[str, int]:
        """Path -> size in bytes of every file below `folder`, hidden files left out; empty when there is none."""

    def read(self, path: str) -> bytes:
        """Content of a file. Raises DatasetError naming it."""


class FolderTree:
    """A directory on disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def files(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        visited: set[str] = set()  # real folders: links may lead back up
        for parent, folders, names in os.walk(self.root / folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            real = os.path.realpath(parent)
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            found |= {self._path(Path(parent, name)): _size(Path(parent, name)) for name in names if name[0] != "."}
        return found

    def _path(self, path: Path) -> str:
        relative = path.relative_to(self.root).as_posix()
        try:
            relative.encode("utf-8")
        except UnicodeEncodeError:
            raise DatasetError(f"{path!r}: the file name is not valid UTF-8; rename it") from None
        return relative

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise DatasetError(f"{self.root / path} cannot be read: {error}") from error


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a dangling link, which reading will then name."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class ZipTree:
    """A zip archive, read in place; `inside` is the folder of the archive that acts as root."""

    def __init__(self, path: Path, inside: str = "") -> None:
        self.path, self.inside, self.name = path, inside, f"{path}:{inside}"
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{path} is not a readable zip archive: {error}") from error

    def files(self, folder: str) -> dict[str, int]:
        prefix = f"{self.inside}{folder}/" if folder else self.inside
        return {
            item.filename[len(self.inside) :]: item.file_size
            for item in self._archive.infolist()
            if item.filename.startswith(prefix) and not item.is_dir()
            and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(item.filename).parts)
        }

    def read(self, path: str) -> bytes:
        try:
            return self._archive.read(self.inside + path)
        except (OSError, KeyError, zipfile.BadZipFile, RuntimeError, zlib.error, EOFError) as error:
            raise DatasetError(f"{self.name}{path} cannot be read: {error}") from error

    def __reduce__(self) -> tuple[type[ZipTree], tuple[Path, str]]:
        return ZipTree, (self.path, self.inside)  # workers open the archive themselves


def open_tree(root: str | Path, marker: str) -> SourceTree:
    """The tree in which the folder `marker` lies at the root, or one folder below it.

    Raises DatasetError when `root` does not exist or holds no such folder.
    """
    path = Path(root)
    if not path.exists():
        raise DatasetError(f"{path} does not exist; dataset.root must be the dataset's folder or zip archive")
    if path.is_file():
        archive = ZipTree(path)
        names = sorted({PurePosixPath(name).parts[0] for name in archive.files("")})
        candidates: list[SourceTree] = [archive, *(ZipTree(path, f"{name}/") for name in names)]
    else:
        below = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        candidates = [FolderTree(path), *(FolderTree(child) for child in below if (child / marker).is_dir())]
    for tree in candidates:
        if tree.files(marker):
            return tree
    raise DatasetError(f"{path} holds no folder {marker!r} with files in it: is it the right dataset.root and kind?")
