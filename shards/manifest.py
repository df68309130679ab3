"""The manifest: what a complete shard set consists of. It is published last, so its presence means 'whole'.

    <root>/manifest.json    this file
    <root>/<split>.index    one INDEX_DTYPE record per sample, in shard order
    <root>/<split>-000000.tar …
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import CorruptShardError, FormatVersionError, ShardError
from shards.files.outside_json import built, parse_json
from shards.files.storage import LocalStorage, Storage, open_storage, read_checked
from shards.rle import MAX_CLASSES, MAX_SIDE, ignore_value
from shards.shown_text import has_control_characters, shown

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_SPLIT_NAME, _SHA256 = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"[0-9a-f]{64}")
_LEAST_SAMPLE = 2048  # bytes: two tar headers, an image, its masks
_LARGEST = 512 << 20  # bytes of a manifest; a million shards take half of it
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.(tar|index)")  # no folder, no dot files: nothing outside the root

# Little-endian record per sample: where its tar members start, how long they are together, their CRC-32.
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True, kw_only=True)
class ClassInfo:
    """A class: its position in the list is its id. Raises ValueError for what no terminal or picture can show."""

    name: str
    color: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not self.name or has_control_characters(self.name):
            raise ValueError(f"a class is named '{shown(self.name)}', legal: text without control characters")
        if not all(type(value) is int and 0 <= value <= 255 for value in self.color):
            raise ValueError(f"colour {self.color}, legal: three integers from 0 to 255")


def class_table(classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    """Classes as plain containers, for files of other kinds."""
    return [{"name": info.name, "color": list(info.color)} for info in classes]


def classes_from_table(table: Any) -> list[ClassInfo]:
    """Inverse of `class_table`. Raises ValueError naming the class that is malformed."""
    if not isinstance(table, list):
        raise ValueError(f"the class table is a {type(table).__name__}, legal: a list")
    return [built(ClassInfo, item, f"class {number}") for number, item in enumerate(table)]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One finished tar file."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """The side index of a split."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split. `class_pixels` and `class_samples` count labelled pixels and samples holding each class."""

    kind: str  # "crops" or "images"
    images: int
    samples: int
    shards: list[ShardInfo]
    index: IndexInfo
    class_pixels: list[int]
    class_samples: list[int]
    ignored_pixels: int
    skipped_crops: dict[str, int] = field(default_factory=dict)  # reason -> crops
    skipped_images: list[dict[str, str]] = field(default_factory=list)  # {"image", "reason"}

    @property
    def labelled_pixels(self) -> int:
        """Of all samples."""
        return sum(self.class_pixels)

    @property
    def pixels(self) -> int:
        """Of all samples together: no single one can be larger."""
        return self.labelled_pixels + self.ignored_pixels

    @property
    def ignored_share(self) -> float:
        """Of all pixels, the padding of crops included."""
        return self.ignored_pixels / max(1, self.pixels)

    @property
    def absent_classes(self) -> list[int]:
        """Ids of the classes without a pixel."""
        return [number for number, pixels in enumerate(self.class_pixels) if not pixels]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete shard set."""

    dataset: str
    classes: list[ClassInfo]
    ignore_index: int
    seed: int
    crops: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    producer: dict[str, str]
    splits: dict[str, SplitInfo]
    sources: dict[str, str] = field(default_factory=dict)  # block -> hash of the files it was made of; {}: unknown
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def names_of(self, ids: list[int], most: int) -> str:
        """Ids and names of classes for people, at most so many."""
        named = "; ".join(f"{number} {self.classes[number].name}" for number in ids[:most])
        return f"{named} and {len(ids) - most} more" if len(ids) > most else named

    def most_pixels(self, split: str) -> int:
        """What a sample of a split can have at most: crops have one size, and no sample has more than all together."""
        info, side = self.split(split), self.crops.get("stored_size") or self.crops.get("size")
        return min(info.pixels, side**2) if info.kind == "crops" and isinstance(side, int) else info.pixels

    @property
    def sha256(self) -> str:
        """Of everything in it, and so of every shard: the identity of the data."""
        return hash_of(_content(self))

    def split(self, name: str) -> SplitInfo:
        """Raises ShardError naming the splits there are."""
        if name not in self.splits:
            raise ShardError(f"the shard set has no split {name!r}, it has: {', '.join(sorted(self.splits))}")
        return self.splits[name]


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, fixed separators. Hashes are taken over it."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)


def hash_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file's content: the manifest plus a hash of itself, so that an edited or damaged one is noticed."""
    content = _content(manifest)
    return (canonical_json({**content, "manifest_sha256": hash_of(content)}) + "\n").encode()


def _content(manifest: Manifest) -> dict[str, Any]:
    """Its fields; one that older versions did not write only where it says something, so that their sets keep their
    hash."""
    content = dataclasses.asdict(manifest)
    if not manifest.sources:
        del content["sources"]
    return content


def load_manifest(root: str | Path | Storage) -> Manifest:
    """Read and check `<root>/manifest.json`.

    Raises ShardError when there is none (the set is incomplete or this is not one), FormatVersionError
    when it is newer than this code, CorruptShardError when it is damaged or inconsistent.
    """
    storage = open_storage(root)
    path = storage.where(MANIFEST_NAME)
    try:
        return read_checked(storage, MANIFEST_NAME, lambda data: parse_manifest(data, path), _LARGEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = not isinstance(storage, LocalStorage) and f" ({error})"
        raise ShardError(
            f"{path} does not exist: {storage.root} is not a shard set, or writing it did not finish{missing or ''}. "
            "Rerun the same preprocess/make_shards.py command to complete it."
        ) from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error}") from error


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Inverse of `manifest_bytes`; `name` is used in errors."""
    content = parse_json(data, name, CorruptShardError)
    if type(content.get("format_version")) is not int:
        raise CorruptShardError(f"{name} has no integer field 'format_version'")
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise FormatVersionError(f"{name} has format_version {version}, this code knows {FORMAT_VERSION}")
    try:
        recorded = content.pop("manifest_sha256", None)
        if recorded != hash_of(content):
            raise CorruptShardError(f"{name} does not match its own manifest_sha256: it was damaged or edited")
        manifest = built(Manifest, content)
        _check_consistency(manifest, name)
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptShardError(f"{name} lacks or misspells a field: {error}") from error
    return manifest


def _check_consistency(manifest: Manifest, name: str) -> None:
    if manifest.ignore_index != ignore_value(len(manifest.classes)):
        raise CorruptShardError(f"{name}: ignore_index {manifest.ignore_index!r} does not suit the number of classes")
    if not all(type(block) is type(sources) is str for block, sources in manifest.sources.items()):
        raise CorruptShardError(f"{name}: 'sources' does not hold a hash for each block")
    names = [info.name for info in manifest.classes]
    if not 1 <= len(names) <= MAX_CLASSES or len(set(names)) != len(names):
        raise CorruptShardError(f"{name}: {len(names)} classes of {len(set(names))} names, legal: 1 to {MAX_CLASSES}, "
                                "each with a name of its own")
    files: set[str] = set()
    for split_name, split in manifest.splits.items():
        where = f"{name}, split {split_name!r}"
        if not _SPLIT_NAME.fullmatch(split_name) or split.kind not in ("crops", "images"):
            raise CorruptShardError(f"{where}: a name of letters, digits, _ and - and a kind (now {split.kind!r}) of "
                                    "crops or images are legal")
        _check_counts(split, len(manifest.classes), where)
        _check_files(split, files, where)
    if not manifest.splits:
        raise CorruptShardError(f"{name}: it has no split")


def _check_counts(split: SplitInfo, num_classes: int, where: str) -> None:
    if sum(shard.samples for shard in split.shards) != split.samples:
        raise CorruptShardError(f"{where}: sample counts of the shards do not add up to {split.samples}")
    for shard in split.shards:
        if shard.samples * _LEAST_SAMPLE > shard.bytes:
            raise CorruptShardError(f"{where}: {shard.name} has {shard.samples} samples in {shard.bytes} bytes, legal: "
                                    f"{_LEAST_SAMPLE} bytes each at least")
    if split.index.bytes != split.samples * INDEX_DTYPE.itemsize:
        raise CorruptShardError(f"{where}: the index has {split.index.bytes} bytes for {split.samples} samples")
    for counts in (split.class_pixels, split.class_samples):
        if len(counts) != num_classes:
            raise CorruptShardError(f"{where}: counts for {len(counts)} classes, expected {num_classes}")
    if max(split.class_samples) > split.samples or split.pixels > split.samples * MAX_SIDE**2:
        raise CorruptShardError(f"{where}: {split.samples} samples cannot hold {split.pixels} pixels, or a class in "
                                f"{max(split.class_samples)} samples")


def _check_files(split: SplitInfo, files: set[str], where: str) -> None:
    """Plain names, each once in the whole set (`files`), with hashes that are some."""
    listed: list[ShardInfo | IndexInfo] = [*split.shards, split.index]
    for file in listed:
        if not _FILE_NAME.fullmatch(file.name) or file.name in files:
            raise CorruptShardError(f"{where}: {file.name!r} is not a plain file name, or comes twice")
        if not _SHA256.fullmatch(file.sha256):
            raise CorruptShardError(f"{where}: the sha256 of {file.name} is {file.sha256[:80]!r}, legal: 64 "
                                    "hexadecimal digits")
        files.add(file.name)
