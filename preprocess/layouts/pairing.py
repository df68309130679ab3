"""Match label files to images by file-name templates.

A template is a path below the dataset's root, such as `gtFine/{split}/{stem}_gtFine_labelIds.png`:

    {split}   the source folder of a split (a value of `dataset.splits`)
    {stem}    any text, sub-folders included
    {other}   any other name: one folder, or a part of a file name

A template without suffix matches a file with any legal one. An image's key is the text of all fields but {split},
joined by "/", so image and label templates need the same fields.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from preprocess.source_tree import SourceTree
from shards.errors import ConfigError, DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_FIELD = {"stem": ".+"}
_OTHER_FIELD = "[^/]+"


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
    others      files that match no template
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
        self.text, self.suffixes = text, suffixes
        self.fields = [name for _, name, _, _ in parts if name not in (None, "split")]
        if not all(name and name.isidentifier() for name in self.fields) or len(set(self.fields)) < len(self.fields):
            raise ConfigError(f"{setting} is {text!r}, legal: fields like {{stem}}, each once, beside {{split}}")
        if not self.fields:
            raise ConfigError(f"{setting} is {text!r}, legal: a template with the field {{stem}}")
        self.has_suffix = PurePosixPath(text).suffix.lower() in suffixes

    def folder(self, split: str) -> str:
        """The folder above the first wildcard: all files that match are below it."""
        fixed = self.text.replace("{split}", split).partition("{")[0]
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


def find_pairs(tree: SourceTree, images: Template, labels: Template, split: str, label_split: str | None = None,
               listed: Iterable[str] | None = None) -> Found:
    """The pairs of the split whose source folder is `split` (`label_split` in the tree of labels, if it has another).

    `listed`: the keys that belong to the split, if a file says so.

    Raises ConfigError when the templates have different fields.
    """
    if sorted(images.fields) != sorted(labels.fields):
        raise ConfigError(f"the templates {images.text!r} and {labels.text!r} have different fields: {images.fields} "
                          f"and {labels.fields}; they must be the same, beside {{split}}")
    unpaired: list[tuple[str, str]] = []
    others: list[str] = []
    wanted = None if listed is None else set(listed)
    of_images = _by_key(tree, images, images.fields, split, wanted, unpaired, others)
    label_split = split if label_split is None else label_split
    of_labels = _by_key(tree, labels, images.fields, label_split, wanted, unpaired, others)
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


def listed_keys(tree: SourceTree, path: str) -> list[str]:
    """The keys in a text file, one per line; what follows a blank is left out. Raises DatasetError naming the file."""
    try:
        lines = tree.read(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{tree.name}/{path} is not a text file: {error}") from error
    return [line.split()[0] for line in lines if line.strip()]


def _by_key(tree: SourceTree, template: Template, order: list[str], split: str, wanted: Set[str] | None,
            rejected: list[tuple[str, str]], others: list[str]) -> dict[str, tuple[str, int]]:
    """Key -> (path, bytes) of the files of a template. `rejected`: beside a template that names no suffix."""
    pattern, found = template.pattern(split), dict[str, tuple[str, int]]()
    for path, size in sorted(tree.files(template.folder(split)).items()):
        place = PurePosixPath(path)
        if not place.stem.strip("."):
            rejected.append((path, "its name consists only of dots and a suffix"))
            continue
        matched = pattern.fullmatch(path if template.has_suffix else str(place.with_suffix("")))
        key = "/".join(matched[name] for name in order) if matched else ""
        if matched is None:
            others.append(path)
        elif wanted is not None and key not in wanted:
            continue
        elif place.suffix.lower() not in template.suffixes:
            rejected.append((path, f"not one of {', '.join(template.suffixes)}"))
        elif key in found:
            rejected.append((path, f"same name as {found[key][0]}"))
        else:
            found[key] = (path, size)
    return found


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
