"""What `trainer/predict.py` is given, as single files: images, folders, globs, lists, and URLs of object storage."""

from __future__ import annotations

import glob
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL.TiffImagePlugin import TiffImageFile

from shards.errors import ConfigError, CorruptShardError, StorageError
from shards.files.plain_file import LARGEST_PICTURE, plain_size, read_plain, read_plain_text
from shards.files.storage import LARGEST_WHOLE, Storage, is_remote, open_storage, read_checked
from shards.picture_file import MAX_PIXELS, exif_orientation, kind_of, load_picture, open_picture, upright
from shards.sample import decode_upright
from trainer.out_of_memory import OutOfMemory

TIFF_SUFFIXES = (".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", *TIFF_SUFFIXES, *VIDEO_SUFFIXES)
_OTHER_FORMATS = ("WebP", "TIFF", "BMP")
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_THREADS, _AHEAD = 2, 3  # that decode, and the most images that they have begun
Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


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

    @property
    def may_be_raster(self) -> bool:
        """By its suffix: whether it is to be read in parts depends on what is in it."""
        return self.name.suffix.lower() in TIFF_SUFFIXES

    @contextmanager
    def local(self) -> Iterator[Path]:
        """It as a local file, for what is read in any order: videos and rasters. Raises StorageError for one that is
        not a regular file, at which other programs would wait, and OSError."""
        if self.path is not None:
            plain_size(self.path)
            yield self.path
            return
        with tempfile.NamedTemporaryFile(suffix=self.name.suffix) as file:
            file.write(self.read())
            file.flush()
            yield Path(file.name)


def sources_of(given: Sequence[str], lists: Sequence[Path], output: Path) -> list[Source]:
    """The files, in the order given; those of folders and globs sorted, with their sub-folders kept in the names.
    Hidden files, and what folders and globs find in `output` below them, are left out.

    Raises ConfigError for a folder, glob or list without a file, for a list that cannot be read, and if nothing is
    given. Files that do not exist are found out when they are read, so that one does not stop the others.
    """
    storages = cache(open_storage)  # one client for all files of a folder
    found = [source for text in [*given, *(line for path in lists for line in _lines(path))]
             for source in _found_at(text, output, storages)]
    if not found:
        raise ConfigError("nothing to predict: give images, folders, globs, URLs or --list FILE")
    once: dict[str, Source] = {}
    for source in found:
        if ".." in source.name.parts or source.name.is_absolute():
            raise ConfigError(f"{source.shown}: its name would lead out of the output folder")
        once.setdefault(source.shown if source.path is None else str(source.path.absolute()), source)
    return list(once.values())


def decoded_ahead(sources: Iterable[Source]) -> Iterator[tuple[Source, Future[Pixels] | None]]:
    """Each source in order, with its pixels as `decode_input` gives them. Threads read and decode the next ones while
    the caller works; the future raises what reading and decoding raise. None for what is not decoded as a whole, or
    perhaps not: a video or TIFF."""
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
    begun: deque[tuple[Source, Future[Pixels] | None]] = deque()
    left = iter(sources)
    try:
        while True:
            for source in islice(left, _AHEAD - len(begun)):
                in_parts = source.is_video or source.may_be_raster
                begun.append((source, None if in_parts else threads.submit(_decode, source)))
            if not begun:
                return
            yield begun.popleft()
    finally:
        threads.shutdown(cancel_futures=True)


def _decode(source: Source) -> Pixels:
    try:
        return decode_input(source.read(), source.shown)
    except MemoryError as error:
        raise OutOfMemory(f"{source.shown}: there is not enough memory to decode it") from error


def decode_input(data: bytes, name: str) -> Pixels:
    """RGB pixels uint8 [H, W, 3], upright, of a JPEG, PNG, WebP, BMP or TIFF with 8 bits per channel. Raises
    CorruptShardError."""
    if kind_of(data) not in _OTHER_FORMATS:
        return decode_upright(data, name)
    with open_picture(data, name, _OTHER_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise CorruptShardError(f"{name} is {image.width}x{image.height} pixels, legal: at most {MAX_PIXELS} in "
                                    "all; a TIFF is read in parts with: pip install 'maskstream[geo]'")
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) if isinstance(image, TiffImageFile) else 8
        if bits > 8 or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):  # Pillow cuts RGB to 8
            raise CorruptShardError(f"{name} has pixels of kind {image.mode} with {bits} bits; convert it to 8 bits "
                                    "per channel")
        pixels = np.asarray(load_picture(image, name).convert("RGB"))
    return upright(pixels, exif_orientation(data))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_plain_text(path).splitlines()]
    except (OSError, StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"--list {path} cannot be read: {error}") from error
    if not any(lines):
        raise ConfigError(f"--list {path} is empty, legal: one image, folder, glob or URL per line")
    return [line for line in lines if line]


def _found_at(text: str, output: Path, storages: Callable[[str], Storage]) -> Iterator[Source]:
    if not text:
        raise ConfigError("an image's name is empty")
    if is_remote(text):
        yield from _remote(text, storages)
        return
    path = Path(text)
    if path.is_dir():
        yield from _below(path, path.rglob("*"), text, output)
    elif glob.has_magic(text) and not path.exists():
        fixed, pattern = _split_glob(text)
        try:
            paths = list(fixed.glob(pattern))
        except ValueError as error:  # "**" in a name
            raise ConfigError(f"{text} is not a legal glob: {error}") from error
        yield from _below(fixed, paths, text, output)
    else:
        yield Source(name=PurePosixPath(path.name), shown=text, read=partial(read_plain, path, LARGEST_PICTURE),
                     path=path)


def _below(folder: Path, paths: Iterable[Path], text: str, output: Path) -> Iterator[Source]:
    whole, written = folder.resolve(), output.resolve()
    own = written.relative_to(whole) if whole in written.parents else None
    names = {path: PurePosixPath(path.relative_to(folder)) for path in sorted(paths)}
    chosen = [path for path, name in names.items()  # also links to nothing, which are reported when they are read
              if own not in name.parents and _is_wanted(name) and not path.is_dir()]
    if not chosen:
        raise _nothing_in(text)
    for path in chosen:
        yield Source(name=names[path], shown=str(path), path=path, read=partial(read_plain, path, LARGEST_PICTURE))


def _is_wanted(name: PurePosixPath) -> bool:
    return name.suffix.lower() in _SUFFIXES and not any(part.startswith(".") and part != ".." for part in name.parts)


def _nothing_in(text: str) -> ConfigError:
    return ConfigError(f"{text} contains no image or video, legal suffixes: {', '.join(_SUFFIXES)}")


def _split_glob(text: str) -> tuple[Path, str]:
    """The folder up to the first wildcard, and the rest."""
    parts = Path(text).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed]), str(Path(*parts[fixed:]))


def _remote(url: str, storages: Callable[[str], Storage]) -> Iterator[Source]:
    """A query, as in a signed URL, belongs to the folder as to its files."""
    location, mark, query = url.partition("?")
    root, _, last = location.rstrip("/").rpartition("/")
    if last.lower().endswith(_SUFFIXES) and not root.endswith("/"):
        storage = storages(f"{root}{mark}{query}")
        names = [unquote(last) if url.lower().startswith("http") else last]
    else:
        storage = storages(url)
        sizes = storage.sizes(deep=True)
        if sizes is None:
            raise ConfigError(f"{url} cannot be listed; give the URLs of its images, for example with --list FILE")
        names = sorted(name for name in sizes if _is_wanted(PurePosixPath(name)))
        if not names:
            raise _nothing_in(url)
    for name in names:
        most = LARGEST_WHOLE if name.lower().endswith((*VIDEO_SUFFIXES, *TIFF_SUFFIXES)) else LARGEST_PICTURE
        yield Source(name=PurePosixPath(name), shown=storage.where(name),
                     read=partial(read_checked, storage, name, bytes, most))
