"""Layouts whose labels are objects, drawn one after the other into an array of stored ids.

A stored id is the dataset's own number of a category. Pixels in no object have the stored id NOTHING, named
`background`: they are ignored, unless a class table lists that name or id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from preprocess.class_table import (
    ClassTable,
    TableClass,
    build_classes,
    is_class_table,
    read_class_file,
    read_class_table,
)
from preprocess.config import DatasetConfig
from preprocess.layouts.layout import Classes, Layout, refuse_ignore_settings
from preprocess.source_tree import SourceTree
from shards.class_list import parse_classes
from shards.errors import DatasetError
from shards.rle import MAX_CLASSES

NOTHING, NOTHING_NAME = MAX_CLASSES, "background"
_FEWEST_POINTS = 3


class Drawn(Layout):
    """A layout with categories of its own, whose names class tables and lists may use."""

    def categories(self, config: DatasetConfig, tree: SourceTree) -> tuple[str, dict[str, list[int]]]:
        """(where they are from, name -> stored ids). Raises DatasetError or ConfigError when there are none."""
        raise NotImplementedError

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        source, categories = self.categories(config, tree)
        refuse_ignore_settings(config, source)
        names = with_nothing(categories)
        return self._finished(self._named(list(categories), names, source), names)

    def own_names(self, config: DatasetConfig, tree: SourceTree) -> dict[str, list[int]]:
        return with_nothing(self.categories(config, tree)[1])

    def _classes_in(self, config: DatasetConfig, tree: SourceTree, path: Path) -> Classes:
        names = self.own_names(config, tree)
        refuse_ignore_settings(config, str(path))
        if is_class_table(str(path)):
            return self._finished(read_class_table(str(path), names), names)
        listed = [item.name for item in parse_classes(read_class_file(path), str(path))]
        return self._finished(self._named(listed, names, str(path)), names)

    def _named(self, wanted: Sequence[str], names: Mapping[str, list[int]], source: str) -> Classes:
        """A class per name."""
        table = ClassTable(classes=[TableClass(name=name, names=[name]) for name in wanted])
        return build_classes(table, source, dict(names))

    def _finished(self, built: Classes, names: Mapping[str, list[int]]) -> Classes:
        """With NOTHING ignored, unless the table lists it; and with the names, for errors."""
        classes, mapping = built
        return classes, replace(mapping, values={NOTHING: mapping.ignore_index} | dict(mapping.values),
                                names={name: ids[0] for name, ids in names.items() if ids})


def with_nothing(categories: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The names, and NOTHING as `background`: beside a category that has this name, if there is one."""
    return {**categories, NOTHING_NAME: [*categories.get(NOTHING_NAME, []), NOTHING]}


class Canvas:
    """An array of stored ids, in which Pillow draws objects; later ones lie on top."""

    def __init__(self, height: int, width: int) -> None:
        self._image = Image.new("I", (width, height), NOTHING)
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Sequence[tuple[float, float]], stored: int) -> None:
        """Fill it, with its outline. Each corner is the pixel that holds the point, as in LabelMe's own conversion."""
        self._draw.polygon([(math.floor(x), math.floor(y)) for x, y in points], fill=stored, outline=stored)

    def circle(self, center: tuple[float, float], radius: float, stored: int) -> None:
        """Fill it, with its outline."""
        x, y = center
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=stored, outline=stored)

    def stored(self) -> npt.NDArray[Any]:
        """uint16 [H, W]"""
        return np.asarray(self._image).astype(np.uint16)


def checked_points(flat: Any, height: int, width: int, where: str) -> list[tuple[float, float]]:
    """`[x1, y1, x2, y2, …]` in pixels as points.

    Raises DatasetError naming what is not a polygon near the image: fewer than three points, text, NaN, or coordinates
    more than the image's size outside of it.
    """
    if not isinstance(flat, list) or len(flat) < 2 * _FEWEST_POINTS or len(flat) % 2:
        what = f"{len(flat)} numbers" if isinstance(flat, list) else short(flat)
        raise DatasetError(f"{where} is {what}, legal: x and y of at least {_FEWEST_POINTS} points")
    for place, value in enumerate(flat):
        side = height if place % 2 else width
        if type(value) not in (int, float) or not math.isfinite(value) or not -side <= value <= 2 * side:
            raise DatasetError(f"{where}[{place}] is {short(value)}, legal: a number from {-side} to {2 * side}, in "
                               f"pixels of the {width}x{height} image")
    return list(zip(flat[::2], flat[1::2], strict=True))


def short(value: Any) -> str:
    """How errors quote a wrong value."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
