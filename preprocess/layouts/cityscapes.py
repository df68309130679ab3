"""Cityscapes, fine annotations: `leftImg8bit` and `gtFine` side by side; 19 classes are evaluated.

Facts: mcordts/cityscapesScripts, README and helpers/labels.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from preprocess.layouts.layout import Layout


class Cityscapes(Layout):
    """Label maps as published, with the ids 0..33; ids without a train id are ignored."""

    name = "cityscapes"
    images = "leftImg8bit/{split}/{stem}_leftImg8bit.png"
    labels = "gtFine/{split}/{stem}_gtFine_labelIds.png"
    official: ClassVar[Mapping[str, int]] = {"train": 2975, "val": 500}
    table = "cityscapes.yaml"
    companions = tuple(f"_gtFine_{kind}" for kind in (
        "color.png", "instanceIds.png", "polygons.json", "labelIds.png", "labelTrainIds.png", "instanceTrainIds.png"))


class CityscapesTrainIds(Cityscapes):
    """Label maps made by cityscapesScripts' createTrainIdLabelImgs: 0..18, and 255 for ignored pixels."""

    name = "cityscapes-trainids"
    labels = "gtFine/{split}/{stem}_gtFine_labelTrainIds.png"
    table = "cityscapes-trainids.txt"
