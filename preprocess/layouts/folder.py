"""Trees of images and label maps: `images/<split>/…` and `annotations/<split>/…`, or any two file-name templates.

Without `dataset.splits`, split folders are recognised by their usual names; ADE20K's are among them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple

from preprocess.config import DatasetConfig
from preprocess.layouts.layout import Classes, Layout, top_folder
from preprocess.layouts.pairing import IMAGE_SUFFIXES, LABEL_SUFFIXES, Found, Pair, Template, find_pairs
from preprocess.source_tree import SourceTree
from shards.class_list import parse_classes
from shards.errors import ConfigError, DatasetError

_USUAL_NAMES = {"train": ("training", "train"), "val": ("validation", "val", "valid"), "test": ("testing", "test")}
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_log = logging.getLogger(__name__)


class SplitFolders(NamedTuple):
    """The folder of a split in each of the two trees; "" where the trees have no split folders."""

    images: str
    labels: str


class TwoTrees(Layout):
    """The trees `images` and `annotations`, whose split folders may have different names."""

    images, labels = "images/{split}/{stem}", "annotations/{split}/{stem}"

    def marker(self, config: DatasetConfig) -> str:
        return "images"

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        for split, folders in split_folders(config, tree).items():
            images, labels = (text if folders.images else text.replace("{split}/", "")
                              for text in (self.images, self.labels))
            yield split, find_pairs(tree, Template(images, IMAGE_SUFFIXES, "images"),
                                    Template(labels, LABEL_SUFFIXES, "labels"), *folders)


class ADE20K(TwoTrees):
    """The scene parsing benchmark (ADEChallengeData2016): 150 classes, 0 = unlabelled."""

    name = "ade20k"
    official: ClassVar[Mapping[str, int]] = {"train": 20210, "val": 2000}
    table = "ade20k.txt"
    reduces_zero_label = True


class Folder(TwoTrees):
    """Anybody's folder: ids 0..C-1 with names in classes.txt, or whatever `dataset.class_file` says."""

    name = "folder"

    def marker(self, config: DatasetConfig) -> str:
        return super().marker(config) if config.images is None else top_folder(config.images, config.splits or
                                                                               self.splits)

    def classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        if config.class_file is not None:
            return super().classes(config, tree)
        name = f"{tree.name}/classes.txt"
        try:
            text = tree.read("classes.txt").decode("utf-8-sig")
        except (DatasetError, UnicodeDecodeError) as error:
            raise ConfigError(f"no class table: {error}. Write one class name per line, in id order, to {name} or set "
                              "dataset.class_file") from error
        return self._plain(config, parse_classes(text, name))

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        found = self._by_templates(config, tree) if config.images is not None else dict(super().pairs(config, tree))
        if config.val_fraction > 0:
            split_off_validation(found, config.val_fraction, config.limit)
        yield from found.items()

    def _by_templates(self, config: DatasetConfig, tree: SourceTree) -> dict[str, Found]:
        """By `dataset.images` and `dataset.labels`."""
        assert config.images is not None and config.labels is not None
        images = Template(config.images, IMAGE_SUFFIXES, "dataset.images")
        labels = Template(config.labels, LABEL_SUFFIXES, "dataset.labels")
        check_split_names(config.splits)
        has_splits = "{split}" in config.images
        if has_splits != ("{split}" in config.labels) or (config.splits and not has_splits):
            raise ConfigError(f"dataset.images is {config.images!r} and dataset.labels {config.labels!r}, legal: "
                              "{split} in both, or in neither and without dataset.splits")
        splits = (config.splits or self.splits) if has_splits else {"train": ""}
        return {split: find_pairs(tree, images, labels, folder) for split, folder in splits.items()}


def split_folders(config: DatasetConfig, tree: SourceTree) -> dict[str, SplitFolders]:
    """Split -> its folders, in a fixed order. Raises ConfigError when the folders are ambiguous."""
    if not config.splits:
        return _usual_folders(tree)
    check_split_names(config.splits)
    labelled = _folders_of(tree, "annotations")
    return {split: SplitFolders(folder, _label_folder(folder, labelled)) for split, folder in config.splits.items()}


def check_split_names(splits: Mapping[str, str]) -> None:
    """Raise ConfigError for a name that could not be part of a shard's."""
    bad_names = [split for split in splits if not _SPLIT_NAME.fullmatch(split)]
    if bad_names:
        raise ConfigError(f"dataset.splits has a split named {bad_names[0]!r}, legal: letters, digits, '_' and '-'")


def _label_folder(folder: str, labelled: set[str]) -> str:
    """The label folder for an image folder: of the same name, or else the only one whose name means the same split."""
    meaning = _split_meant_by(folder)
    same = [other for other in labelled if meaning is not None and _split_meant_by(other) == meaning]
    return same[0] if folder not in labelled and len(same) == 1 else folder


def _split_meant_by(folder: str) -> str | None:
    return next((split for split, names in _USUAL_NAMES.items() if folder.lower() in names), None)


def _usual_folders(tree: SourceTree) -> dict[str, SplitFolders]:
    """The folders by usual names, ignoring case; without split folders all is 'train'.

    Raises ConfigError when two folders mean the same split, or when a folder with an uncommon name sits beside split
    folders, as its files would be skipped silently. 'test' images without labels, as in ADE20K, are skipped with a
    warning.
    """
    images, labels = (_usual_names(tree, top) for top in ("images", "annotations"))
    if not images and not labels:
        return {"train": SplitFolders("", "")}
    if "test" in images and "test" not in labels and len(images) > 1:
        _log.warning("%s: skipping images/%s, which has no labels in annotations", tree.name, images.pop("test"))
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        top, other = ("images", "annotations") if alone[0] in images else ("annotations", "images")
        folder = (images | labels)[alone[0]]
        raise ConfigError(f"{tree.name} has {top}/{folder}, but {other} has no folder for the split {alone[0]!r}, only "
                          f"{sorted(_folders_of(tree, other))}. Rename one of them to {folder!r}, or select the splits "
                          "to use, e.g. dataset.splits={train: training}")
    return {split: SplitFolders(images[split], labels[split]) for split in _USUAL_NAMES if split in images}


def _usual_names(tree: SourceTree, top: str) -> dict[str, str]:
    """Split -> its folder in `top`. Raises ConfigError as `_usual_folders`."""
    found: dict[str, str] = {}
    for folder in sorted(_folders_of(tree, top)):
        split = _split_meant_by(folder)
        if split in found:
            raise ConfigError(f"{tree.name}/{top} has both {found[split]!r} and {folder!r} for the split {split!r}; "
                              "select the one to use, e.g. dataset.splits={train: training, val: validation}")
        if split is not None:
            found[split] = folder
    left_out = sorted({PurePosixPath(path).parts[1] for path in tree.files(top)} - set(found.values()))
    if found and left_out:
        raise ConfigError(f"{tree.name}/{top} has {left_out[0]!r} beside the split folders {sorted(found.values())}; "
                          "it would be ignored. Move it, or select the folders: dataset.splits={train: training}")
    return found


def _folders_of(tree: SourceTree, top: str) -> set[str]:
    return {parts[1] for parts in (PurePosixPath(path).parts for path in tree.files(top)) if len(parts) > 2}


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
