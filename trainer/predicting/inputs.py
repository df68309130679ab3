"""What `trainer/predict.py` is given, as single files: images, folders, globs, lists, and URLs of object storage."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError, CorruptShardError
from shards.files.plain_file import LARGEST_PICTURE, read_plain
from shards.files.storage import is_remote, open_storage
from shards.picture_file import MAX_PIXELS, exif_orientation, kind_of, load_picture, open_picture, upright
from shards.sample import decode_upright

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
_OTHER_FORMATS = ("WebP", "TIFF", "BMP")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to predict.

    name   where its outputs go below the output folder, with its own suffix
    shown  path or URL, for messages
    path   where it lies, if it is a local file
    """

    name: PurePosixPath
    shown: str
    read: Callable[[], bytes]
    path: Path | None = None

    @property
    def is_video(self) -> bool:
        """By its suffix."""
        return self.name.suffix.lower() in VIDEO_SUFFIXES


def sources_of(given: Sequence[str], lists: Sequence[Path] = ()) -> list[Source]:
    """The files, in the order given; those of folders and globs sorted, with their sub-folders kept in the names.

    Raises ConfigError for a folder, glob or list without a file, for a list that cannot be read, and if nothing is
    given. Files that do not exist are found out when they are read, so that one does not stop the others.
    """
    found: list[Source] = []
    for text in given:
        found += _found_at(text)
    for path in lists:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--list {path} cannot be read: {error}") from error
        entries = [line.strip() for line in lines if line.strip()]
        if not entries:
            raise ConfigError(f"--list {path} is empty, legal: one image, folder, glob or URL per line")
        for text in entries:
            found += _found_at(text)
    if not found:
        raise ConfigError("nothing to predict: give images, folders, globs, URLs or --list FILE")
    once: dict[Path | str, Source] = {}
    for source in found:
        once.setdefault(source.shown if source.path is None else source.path.resolve(), source)
    return list(once.values())


def decode_input(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3], upright, of a JPEG, PNG, WebP, BMP or TIFF with 8 bits per channel. Raises
    CorruptShardError."""
    if kind_of(data) not in _OTHER_FORMATS:
        return decode_upright(data, name)
    with open_picture(data, name, _OTHER_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise CorruptShardError(f"{name} is {image.width}x{image.height} pixels, legal: at most {MAX_PIXELS} in "
                                    "all; a TIFF is read in parts with: pip install 'maskstream[geo]'")
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise CorruptShardError(f"{name} has pixels of kind {image.mode}; convert it to 8 bits per channel")
        pixels = np.asarray(load_picture(image, name).convert("RGB"))
    return upright(pixels, exif_orientation(data))


def _found_at(text: str) -> Iterator[Source]:
    if is_remote(text):
        yield from _remote(text)
        return
    path = Path(text)
    if path.is_dir():
        yield from _below(path, sorted(path.rglob("*")), text)
    elif glob.has_magic(text) and not path.exists():
        fixed, pattern = _split_glob(text)
        yield from _below(fixed, sorted(fixed.glob(pattern)), text)
    else:
        yield Source(name=PurePosixPath(path.name), shown=text, read=partial(read_plain, path, LARGEST_PICTURE),
                     path=path)


def _below(folder: Path, paths: Sequence[Path], text: str) -> Iterator[Source]:
    chosen = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
              and not path.name.startswith(".") and path.is_file()]
    if not chosen:
        raise ConfigError(f"{text} contains no image or video, legal suffixes: "
                          f"{', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}")
    for path in chosen:
        yield Source(name=PurePosixPath(path.relative_to(folder).as_posix()), shown=str(path), path=path,
                     read=partial(read_plain, path, LARGEST_PICTURE))


def _split_glob(text: str) -> tuple[Path, str]:
    """The folder up to the first wildcard, and the rest."""
    parts = Path(text).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed]), str(Path(*parts[fixed:]))


def _remote(url: str) -> Iterator[Source]:
    suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    root, _, last = url.rstrip("/").rpartition("/")
    if last.lower().endswith(suffixes) and not root.endswith("/"):
        storage, names = open_storage(root), [last]
    else:
        storage = open_storage(url)
        sizes: dict[str, Any] | None = storage.sizes()
        if sizes is None:
            raise ConfigError(f"{url} cannot be listed; give the URLs of its images, for example with --list FILE")
        names = sorted(name for name in sizes if name.lower().endswith(suffixes))
        if not names:
            raise ConfigError(f"{url} contains no image or video, legal suffixes: {', '.join(suffixes)}")
    for name in names:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise ConfigError(f"{storage.where(name)}: its name would lead out of the output folder")
        yield Source(name=PurePosixPath(name), shown=storage.where(name), read=partial(storage.read, name))
