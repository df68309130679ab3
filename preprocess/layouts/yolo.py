"""YOLO segmentation: `images/train/a.jpg` with `labels/train/a.txt`, one object per line: class x1 y1 x2 y2 …, in
shares of the image's width and height.

Facts: the documentation of Ultralytics, "Instance Segmentation Datasets Overview".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import yaml

from preprocess.class_table import is_class_table, read_class_file
from preprocess.config import DatasetConfig
from preprocess.label_mapping import LabelMapping
from preprocess.layouts.drawn import NOTHING, Canvas, Drawn, checked_points, short, with_nothing
from preprocess.layouts.folder import Folder
from preprocess.layouts.pairing import Pair
from preprocess.source_tree import NoSuchFile, SourceTree, read_first
from shards.class_list import parse_classes
from shards.errors import ConfigError, DatasetError
from shards.files.plain_file import LARGEST_YAML

_NUMBERS_OF_A_BOX = 5


class YOLO(Drawn, Folder):
    """Objects are drawn in the order of the file, later ones on top. Classes come from data.yaml or classes.txt."""

    name = "yolo"
    images: ClassVar[str] = "images/{split}/{stem}"
    labels: ClassVar[str] = "labels/{split}/{stem}.txt"
    label_suffixes = (".txt",)
    class_lists = ("data.yaml", "classes.txt")

    def categories(self, config: DatasetConfig, tree: SourceTree) -> tuple[str, dict[str, list[int]]]:
        """Class k is line k of a list, or number k of `names` in data.yaml."""
        if config.class_file is not None and not is_class_table(config.class_file):
            text, source = read_class_file(Path(config.class_file)), config.class_file
        else:
            text, source = self.list_of_names(tree)
        if source.endswith(".yaml"):
            return source, _names_in(text, source)
        return source, {item.name: [number] for number, item in enumerate(parse_classes(text, source))}

    def own_names(self, config: DatasetConfig, tree: SourceTree) -> dict[str, list[int]]:
        try:
            read_first(tree, self.class_lists)
        except NoSuchFile:
            if is_class_table(config.class_file or ""):
                return with_nothing({})  # a table may do without names
        return super().own_names(config, tree)

    def read_labels(self, data: bytes, pair: Pair, mapping: LabelMapping, height: int, width: int) -> npt.NDArray[Any]:
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{pair.label_path} is not a text file: {error}") from error
        canvas = Canvas(height, width)
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{pair.label_path}, line {number}"
                stored, shares = _object(line, where)
                pixels = [share * (height if place % 2 else width) for place, share in enumerate(shares)]
                canvas.polygon(checked_points(pixels, height, width, where), stored)
        return canvas.stored()


def _object(line: str, where: str) -> tuple[int, list[float]]:
    """(class number, coordinates)"""
    parts = line.split()
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise DatasetError(f"{where} is {short(line)}, legal: numbers only") from None
    if len(values) == _NUMBERS_OF_A_BOX:
        raise DatasetError(f"{where} has 5 numbers: the file holds boxes, not polygons, and a box does not say which "
                           "pixels belong to the object")
    if not (values[0] >= 0 and values[0].is_integer() and values[0] < NOTHING):
        raise DatasetError(f"{where} begins with {short(parts[0])}, legal: a class number 0..{NOTHING - 1}")
    wrong = [part for part, value in zip(parts[1:], values[1:], strict=True)
             if not math.isfinite(value) or not -1 <= value <= 2]
    if wrong:
        raise DatasetError(f"{where} has the coordinate {short(wrong[0])}, legal: 0 to 1, as shares of the image's "
                           "width and height")
    return int(values[0]), values[1:]


def _names_in(text: str, source: str) -> dict[str, list[int]]:
    """`names` of a data.yaml, a list or a mapping from numbers."""
    if len(text) > LARGEST_YAML:
        raise ConfigError(f"{source} has {len(text)} characters, legal: at most {LARGEST_YAML}")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    names = content.get("names") if isinstance(content, Mapping) else None
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not numbered or not all(
            type(number) is int and 0 <= number < NOTHING and isinstance(name, str | int | float)
            for number, name in numbered.items()):
        raise ConfigError(f"{source}: names is {short(names)}, legal: a list of class names, or numbers with names")
    found: dict[str, list[int]] = {}
    for number, name in sorted(numbered.items()):
        found.setdefault(str(name), []).append(number)
    return found
