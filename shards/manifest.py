"""The manifest of a shard set. It is written last, so its presence means that the set is complete.

    <root>/manifest.json    the manifest; its size does not grow with the number of shards
    <root>/<split>.shards   one SHARD_DTYPE record per shard (in version 1, the manifest lists the shards itself)
    <root>/<split>.index    one INDEX_DTYPE record per sample, in shard order
    <root>/<split>.sources  32 bytes per block: sha256 of its source files (in version 1, in the manifest)
    <root>/<split>.classes  the classes of each sample (not in versions 1 and 2): `shards.sampling`
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
from shards.files.outside_json import LARGEST_INTEGER, built, parse_json
from shards.files.storage import LocalStorage, Storage, open_storage, read_checked
from shards.rle import MAX_CLASSES, MAX_SIDE, ignore_value
from shards.shown_text import has_control_characters, shown

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
MANIFEST_NAME = "manifest.json"
_SPLIT_NAME, _SHA256 = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"[0-9a-f]{64}")
MIN_SAMPLE_BYTES = 2048  # two tar headers, an image, its masks
_MAX_MANIFEST_BYTES = 512 << 20  # in version 1, a million shards take half of it
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.(tar|index|shards|sources|classes)")  # no folders: nothing outside the root
_MAX_SHARDS = 1 << 32
_LONGEST_NAME = 1000  # characters of a class name

# Little-endian record per sample: offset of its tar members, their total length, their CRC-32.
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
# Little-endian record per shard: the number in its name, its samples and bytes, the CRC-32 of its part of the index,
# its sha256.
SHARD_DTYPE = np.dtype([("number", "<u4"), ("samples", "<u4"), ("bytes", "<u8"), ("index_crc32", "<u4"),
                        ("sha256", "V32")])
SOURCE_BYTES = 32  # per block in <split>.sources
CLASS_DTYPE = np.dtype("<u2")  # in <split>.classes: the number of classes of each sample, then their ids


@dataclass(frozen=True, kw_only=True)
class ClassInfo:
    """A class; its id is its position in the list. Raises ValueError for a name or colour that cannot be displayed."""

    name: str
    color: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not self.name or has_control_characters(self.name):
            raise ValueError(f"class name '{shown(self.name)}', legal: non-empty text without control characters")
        if len(self.name) > _LONGEST_NAME:
            raise ValueError(f"class name '{shown(self.name[:40])}…' has {len(self.name)} characters, legal: at most "
                             f"{_LONGEST_NAME}")
        if not all(type(value) is int and 0 <= value <= 255 for value in self.color):
            raise ValueError(f"colour {self.color}, legal: three integers from 0 to 255")


def class_table(classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    """Classes as plain containers, for storing in other files."""
    return [{"name": info.name, "color": list(info.color)} for info in classes]


def classes_from_table(table: Any) -> list[ClassInfo]:
    """Inverse of `class_table`. Raises ValueError naming the malformed class."""
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
class FileInfo:
    """A file of a split that is not a shard."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split. `class_pixels` and `class_samples` count labelled pixels and samples holding each class.

    Sets of version 1 have their shards in `listed`, and neither `table` nor `sources`; nor do those of version 2 have
    `classes`.
    """

    kind: str  # "crops" or "images"
    images: int
    samples: int
    shards: int
    bytes: int  # of all shards
    index: FileInfo
    class_pixels: list[int]
    class_samples: list[int]
    ignored_pixels: int
    table: FileInfo | None = None
    sources: FileInfo | None = None
    classes: FileInfo | None = None
    listed: list[ShardInfo] | None = None
    skipped_crops: dict[str, int] = field(default_factory=dict)  # reason -> crops
    skipped_images: list[dict[str, str]] = field(default_factory=list)  # {"image", "reason"}

    @property
    def files(self) -> list[FileInfo]:
        """All files but the shards."""
        return [file for file in (self.table, self.index, self.sources, self.classes) if file is not None]

    @property
    def labelled_pixels(self) -> int:
        """Labelled pixels of all samples."""
        return sum(self.class_pixels)

    @property
    def pixels(self) -> int:
        """Pixels of all samples, which bounds the size of any one."""
        return self.labelled_pixels + self.ignored_pixels

    @property
    def ignored_share(self) -> float:
        """Ignored fraction of all pixels, crop padding included."""
        return self.ignored_pixels / max(1, self.pixels)

    @property
    def absent_classes(self) -> list[int]:
        """Ids of classes without a pixel."""
        return [number for number, pixels in enumerate(self.class_pixels) if not pixels]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a complete shard set."""

    dataset: str
    classes: list[ClassInfo]
    ignore_index: int
    seed: int
    crops: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    producer: dict[str, str]
    splits: dict[str, SplitInfo]
    sources: dict[str, str] = field(default_factory=dict)  # version 1: block -> hash of its files; {}: unknown
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def names_of(self, ids: list[int], most: int) -> str:
        """Readable list of class ids and names, at most `most` of them."""
        named = "; ".join(f"{number} {self.classes[number].name}" for number in ids[:most])
        return f"{named} and {len(ids) - most} more" if len(ids) > most else named

    def most_pixels(self, split: str) -> int:
        """Upper bound on the pixels of one sample: the crop size, and never more than all samples together."""
        info, side = self.split(split), self.crops.get("stored_size") or self.crops.get("size")
        return min(info.pixels, side**2) if info.kind == "crops" and isinstance(side, int) else info.pixels

    @property
    def sha256(self) -> str:
        """sha256 of the content, which includes every shard's hash; identifies the data."""
        return hash_of(_content(self))

    def split(self, name: str) -> SplitInfo:
        """The split `name`. Raises ShardError listing the existing splits."""
        if name not in self.splits:
            raise ShardError(f"the shard set has no split {name!r}, it has: {', '.join(sorted(self.splits))}")
        return self.splits[name]


def canonical_json(value: Any) -> str:
    """Deterministic JSON (sorted keys, fixed separators), the input of all hashes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)


def hash_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Content of manifest.json: the manifest and its own hash, so that edits and damage are detected."""
    content = _content(manifest)
    return (canonical_json({**content, "manifest_sha256": hash_of(content)}) + "\n").encode()


def _content(manifest: Manifest) -> dict[str, Any]:
    """The manifest's fields as its version has them; hashes of sets depend on it."""
    content = dataclasses.asdict(manifest)
    if manifest.format_version == 1:
        for split in content["splits"].values():
            split["shards"] = split.pop("listed")
            for name in ("bytes", "table", "sources", "classes"):
                del split[name]
        if not manifest.sources:  # left out by those who wrote none
            del content["sources"]
        return content
    for split in content["splits"].values():
        del split["listed"]
        if manifest.format_version == 2:
            del split["classes"]
    del content["sources"]
    return content


def load_manifest(root: str | Path | Storage) -> Manifest:
    """Read and check `<root>/manifest.json`.

    Raises ShardError when it does not exist (the set is incomplete, or `root` is not a set), FormatVersionError when
    its format is unknown, CorruptShardError when it is damaged or inconsistent.
    """
    storage = open_storage(root)
    path = storage.where(MANIFEST_NAME)
    try:
        return read_checked(storage, MANIFEST_NAME, lambda data: parse_manifest(data, path), _MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = not isinstance(storage, LocalStorage) and f" ({error})"
        raise ShardError(
            f"{path} does not exist: {storage.root} is not a shard set, or was not finished{missing or ''}. "
            "Rerun the same preprocess/make_shards.py command to complete it."
        ) from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Inverse of `manifest_bytes`; `name` is used in errors."""
    content = parse_json(data, name, CorruptShardError)
    if type(content.get("format_version")) is not int:
        raise CorruptShardError(f"{name} has no integer field 'format_version'")
    version = content["format_version"]
    if version not in READABLE_VERSIONS:
        raise FormatVersionError(f"{name} has format_version {version}, this code knows "
                                 f"{', '.join(map(str, READABLE_VERSIONS[:-1]))} and {READABLE_VERSIONS[-1]}")
    try:
        recorded = content.pop("manifest_sha256", None)
        if recorded != hash_of(content):
            raise CorruptShardError(f"{name} does not match its manifest_sha256: it was damaged or edited")
        manifest = built(Manifest, _from_version_1(content) if version == 1 else _of_later_version(content))
        _check_consistency(manifest, name)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptShardError(f"{name} has a missing or malformed field: {error}") from error
    return manifest


def _of_later_version(content: dict[str, Any]) -> dict[str, Any]:
    """The content itself. Raises ValueError for fields that only another version has."""
    if content["format_version"] == 2 and any("classes" in split for split in content.get("splits", {}).values()):
        raise ValueError("it has a field of version 3: classes of a split")
    if "sources" in content or any("listed" in split for split in content.get("splits", {}).values()):
        raise ValueError("it has a field of version 1: sources, or listed shards")
    return content


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 in today's fields; what is malformed stays so. Raises ValueError for fields that it does not have."""
    if not isinstance(content.get("splits"), dict):
        return content
    splits = {}
    for name, split in content["splits"].items():
        if not isinstance(split, dict) or not isinstance(split.get("shards"), list):
            raise ValueError(f"splits.{name} has no list of shards")
        if unknown := {"listed", "bytes", "table", "sources", "classes"} & split.keys():
            raise ValueError(f"splits.{name}.{min(unknown)} is an unknown field")
        shards = split["shards"]
        sizes = [shard.get("bytes") for shard in shards if isinstance(shard, dict)]
        total = sum(size for size in sizes if type(size) is int and 0 <= size <= LARGEST_INTEGER)
        splits[name] = {**split, "listed": shards, "shards": len(shards), "bytes": total}
    return {**content, "splits": splits}


def _check_consistency(manifest: Manifest, name: str) -> None:
    if manifest.ignore_index != ignore_value(len(manifest.classes)):
        raise CorruptShardError(f"{name}: ignore_index {manifest.ignore_index!r} does not match the number of classes")
    if not all(type(block) is type(sources) is str for block, sources in manifest.sources.items()):
        raise CorruptShardError(f"{name}: 'sources' must map block names to hashes")
    names = [info.name for info in manifest.classes]
    if not 1 <= len(names) <= MAX_CLASSES or len(set(names)) != len(names):
        raise CorruptShardError(f"{name}: {len(names)} classes with {len(set(names))} distinct names, legal: 1 to "
                                f"{MAX_CLASSES} classes, each with a unique name")
    files: set[str] = set()
    for split_name, split in manifest.splits.items():
        where = f"{name}, split {split_name!r}"
        if not _SPLIT_NAME.fullmatch(split_name) or split.kind not in ("crops", "images"):
            raise CorruptShardError(f"{where}, kind {split.kind!r}, legal: a name of letters, digits, _ and -, and the "
                                    "kind crops or images")
        _check_counts(split, len(manifest.classes), where)
        _check_files(split, files, where)
    if not manifest.splits:
        raise CorruptShardError(f"{name}: it has no splits")


def _check_counts(split: SplitInfo, num_classes: int, where: str) -> None:
    is_empty = split.shards == split.samples == 0
    if not (is_empty or 1 <= split.shards <= min(split.samples, _MAX_SHARDS)) \
            or split.samples * MIN_SAMPLE_BYTES > split.bytes:
        raise CorruptShardError(f"{where}: {split.samples} samples in {split.shards} shards of {split.bytes} bytes, "
                                f"legal: at least one a shard, of at least {MIN_SAMPLE_BYTES} bytes each")
    if split.listed is not None and sum(shard.samples for shard in split.listed) != split.samples:
        raise CorruptShardError(f"{where}: the shards' sample counts do not add up to {split.samples}")
    for shard in split.listed or ():
        if shard.samples < 0 or shard.samples * MIN_SAMPLE_BYTES > shard.bytes:
            raise CorruptShardError(f"{where}: {shard.name} has {shard.samples} samples in {shard.bytes} bytes, legal: "
                                    f"at least {MIN_SAMPLE_BYTES} bytes each")
    if split.table is not None and split.table.bytes != split.shards * SHARD_DTYPE.itemsize:
        raise CorruptShardError(f"{where}: the table has {split.table.bytes} bytes for {split.shards} shards")
    if split.sources is not None and split.sources.bytes % SOURCE_BYTES:
        raise CorruptShardError(f"{where}: the sources have {split.sources.bytes} bytes, legal: {SOURCE_BYTES} a block")
    if not all(item.keys() == {"image", "reason"} for item in split.skipped_images):
        raise CorruptShardError(f"{where}: skipped_images, legal: objects with image and reason")
    if split.index.bytes != split.samples * INDEX_DTYPE.itemsize:
        raise CorruptShardError(f"{where}: the index has {split.index.bytes} bytes for {split.samples} samples")
    if split.classes is not None and \
            split.classes.bytes != CLASS_DTYPE.itemsize * (split.samples + sum(split.class_samples)):
        raise CorruptShardError(f"{where}: the classes have {split.classes.bytes} bytes for {split.samples} samples")
    for counts in (split.class_pixels, split.class_samples):
        if len(counts) != num_classes:
            raise CorruptShardError(f"{where}: counts for {len(counts)} classes, expected {num_classes}")
    if max(split.class_samples) > split.samples or split.pixels > split.samples * MAX_SIDE**2:
        raise CorruptShardError(f"{where}: {split.samples} samples cannot hold {split.pixels} pixels, or one class in "
                                f"{max(split.class_samples)} samples")


def _check_files(split: SplitInfo, files: set[str], where: str) -> None:
    """Check that names are plain and unique in the whole set (`files`), and hashes well-formed."""
    if (split.table is None) == (split.listed is None):
        raise CorruptShardError(f"{where}: it needs a table of its shards")
    listed: list[ShardInfo | FileInfo] = [*(split.listed or ()), *split.files]
    for file in listed:
        if not _FILE_NAME.fullmatch(file.name) or file.name in files:
            raise CorruptShardError(f"{where}: {file.name!r} is not a plain file name, or is listed twice")
        if not _SHA256.fullmatch(file.sha256):
            raise CorruptShardError(f"{where}: the sha256 of {file.name} is {file.sha256[:80]!r}, legal: 64 "
                                    "hexadecimal digits")
        files.add(file.name)
