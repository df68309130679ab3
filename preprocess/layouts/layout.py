"""What all dataset layouts have in common: where the files are, what the stored labels mean, how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

from preprocess.class_table import is_class_table, names_in_table, read_class_file, read_class_table
from preprocess.config import DatasetConfig
from preprocess.label_mapping import LabelMapping, plain_mapping
from preprocess.layouts.pairing import IMAGE_SUFFIXES, LABEL_SUFFIXES, Found, Pair, Template, find_pairs, listed_keys
from preprocess.source_picture import read_stored_labels
from preprocess.source_tree import SourceTree, open_tree
from shards.class_list import parse_classes
from shards.errors import ConfigError
from shards.manifest import ClassInfo
from shards.rle import ignore_value

TABLES = Path(__file__).parent / "tables"
Classes = tuple[list[ClassInfo], LabelMapping]


class Layout:
    """A dataset as it is published. A subclass sets the constants, and overrides the methods that do not fit.

    images, labels   file-name templates (see `pairing`); of several, the first with files in its folder is used
    label_suffixes   suffixes that label files may have
    lists            templates of text files that list the keys of a split; (): a split has all files that match
    splits           split -> its source folder ({split} in templates); `dataset.splits` replaces it
    official         split -> images of the complete release
    table            class table, a file in tables/: .yaml, or .txt with a name per line for ids 0..C-1
    companions       endings of files that lie beside the labels by right
    """

    name: ClassVar[str]
    images: ClassVar[str | tuple[str, ...]] = ""
    labels: ClassVar[str | tuple[str, ...]] = ""
    label_suffixes: ClassVar[tuple[str, ...]] = LABEL_SUFFIXES
    lists: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "val": "val"}
    official: ClassVar[Mapping[str, int]] = {}
    table: ClassVar[str] = ""
    reduces_zero_label: ClassVar[bool] = False
    ignored_label: ClassVar[int | None] = None  # of a plain list of names; None: the ignore value of its length
    companions: ClassVar[tuple[str, ...]] = ()

    def open(self, config: DatasetConfig) -> SourceTree:
        """The dataset's files. Raises DatasetError when `dataset.root` does not hold them."""
        assert config.root is not None
        return open_tree(config.root, self.markers(config))

    def markers(self, config: DatasetConfig) -> list[str]:
        """Folders of which the dataset's root must have one."""
        return [top_folder(template, config.splits or self.splits)
                for template in _parsed(self.images, IMAGE_SUFFIXES)]

    def classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        """The classes, and what stored labels mean.

        Raises ConfigError for a class file that cannot be used, and for settings that a class table replaces.
        """
        if config.class_file is None:
            return self.own_classes(config, tree)
        return self._classes_in(config, tree, Path(config.class_file))

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        """`classes` when `dataset.class_file` is not set."""
        return self._classes_in(config, tree, TABLES / self.table)

    def own_names(self, config: DatasetConfig, tree: SourceTree) -> dict[str, list[int]]:
        """Name -> stored ids; class tables of users may then use these names."""
        return names_in_table(TABLES / self.table, 1 if self.reduces_zero_label else 0) if self.table else {}

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        """(split, its files), in a fixed order. Raises ConfigError when folders are ambiguous."""
        for split, folder in (config.splits or self.splits).items():
            images = _present(tree, self.images, IMAGE_SUFFIXES, folder)
            labels = _present(tree, self.labels, self.label_suffixes, folder)
            listed = listed_keys(tree, [text.replace("{split}", folder) for text in self.lists]) if self.lists else None
            found = find_pairs(tree, images, labels, folder, listed=listed)
            yield split, found._replace(others=[path for path in found.others if not path.endswith(self.companions)])

    def read_labels(self, data: bytes, pair: Pair, mapping: LabelMapping, height: int, width: int) -> npt.NDArray[Any]:
        """Stored values [H, W], or colours uint8 [H, W, 3], of a pair whose image is `height` x `width`.

        `data` is the content of the label file. Raises DatasetError or CorruptShardError naming the file.
        """
        return read_stored_labels(data, pair.label_path, mapping.reads_colors, height * width)

    def _classes_in(self, config: DatasetConfig, tree: SourceTree, path: Path) -> Classes:
        """The classes of a table, or of a list of names."""
        if is_class_table(str(path)):
            refuse_ignore_settings(config, str(path))
            return read_class_table(str(path), self.own_names(config, tree))
        return self._plain(config, parse_classes(read_class_file(path), str(path)))

    def _plain(self, config: DatasetConfig, classes: list[ClassInfo]) -> Classes:
        """Of a list of names."""
        reduce = config.reduce_zero_label if config.reduce_zero_label is not None else self.reduces_zero_label
        default = self.ignored_label if self.ignored_label is not None else ignore_value(len(classes))
        return classes, plain_mapping(len(classes), tuple(config.ignore_labels) or (default,), reduce)


def refuse_ignore_settings(config: DatasetConfig, source: str) -> None:
    """Raise ConfigError for settings that have no meaning when the classes come from `source`, a class table."""
    if config.ignore_labels or config.reduce_zero_label is not None:
        raise ConfigError(f"the classes come from {source}, a class table, which says itself what is ignored; leave "
                          "out dataset.ignore_labels and dataset.reduce_zero_label")


def texts(templates: str | tuple[str, ...]) -> tuple[str, ...]:
    """One or several templates as a tuple."""
    return (templates,) if isinstance(templates, str) else templates


def top_folder(template: Template, splits: Mapping[str, str]) -> str:
    """The first folder of a template, for the first split; "" if its name holds another field."""
    return template.folder(next(iter(splits.values()))).partition("/")[0]


def _parsed(templates: str | tuple[str, ...], suffixes: tuple[str, ...]) -> list[Template]:
    return [Template(text, suffixes, "the layout's template") for text in texts(templates)]


def _present(tree: SourceTree, templates: str | tuple[str, ...], suffixes: tuple[str, ...], split: str) -> Template:
    """The first template with files in its folder, or else the first one."""
    parsed = _parsed(templates, suffixes)
    return next((template for template in parsed if tree.has_files(template.folder(split))), parsed[0])
