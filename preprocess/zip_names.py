"""The entries of a zip archive by path. Programs write names in many ways; here they become one, or are refused.

    a//b   ./a/b   /a/b          a/b
    a\\b, packed on Windows       a/b; elsewhere, a backslash is part of a name
    a/../b                       refused: it may lead out of the archive
    the same path twice          refused: programs do not agree on which one they take
    a and a/b, if a is a file    refused: no folder could hold both
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from shards.errors import DatasetError

_MS_DOS = 0  # `create_system` of archives that were packed on Windows
_ADVICE = "pack the archive again"


class Names(NamedTuple):
    """Path -> entry of each file and link, and the paths of all folders; "" is the root."""

    files: dict[str, zipfile.ZipInfo]
    folders: set[str]


def names_in(archive: zipfile.ZipFile) -> Names:
    """The entries of an archive. Raises DatasetError naming the archive and the entry that has no place in it."""
    files: dict[str, zipfile.ZipInfo] = {}
    folders = {""}
    for item in archive.infolist():
        written = item.filename.replace("\\", "/") if item.create_system == _MS_DOS else item.filename
        parts = [part for part in written.split("/") if part not in ("", ".")]
        path, is_folder = "/".join(parts), written.endswith("/")
        if ".." in parts:
            raise _error(archive, item, f"has a part '..', legal: paths below the archive's root; {_ADVICE}")
        if not parts and not is_folder:
            raise _error(archive, item, f"is a file without a name; {_ADVICE}")
        if not is_folder and path in files:
            other = files[path].filename
            as_well = "" if other == item.filename else f", as {other!r} does"
            raise _error(archive, item, f"names {path!r}{as_well or ' twice'}, legal: once; {_ADVICE}")
        if not is_folder:
            files[path] = item
        folders.update(_above(path, folders))
        if is_folder:
            folders.add(path)
    for path in sorted(files.keys() & folders):
        raise _error(archive, files[path], f"is a file, but other entries are below {path + '/'!r}; {_ADVICE}")
    return Names(files, folders)


def _above(path: str, known: set[str]) -> Iterator[str]:
    """The folders above a path that are not known yet."""
    while (path := path.rpartition("/")[0]) and path not in known:
        yield path


def _error(archive: zipfile.ZipFile, item: zipfile.ZipInfo, problem: str) -> DatasetError:
    return DatasetError(f"{archive.filename}: the entry {item.filename!r} {problem}")
