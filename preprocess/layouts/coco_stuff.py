"""COCO-Stuff 164k: the images of COCO 2017 with the label maps of stuffthingmaps_trainval2017.zip; 171 classes.

Facts: nightrome/cocostuff, README and labels.txt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from preprocess.layouts.layout import Layout

COCO_SPLITS = {"train": "train2017", "val": "val2017"}
COCO_IMAGES = {"train": 118287, "val": 5000}


class COCOStuff(Layout):
    """Stored ids are one less than in labels.txt; 255 = unlabelled."""

    name = "coco-stuff"
    images: ClassVar[tuple[str, ...]] = ("images/{split}/{stem}.jpg", "{split}/{stem}.jpg")
    labels: ClassVar[tuple[str, ...]] = ("stuffthingmaps/{split}/{stem}.png", "annotations/{split}/{stem}.png",
                                         "{split}/{stem}.png")
    splits: ClassVar[Mapping[str, str]] = COCO_SPLITS
    official: ClassVar[Mapping[str, int]] = COCO_IMAGES
    table = "coco-stuff.yaml"
    companions = ("_labelTrainIds.png",)
