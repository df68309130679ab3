"""Match label files to images by file-name templates.

A template is a path below the dataset's root, such as `gtFine/{split}/{stem}_gtFine_labelIds.png`:

    {split}   the source folder of a split (a value of `dataset.splits`)
    {stem}    any text, sub-folders included
    {other}   any other name: one folder, or a part of a file name

A template without suffix matches a file with any legal one. An image's key is the text of all fields but {split},
joined by "/", so image and label templates need the same fields.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from preprocess.source_tree import SourceTree, read_first
from shards.errors import ConfigError, DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_LARGEST_LIST = 256 << 20  # bytes of a list of the images of a split: millions of them
_FIELD = {"stem": ".+"}
_OTHER_FIELD = "[^/]+"
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its labels. `key` names the sample in its split."""

    key: str
    image_path: str
    label_path: str  # "" if `annotation` holds the labels
    fingerprint: str  # sizes of the files: the most that is known without reading them
    annotation: str = ""  # what the layout knows about this image from a file shared with others (see the layout)

    @property
    def paths(self) -> list[str]:
        """The pair's own files."""
        return [path for path in (self.image_path, self.label_path) if path]

    @property
    def label_name(self) -> str:
        """How errors name the labels."""
        return self.label_path or f"the annotation of {self.image_path}"


class Found(NamedTuple):
    """What was found of a split.

    pairs       sorted by key
    unpaired    (file, reason) of each file that has no partner
    others      files of the folders that were looked in, which belong to no pair
    looked_for  where, for errors
    """

    pairs: list[Pair]
    unpaired: list[tuple[str, str]]
    others: list[str]
    looked_for: str


class Template:
    """A parsed template. Raises ConfigError, naming the setting it came from, when it cannot be used."""

    def __init__(self, text: str, suffixes: tuple[str, ...], setting: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{setting} is {text!r}: {error}") from None
        if "".join(_written(literal, name) for literal, name, _, _ in parts) != text:
            raise ConfigError(f"{setting} is {text!r}, legal: fields without a format or a conversion, like {{stem}}, "
                              "not {stem:>5} or {stem!r}")
        self.text, self.suffixes = text, suffixes
        self.has_split = "split" in [name for _, name, _, _ in parts]
        self.fields = [name for _, name, _, _ in parts if name not in (None, "split")]
        if not all(name and name.isidentifier() for name in self.fields) or len(set(self.fields)) < len(self.fields):
            raise ConfigError(f"{setting} is {text!r}, legal: fields like {{stem}}, each once, beside {{split}}")
        if not self.fields:
            raise ConfigError(f"{setting} is {text!r}, legal: a template with the field {{stem}}")
        self.has_suffix = PurePosixPath(text).suffix.lower() in suffixes

    def folder(self, split: str) -> str:
        """The folder above the first wildcard: all files that match are below it."""
        fixed = ""
        for literal, name, _, _ in string.Formatter().parse(self.text):
            fixed += literal
            if name == "split":
                fixed += split
            elif name is not None:
                break
        return fixed.rpartition("/")[0]

    def pattern(self, split: str) -> re.Pattern[str]:
        """Matches the paths of a split's files, with a group per field; without the suffix if the template has none."""
        parts = []
        for literal, name, _, _ in string.Formatter().parse(self.text):
            parts.append(re.escape(literal))
            if name == "split":
                parts.append(re.escape(split))
            elif name is not None:
                parts.append(f"(?P<{name}>{_FIELD.get(name, _OTHER_FIELD)})")
        return re.compile("".join(parts), re.DOTALL)


def _written(literal: str, field: str | None) -> str:
    """How a template has a text and the plain field after it."""
    return literal.replace("{", "{{").replace("}", "}}") + ("" if field is None else f"{{{field}}}")


def find_pairs(tree: SourceTree, images: Template, labels: Template, split: str, label_split: str | None = None,
               listed: Iterable[str] | None = None) -> Found:
    """The pairs of the split whose source folder is `split` (`label_split` in the tree of labels, if it has another).

    `listed`: the keys that belong to the split, if a file says so.

    Raises ConfigError when the templates have different fields.
    """
    if sorted(images.fields) != sorted(labels.fields):
        raise ConfigError(f"the templates {images.text!r} and {labels.text!r} have different fields: {images.fields} "
                          f"and {labels.fields}; they must be the same, beside {{split}}")
    wanted = None if listed is None else set(listed)
    label_split = split if label_split is None else label_split
    image_files = _Listing.of(tree, images, images.fields, split, wanted)
    label_files = _Listing.of(tree, labels, images.fields, label_split, wanted)
    of_images, of_labels = image_files.found, label_files.found
    unpaired, others = _rest(image_files, label_files)
    partner = _partners(of_images.keys(), of_labels.keys())
    unpaired += [(of_images[key][0], f"no label map in {labels.folder(label_split)}")
                 for key in sorted(of_images.keys() - partner.keys())]
    unpaired += [(of_labels[key][0], f"no image in {images.folder(split)}")
                 for key in sorted(of_labels.keys() - set(partner.values()))]
    if wanted is not None:
        unpaired += [(key, "listed, but there is no such image") for key in
                     sorted(wanted - of_images.keys() - of_labels.keys())]
    pairs = [
        Pair(key=key, image_path=of_images[key][0], label_path=of_labels[partner[key]][0],
             fingerprint=f"{of_images[key][1]}+{of_labels[partner[key]][1]}")
        for key in sorted(partner)
    ]
    looked_for = f"{images.text.replace('{split}', split)} with {labels.text.replace('{split}', label_split)}"
    return Found(pairs, unpaired, others, looked_for)


def listed_keys(tree: SourceTree, paths: list[str]) -> list[str]:
    """The keys in a text file, the first of `paths` that can be read: one per line; what follows a blank is left out.

    Raises DatasetError naming the file.
    """
    path, data = read_first(tree, paths, _LARGEST_LIST)
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{tree.name}/{path} is not a text file: {error}") from error
    return [line.split()[0] for line in lines if line.strip()]


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """What a template makes of the files in its folder.

    found      key -> (path, bytes)
    rejected   path -> reason: beside a template that names no suffix, files with another one, for example
    unlisted   paths of keys that are not listed
    unmatched  all other paths
    """

    found: dict[str, tuple[str, int]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)
    unmatched: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, tree: SourceTree, template: Template, order: list[str], split: str,
           wanted: Set[str] | None) -> _Listing:
        """The files of a split. `order`: the fields, in their order in the key."""
        pattern, listing = template.pattern(split), cls()
        for path, size in sorted(tree.files(template.folder(split)).items()):
            stem, suffix = _split_suffix(path)
            if not stem.rpartition("/")[2].strip("."):
                listing.rejected[path] = "its name consists only of dots and a suffix"
                continue
            matched = pattern.fullmatch(path if template.has_suffix else stem)
            key = "/".join(matched[name] for name in order) if matched else ""
            if matched is None:
                listing.unmatched.add(path)
            elif wanted is not None and key not in wanted:
                listing.unlisted.add(path)
            elif suffix.lower() not in template.suffixes:
                listing.rejected[path] = f"not one of {', '.join(template.suffixes)}"
            elif key in listing.found:
                listing.rejected[path] = f"same name as {listing.found[key][0]}"
            else:
                listing.found[key] = (path, size)
        return listing


def _split_suffix(path: str) -> tuple[str, str]:
    """(path without suffix, suffix); as PurePosixPath does it, but ten times as fast."""
    place = path.rfind(".", path.rfind("/") + 2)
    return (path[:place], path[place:]) if 0 < place < len(path) - 1 else (path, "")


def _rest(one: _Listing, other: _Listing) -> tuple[list[tuple[str, str]], list[str]]:
    """(rejected files, unmatched files); images and labels may lie in one folder, so each may be fine as the other."""
    rejected, unmatched = dict[str, str](), set[str]()
    for mine, its in ((one, other), (other, one)):
        used = {path for path, _ in its.found.values()} | its.unlisted
        rejected |= {path: reason for path, reason in mine.rejected.items() if path not in used}
        unmatched |= mine.unmatched - used
    return sorted(rejected.items()), sorted(unmatched - rejected.keys())


def _partners(images: Set[str], labels: Set[str]) -> dict[str, str]:
    """Image key -> label key: identical keys first, then keys that differ only in Unicode normalisation.

    macOS used to store names decomposed (NFD), unlike other systems: the same name, but different bytes.
    """
    partner = {key: key for key in images & labels}
    by_form: dict[str, tuple[list[str], list[str]]] = {}
    for side, keys in enumerate((images - labels, labels - images)):
        for key in keys:
            by_form.setdefault(unicodedata.normalize("NFC", key), ([], []))[side].append(key)
    return partner | {ours[0]: theirs[0] for ours, theirs in by_form.values() if len(ours) == len(theirs) == 1}


def check_split_names(splits: Mapping[str, str]) -> None:
    """Raise ConfigError for a name that could not be part of a shard's."""
    bad_names = [split for split in splits if not _SPLIT_NAME.fullmatch(split)]
    if bad_names:
        raise ConfigError(f"dataset.splits has a split named {bad_names[0]!r}, legal: letters, digits, '_' and '-'")


def split_off_validation(found: dict[str, Found], fraction: float, limit: int | None) -> None:
    """Move a fraction of 'train' (of its first `limit` pairs) to 'val', chosen by a hash of the key, so that adding
    images moves no others."""
    if set(found) != {"train"}:
        raise ConfigError(f"dataset.val_fraction is {fraction}, but the source has split folders: {sorted(found)}")
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in found["train"].pairs[:limit]:
        parts[int(hashlib.sha256(pair.key.encode()).hexdigest()[:8], 16) < fraction * 2**32].append(pair)
    if not all(parts):
        raise ConfigError(f"dataset.val_fraction is {fraction}: with {sum(map(len, parts))} images one split "
                          "would be empty")
    found["train"] = found["train"]._replace(pairs=parts[0])
    found["val"] = Found(parts[1], [], [], found["train"].looked_for)
