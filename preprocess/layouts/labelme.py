"""LabelMe: a JSON file of shapes beside each image.

Facts: wkentaro/labelme, the format that its annotation tool saves, and utils/shape.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

from preprocess.class_table import is_class_table, read_class_file
from preprocess.config import DatasetConfig
from preprocess.label_mapping import LabelMapping
from preprocess.layouts.drawn import NOTHING, Canvas, Drawn, checked_points, short, with_nothing
from preprocess.layouts.folder import USUAL_NAMES, Folder
from preprocess.layouts.layout import Classes, refuse_ignore_settings
from preprocess.layouts.pairing import Pair
from preprocess.source_tree import NoSuchFile, SourceTree, read_first
from shards.class_list import parse_classes
from shards.errors import ConfigError, DatasetError
from shards.files.outside_json import parse_json

_TYPES = ("polygon", "rectangle", "circle")
_IGNORED, _NOTHING = "__ignore__", "_background_"  # lines of the tool's labels.txt with a meaning


class LabelMe(Drawn, Folder):
    """Shapes are drawn in the order of the file, later ones on top. Classes are the lines of classes.txt or labels.txt
    in the root, or what a class table says about the names in the JSON files."""

    name = "labelme"
    images: ClassVar[str] = "{split}/{stem}"
    labels: ClassVar[str] = "{split}/{stem}.json"
    label_suffixes = (".json",)
    class_lists = ("classes.txt", "labels.txt")

    def markers(self, config: DatasetConfig) -> list[str]:
        if config.images is not None:
            return super().markers(config)
        return [*(config.splits.values() or (name for names in USUAL_NAMES.values() for name in names)), ""]

    def categories(self, config: DatasetConfig, tree: SourceTree) -> tuple[str, dict[str, list[int]]]:
        """By the list of names, in its order; for a class table also all labels in the JSON files, by alphabet."""
        listed = self._listed(config, tree)
        if listed is None and config.class_file is None:
            names = ", ".join(self._used_names(config, tree)) or "none"
            raise ConfigError(f"{tree.name} has no list of classes: write one name per line to {self.class_lists[0]} "
                              f"there, or set dataset.class_file. The JSON files use these names: {names}")
        source, lines = listed or (tree.name, self._used_names(config, tree))
        found = {name: [number] for number, name in enumerate(lines)}
        return source, found | ({_NOTHING: [NOTHING]} if _NOTHING in found else {})

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        source, categories = self.categories(config, tree)
        refuse_ignore_settings(config, source)
        return self._of_list(categories, source)

    def _classes_in(self, config: DatasetConfig, tree: SourceTree, path: Path) -> Classes:
        return super()._classes_in(config, tree, path) if is_class_table(str(path)) else self.own_classes(config, tree)

    def _of_list(self, categories: dict[str, list[int]], source: str) -> Classes:
        """A class per line, but for the tool's `__ignore__`."""
        names = with_nothing(categories)
        classes, mapping = self._named([name for name in categories if name != _IGNORED], names, source)
        ignored = dict.fromkeys(names.get(_IGNORED, []), mapping.ignore_index)
        return self._finished((classes, replace(mapping, values={**mapping.values, **ignored})), names)

    def _listed(self, config: DatasetConfig, tree: SourceTree) -> tuple[str, list[str]] | None:
        """(file, names) of `dataset.class_file` if it is a list, or of the list in the root; None without one."""
        if config.class_file is not None and not is_class_table(config.class_file):
            text, source = read_class_file(Path(config.class_file)), config.class_file
        else:
            try:
                read_first(tree, self.class_lists)
            except NoSuchFile:
                return None
            text, source = self.list_of_names(tree)
        return source, [item.name for item in parse_classes(text, source)]

    def read_labels(self, data: bytes, pair: Pair, mapping: LabelMapping, height: int, width: int) -> npt.NDArray[Any]:
        content = parse_json(data, pair.label_path, DatasetError)
        for field, size in (("imageHeight", height), ("imageWidth", width)):
            if content.get(field) not in (None, size):
                raise DatasetError(f"{pair.label_path}: {field} is {short(content[field])}, but {pair.image_path} has "
                                   f"{size}; they must be equal")
        canvas = Canvas(height, width)
        for number, shape in enumerate(_shapes(content, pair.label_path)):
            where = f"{pair.label_path}: shapes[{number}]"
            _draw(shape, _stored_id(shape, mapping.names, where), canvas, (height, width), where)
        return canvas.stored()

    def _used_names(self, config: DatasetConfig, tree: SourceTree) -> list[str]:
        """The labels in all JSON files, by alphabet."""
        names: set[str] = set()
        for pair in (pair for _, found in self.pairs(config, tree) for pair in found.pairs):
            content = parse_json(tree.read(pair.label_path), pair.label_path, DatasetError)
            names |= {str(shape.get("label")) for shape in _shapes(content, pair.label_path)}
        return sorted(names)

    def _finished(self, built: Classes, names: Mapping[str, list[int]]) -> Classes:
        """The names become part of what determines the shards, as the JSON files hold names."""
        classes, mapping = super()._finished(built, names)
        return classes, replace(mapping, identity=(*mapping.identity, sorted(mapping.names.items())))


def _shapes(content: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    shapes = content.get("shapes")
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise DatasetError(f"{name}: shapes is {short(shapes)}, legal: a list of objects")
    yield from shapes


def _stored_id(shape: dict[str, Any], names: Mapping[str, int], where: str) -> int:
    label = shape.get("label")
    if not isinstance(label, str) or label not in names:
        near = difflib.get_close_matches(str(label), names, n=1)
        raise DatasetError(f"{where}.label is {short(label)}, which is not in the list of names"
                           f"{f'; did you mean {near[0]!r}?' if near else ''}")
    return names[label]


def _draw(shape: dict[str, Any], stored: int, canvas: Canvas, size: tuple[int, int], where: str) -> None:
    kind, points = shape.get("shape_type", "polygon"), shape.get("points")
    if kind not in _TYPES:
        raise DatasetError(f"{where}.shape_type is {short(kind)}, which covers no area; legal: {', '.join(_TYPES)}")
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points) or (
            kind != "polygon" and len(points) != 2):
        raise DatasetError(f"{where}.points is {short(points)}, legal: a list of [x, y]"
                           f"{'' if kind == 'polygon' else f', two for a {kind}'}")
    if kind == "polygon":
        canvas.polygon(checked_points(_flat(points), *size, f"{where}.points"), stored)
        return
    (x, y), (other_x, other_y), _ = checked_points(_flat([*points, points[0]]), *size, f"{where}.points")
    if kind == "circle":  # its centre, and a point on it
        canvas.circle((x, y), math.hypot(other_x - x, other_y - y), stored)
    else:
        canvas.polygon([(x, y), (other_x, y), (other_x, other_y), (x, other_y)], stored)


def _flat(points: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for point in points for value in point]
