"""Mapillary Vistas. The classes come from the config_*.json of the dataset: those with "evaluate" are classes.

Facts: the config files' format and the folders: openvinotoolkit/datumaro, plugins/data_formats/mapillary_vistas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.class_table import ClassTable, Ignored, TableClass, build_classes
from preprocess.config import DatasetConfig
from preprocess.layouts.layout import Classes, Layout, refuse_ignore_settings
from preprocess.source_tree import SourceTree, read_first
from shards.errors import DatasetError
from shards.files.outside_json import parse_json


class MapillaryV1(Layout):
    """Version 1.2, as its own release or inside that of version 2.0."""

    name = "mapillary-v1.2"
    images = "{split}/images/{stem}.jpg"
    labels: ClassVar[tuple[str, ...]] = ("{split}/v1.2/labels/{stem}.png", "{split}/labels/{stem}.png")
    splits: ClassVar[Mapping[str, str]] = {"train": "training", "val": "validation"}
    official: ClassVar[Mapping[str, int]] = {"train": 18000, "val": 2000}
    configs: ClassVar[tuple[str, ...]] = ("config_v1.2.json", "config.json")

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        path, labels = self._labels(tree)
        refuse_ignore_settings(config, path)
        table = ClassTable(
            classes=[TableClass(name=label["name"], color="#" + bytes(label["color"]).hex(), ids=[number])
                     for number, label in enumerate(labels) if label["evaluate"]],
            ignore=Ignored(ids=[number for number, label in enumerate(labels) if not label["evaluate"]]))
        return build_classes(table, path, {})

    def own_names(self, config: DatasetConfig, tree: SourceTree) -> dict[str, list[int]]:
        """Both spellings: `object--vehicle--car` and `Car`."""
        found: dict[str, list[int]] = {}
        for number, label in enumerate(self._labels(tree)[1]):
            for name in {label["name"], label.get("readable", label["name"])}:
                found.setdefault(name, []).append(number)
        return found

    def _labels(self, tree: SourceTree) -> tuple[str, list[dict[str, Any]]]:
        """(name of the file, its labels; the stored id is the position). Raises DatasetError naming the entry."""
        path, data = read_first(tree, self.configs)
        where = f"{tree.name}/{path}"
        labels = parse_json(data, where, DatasetError).get("labels")
        if not isinstance(labels, list):
            raise DatasetError(f"{where}: labels is {str(labels)[:80]}, legal: a list")
        for number, label in enumerate(labels):
            if not (isinstance(label, dict) and isinstance(label.get("name"), str)
                    and isinstance(label.get("readable", ""), str) and isinstance(label.get("evaluate"), bool)
                    and isinstance(label.get("color"), list) and len(label["color"]) == 3
                    and all(type(value) is int and 0 <= value <= 255 for value in label["color"])):
                raise DatasetError(f"{where}: labels[{number}] is {str(label)[:200]}, legal: an object with name (text)"
                                   ", evaluate (true or false) and color (three numbers 0..255)")
        return where, labels


class MapillaryV2(MapillaryV1):
    """Version 2.0."""

    name = "mapillary-v2.0"
    labels: ClassVar[tuple[str, ...]] = ("{split}/v2.0/labels/{stem}.png",)
    configs: ClassVar[tuple[str, ...]] = ("config_v2.0.json",)
