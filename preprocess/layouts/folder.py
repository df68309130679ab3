"""Trees of images and label maps: `images/<split>/…` and `annotations/<split>/…`, or any two file-name templates.

Without `dataset.splits`, split folders are recognised by their usual names; ADE20K's are among them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple

from preprocess.config import DatasetConfig
from preprocess.layouts.layout import Classes, Layout, top_folder
from preprocess.layouts.pairing import IMAGE_SUFFIXES, Found, Template, find_pairs
from preprocess.source_tree import SourceTree, read_first
from shards.class_list import parse_classes
from shards.errors import ConfigError, DatasetError

USUAL_NAMES = {"train": ("training", "train"), "val": ("validation", "val", "valid"), "test": ("testing", "test")}
_log = logging.getLogger(__name__)


class SplitFolders(NamedTuple):
    """The folder of a split in each of the two trees; "" where the trees have no split folders."""

    images: str
    labels: str


class TwoTrees(Layout):
    """A tree of images and one of labels, whose split folders may have different names."""

    images: ClassVar[str] = "images/{split}/{stem}"
    labels: ClassVar[str] = "annotations/{split}/{stem}"

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        for split, folders in self._split_folders(config, tree).items():
            images, labels = (text if folders.images else text.replace("{split}/", "")
                              for text in (self.images, self.labels))
            yield split, find_pairs(tree, Template(images, IMAGE_SUFFIXES, "images"),
                                    Template(labels, self.label_suffixes, "labels"), *folders)

    def _split_folders(self, config: DatasetConfig, tree: SourceTree) -> dict[str, SplitFolders]:
        """Split -> its folders, in a fixed order. Raises ConfigError when the folders are ambiguous."""
        tops = (_above_split(self.images), _above_split(self.labels))
        if not config.splits:
            return _usual_folders(tree, *tops)
        labelled = _folders_of(tree, tops[1])
        return {split: SplitFolders(folder, _label_folder(folder, labelled)) for split, folder in config.splits.items()}


class ADE20K(TwoTrees):
    """The scene parsing benchmark (ADEChallengeData2016): 150 classes, 0 = unlabelled."""

    name = "ade20k"
    official: ClassVar[Mapping[str, int]] = {"train": 20210, "val": 2000}
    table = "ade20k.txt"
    reduces_zero_label = True


class Folder(TwoTrees):
    """Anybody's folder: ids 0..C-1 with names in classes.txt, or whatever `dataset.class_file` says."""

    name = "folder"
    class_lists: ClassVar[tuple[str, ...]] = ("classes.txt",)

    def markers(self, config: DatasetConfig) -> list[str]:
        if config.images is not None:
            return [top_folder(Template(config.images, IMAGE_SUFFIXES, "dataset.images"), config.splits or self.splits)]
        return super().markers(config)

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        return self._plain(config, parse_classes(*self.list_of_names(tree)))

    def list_of_names(self, tree: SourceTree) -> tuple[str, str]:
        """(content, name) of the dataset's list of class names. Raises ConfigError when there is none."""
        try:
            path, data = read_first(tree, self.class_lists)
            return data.decode("utf-8-sig"), f"{tree.name}/{path}"
        except (DatasetError, UnicodeDecodeError) as error:
            raise ConfigError(f"no class table: {error}. Write one class name per line, in id order, to "
                              f"{tree.name}/{self.class_lists[0]} or set dataset.class_file") from error

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        by_templates = config.images is not None
        for split, found in self._by_templates(config, tree) if by_templates else super().pairs(config, tree):
            yield split, found._replace(unpaired=[item for item in found.unpaired if item[0] not in self.class_lists])

    def _by_templates(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        """By `dataset.images` and `dataset.labels`."""
        assert config.images is not None and config.labels is not None
        images = Template(config.images, IMAGE_SUFFIXES, "dataset.images")
        labels = Template(config.labels, self.label_suffixes, "dataset.labels")
        if images.has_split != labels.has_split or (config.splits and not images.has_split):
            raise ConfigError(f"dataset.images is {config.images!r} and dataset.labels {config.labels!r}, legal: "
                              "{split} in both, or in neither and without dataset.splits")
        for split, folder in ((config.splits or self.splits) if images.has_split else {"train": ""}).items():
            yield split, find_pairs(tree, images, labels, folder)


def _label_folder(folder: str, labelled: set[str]) -> str:
    """The label folder for an image folder: of the same name, or else the only one whose name means the same split."""
    meaning = _split_meant_by(folder)
    same = [other for other in labelled if meaning is not None and _split_meant_by(other) == meaning]
    return same[0] if folder not in labelled and len(same) == 1 else folder


def _split_meant_by(folder: str) -> str | None:
    return next((split for split, names in USUAL_NAMES.items() if folder.lower() in names), None)


def _usual_folders(tree: SourceTree, image_top: str, label_top: str) -> dict[str, SplitFolders]:
    """The folders by usual names, ignoring case; without split folders all is 'train'.

    Raises ConfigError when two folders mean the same split, or when a folder with an uncommon name sits beside split
    folders, as its files would be skipped silently. 'test' images without labels, as in ADE20K, are skipped with a
    warning.
    """
    images, labels = (_usual_names(tree, top) for top in (image_top, label_top))
    if not images and not labels:
        return {"train": SplitFolders("", "")}
    if "test" in images and "test" not in labels and len(images) > 1:
        _log.warning("%s: skipping %s/%s, which has no labels in %s", tree.name, image_top, images.pop("test"),
                     label_top)
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        top, other = (image_top, label_top) if alone[0] in images else (label_top, image_top)
        folder = (images | labels)[alone[0]]
        raise ConfigError(f"{tree.name} has {top}/{folder}, but {other} has no folder for the split {alone[0]!r}, only "
                          f"{sorted(_folders_of(tree, other))}. Rename one of them to {folder!r}, or select the splits "
                          "to use, e.g. dataset.splits={train: training}")
    return {split: SplitFolders(images[split], labels[split]) for split in USUAL_NAMES if split in images}


def _usual_names(tree: SourceTree, top: str) -> dict[str, str]:
    """Split -> its folder in `top`. Raises ConfigError as `_usual_folders`."""
    found: dict[str, str] = {}
    folders = _folders_of(tree, top)
    for folder in sorted(folders):
        split = _split_meant_by(folder)
        if split in found:
            raise ConfigError(f"{tree.name}/{top} has both {found[split]!r} and {folder!r} for the split {split!r}; "
                              "select the one to use, e.g. dataset.splits={train: training, val: validation}")
        if split is not None:
            found[split] = folder
    beside = folders if not top else {_below(path, top)[0] for path in tree.files(top)}  # a root may hold any files
    left_out = sorted(beside - set(found.values()))
    if found and left_out:
        raise ConfigError(f"{tree.name}/{top} has {left_out[0]!r} beside the split folders {sorted(found.values())}; "
                          "it would be ignored. Move it, or select the folders: dataset.splits={train: training}")
    return found


def _above_split(template: str) -> str:
    """The folder that holds the split folders; "" is the root."""
    return template.partition("{split}")[0].rstrip("/")


def _folders_of(tree: SourceTree, top: str) -> set[str]:
    return {parts[0] for parts in (_below(path, top) for path in tree.files(top)) if len(parts) > 1}


def _below(path: str, top: str) -> tuple[str, ...]:
    return PurePosixPath(path).relative_to(top or ".").parts
