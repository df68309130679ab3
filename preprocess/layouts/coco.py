"""COCO 2017: instances (polygons and run-length masks) and panoptic segments, as semantic labels.

Facts: the data format page of cocodataset.org; cocodataset/cocoapi and cocodataset/panopticapi. COCO gives its objects
no order in depth, so larger ones are drawn first and smaller ones lie on top.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from preprocess.class_table import ClassTable, TableClass, build_classes
from preprocess.config import DatasetConfig
from preprocess.extras import import_extra
from preprocess.label_mapping import LabelMapping
from preprocess.layouts.coco_json import CocoFile, CocoImage, read_categories, read_coco
from preprocess.layouts.coco_stuff import COCO_IMAGES, COCO_SPLITS
from preprocess.layouts.drawn import NOTHING, Drawn, checked_points, short, with_nothing
from preprocess.layouts.layout import Classes, refuse_ignore_settings, texts
from preprocess.layouts.pairing import Found, Pair
from preprocess.source_picture import read_stored_labels
from preprocess.source_tree import SourceTree
from shards.coco import rle_mask
from shards.errors import ConfigError, CorruptShardError, DatasetError
from shards.files.strict_json import to_json

Stored = npt.NDArray[np.uint16]


class CocoLayout(Drawn):
    """What both have in common: `files` are templates of the JSON files, `images` of the folders of images."""

    images: ClassVar[tuple[str, ...]] = ("{split}", "images/{split}")
    files: ClassVar[tuple[str, ...]]
    splits: ClassVar[Mapping[str, str]] = COCO_SPLITS
    official: ClassVar[Mapping[str, int]] = COCO_IMAGES
    has_ids: ClassVar[bool] = True

    def markers(self, config: DatasetConfig) -> list[str]:
        first = next(iter((config.splits or self.splits).values()))
        return [str(PurePosixPath(text.replace("{split}", first)).parent) for text in self.files]

    def categories(self, config: DatasetConfig, tree: SourceTree) -> tuple[str, dict[str, list[int]]]:
        source, found = self._categories(config, tree)
        ids: dict[str, list[int]] = {}
        for number, (name, _) in found.items():
            ids.setdefault(name, []).append(number)
        return source, ids

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        source, found = self._categories(config, tree)
        refuse_ignore_settings(config, source)
        names = with_nothing(self.categories(config, tree)[1])
        color = dict(found.values())
        table = ClassTable(classes=[TableClass(name=name, names=[name], color=color[name]) for name in color])
        return self._finished(build_classes(table, source, names), names)

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        _, categories = self._categories(config, tree)
        for split, folder in (config.splits or self.splits).items():
            path, _ = self._file(tree, folder)
            content = read_coco(tree.read(path), f"{tree.name}/{path}", categories.keys(), has_ids=self.has_ids)
            if content.categories != categories:
                raise ConfigError(f"{tree.name}/{path} has other categories than the file of another split; legal: the "
                                  "same ids, names and colours in all")
            yield split, self._paired(tree, path, folder, content)

    def _categories(self, config: DatasetConfig, tree: SourceTree) -> tuple[str, dict[int, tuple[str, str | None]]]:
        """(file, its categories), of the split with the smallest file."""
        path, _ = min((self._file(tree, folder) for folder in (config.splits or self.splits).values()),
                      key=lambda file: file[1])
        return f"{tree.name}/{path}", read_categories(tree.read(path), f"{tree.name}/{path}")

    def _file(self, tree: SourceTree, folder: str) -> tuple[str, int]:
        """(path, bytes) of the JSON file of a split; of the first template, if there is none."""
        paths = [text.replace("{split}", folder) for text in self.files]
        for path in paths:
            if (size := tree.files(path.rpartition("/")[0]).get(path)) is not None:
                return path, size
        return paths[0], 0

    def _paired(self, tree: SourceTree, path: str, folder: str, content: CocoFile) -> Found:
        top = next((place for text in texts(self.images) if tree.has_files(place := text.replace("{split}", folder))),
                   self.images[0].replace("{split}", folder))
        files, labels = tree.files(top), self._label_files(tree, folder)
        pairs: dict[str, Pair] = {}
        unpaired = [(path, f"an annotation has {stray}") for stray in content.strays]
        used = {path}
        for image_id, image in content.images.items():
            place = f"{top}/{image.file_name}"
            used.add(place)
            made = content.problems.get(image_id) or self._pair(image_id, image, place, path, content, files, labels)
            if isinstance(made, str):
                unpaired.append((place, made))
            elif made.key in pairs:
                unpaired.append((place, f"{path}: the image id {image_id} has the same name as "
                                        f"{pairs[made.key].image_path}"))
            else:
                pairs[made.key] = made
            content.annotations.pop(image_id, None)  # the pair has its texts: not both in memory
        others = sorted((files.keys() | labels.keys()) - used - {pair.label_path for pair in pairs.values()})
        return Found([pairs[key] for key in sorted(pairs)], sorted(unpaired), others, f"{top} with {path}")

    def _pair(self, image_id: int, image: CocoImage, place: str, path: str, content: CocoFile, files: dict[str, int],
              labels: dict[str, int]) -> Pair | str:
        """The pair of an image, or what is wrong with it."""
        if place not in files:
            return f"{path}: the image id {image_id} has the file_name {image.file_name!r}, but there is no such file"
        key = str(PurePosixPath(image.file_name).with_suffix(""))
        if not key.strip("."):
            return f"{path}: the image id {image_id} has the file_name {image.file_name!r}, legal: a name"
        raw = content.annotations.get(image_id, [])
        label = self._label_path(raw, labels)
        if label is None:
            return f"{path}: the image id {image_id} has no annotation with the name of a file in the label folder"
        head = json_head(path, image_id, image)
        return Pair(key=key, image_path=place, label_path=label, annotation=f"{head}{', '.join(raw)}]}}",
                    fingerprint=f"{files[place]}+{labels.get(label, 0)}")

    def _label_files(self, tree: SourceTree, folder: str) -> dict[str, int]:
        """Path -> bytes of the label files of a split."""
        return {}

    def _label_path(self, raw: Sequence[str], labels: dict[str, int]) -> str | None:
        """The label file of an image, by its annotations; "" without label files; None if it is missing."""
        return ""

    def read_labels(self, data: bytes, pair: Pair, mapping: LabelMapping, height: int, width: int) -> Stored:
        content = json.loads(pair.annotation)
        where = f"{content['file']}, image id {content['image_id']} ({pair.image_path})"
        if [height, width] != content["size"]:
            raise DatasetError(f"{where}: height and width are {content['size']}, but the image has {[height, width]}")
        return self._drawn(data, content["annotations"], pair, where, height, width)

    @abstractmethod
    def _drawn(self, data: bytes, annotations: list[dict[str, Any]], pair: Pair, where: str, height: int,
               width: int) -> Stored:
        """The stored ids of an image."""


class CocoInstances(CocoLayout):
    """80 things; crowds are drawn too. The area that orders the objects is that of their pixels."""

    name = "coco-instances"
    files = ("annotations/instances_{split}.json", "{split}/_annotations.coco.json")

    def _drawn(self, data: bytes, annotations: list[dict[str, Any]], pair: Pair, where: str, height: int,
               width: int) -> Stored:
        coded = [_run_lengths(entry.get("segmentation"), height, width, f"{where}, annotation id {entry['id']}: "
                              "segmentation") for entry in annotations]
        areas = [int(rle_mask(rle).sum()) for rle in coded]  # decoded twice, so that one mask is in memory
        stored = np.full((height, width), NOTHING, np.uint16)
        for place in sorted(range(len(coded)), key=lambda place: -areas[place]):  # stable: ties by position
            stored[rle_mask(coded[place])] = annotations[place]["category_id"]
        return stored


class CocoPanoptic(CocoLayout):
    """133 things and stuff: a PNG of segment ids (red + 256 green + 65536 blue) for each image; 0 = no segment."""

    name = "coco-panoptic"
    files = ("annotations/panoptic_{split}.json",)
    has_ids = False
    maps: ClassVar[tuple[str, ...]] = ("annotations/panoptic_{split}", "panoptic_{split}")

    def _label_files(self, tree: SourceTree, folder: str) -> dict[str, int]:
        tops = [text.replace("{split}", folder) for text in self.maps]
        return tree.files(next((top for top in tops if tree.has_files(top)), tops[0]))

    def _label_path(self, raw: Sequence[str], labels: dict[str, int]) -> str | None:
        name = json.loads(raw[0]).get("file_name") if raw else None
        top = next(iter(labels), "").rpartition("/")[0]
        return path if (path := f"{top}/{name}") in labels else None

    def _drawn(self, data: bytes, annotations: list[dict[str, Any]], pair: Pair, where: str, height: int,
               width: int) -> Stored:
        red, green, blue = np.moveaxis(read_stored_labels(data, pair.label_path, True, height * width), -1, 0)
        ids, places = np.unique(red + green * np.uint32(256) + blue * np.uint32(65536), return_inverse=True)
        categories = {0: NOTHING}
        for segment in annotations[0]["segments_info"]:
            if type(segment.get("id")) is not int or segment["id"] in categories:
                raise DatasetError(f"{where}: a segment has the id {short(segment.get('id'))}, legal: whole numbers, "
                                   "from 1, each once")
            categories[segment["id"]] = segment["category_id"]
        unknown = [number for number in ids.tolist() if number not in categories]
        if unknown:
            raise DatasetError(f"{where}: {pair.label_path} has the segment id {unknown[0]}, which is not in its "
                               "segments_info")
        return np.array([categories[number] for number in ids.tolist()], np.uint16)[places].reshape(red.shape)


def json_head(path: str, image_id: int, image: CocoImage) -> str:
    """The beginning of what a pair holds: a JSON object, up to the place where the texts of the annotations follow."""
    return to_json({"file": path, "image_id": image_id, "size": [image.height, image.width], "annotations": []})[:-2]


def _run_lengths(segmentation: Any, height: int, width: int, where: str) -> dict[str, Any]:
    """An object, given as polygons or as run lengths, as COCO RLE. Raises DatasetError naming what is wrong."""
    if isinstance(segmentation, dict):
        try:
            mask = rle_mask(segmentation)
        except CorruptShardError as error:
            raise DatasetError(f"{where}: {error}") from error
        if mask.shape != (height, width):
            raise DatasetError(f"{where}.size is {list(mask.shape)}, but the image has {[height, width]}")
        return segmentation
    if not isinstance(segmentation, list) or not segmentation:
        raise DatasetError(f"{where} is {short(segmentation)}, legal: a list of polygons, or run lengths")
    for number, polygon in enumerate(segmentation):
        checked_points(polygon, height, width, f"{where}[{number}]")
    coco = import_extra("pycocotools.mask", "coco", where)
    return dict(coco.merge(coco.frPyObjects(segmentation, height, width)))
