"""Pascal VOC 2012 segmentation, and Pascal Context on the images of VOC 2010.

Facts: the VOC 2012 development kit; the dataset page of Pascal Context (459 names, 4,998 + 5,105 images of VOC 2010's
train and val); open-mmlab/mmsegmentation, tools/convert_datasets/pascal_context.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from preprocess.label_mapping import LabelMapping
from preprocess.layouts.layout import Layout
from preprocess.layouts.pairing import Pair
from preprocess.matlab_file import read_matrix
from shards.errors import DatasetError
from shards.rle import MAX_CLASSES


class PascalVOC(Layout):
    """20 objects and background; 255 marks borders and what is too hard."""

    name = "voc"
    images = "JPEGImages/{stem}.jpg"
    labels = "SegmentationClass/{stem}.png"
    lists = ("ImageSets/Segmentation/{split}.txt",)
    official: ClassVar[Mapping[str, int]] = {"train": 1464, "val": 1449}
    table = "voc.txt"


class PascalContext(Layout):
    """The usual 59 of 459 names; everything else is ignored. The label maps are MATLAB files."""

    name = "pascal-context"
    images = "JPEGImages/{stem}.jpg"
    labels = "trainval/{stem}.mat"
    label_suffixes = (".mat",)
    lists = ("ImageSets/SegmentationContext/{split}.txt", "ImageSets/Main/{split}.txt")
    official: ClassVar[Mapping[str, int]] = {"train": 4998, "val": 5105}
    table = "pascal-context.yaml"

    def read_labels(self, data: bytes, pair: Pair, mapping: LabelMapping, height: int, width: int) -> npt.NDArray[Any]:
        values = read_matrix(data, pair.label_path, "LabelMap", height, width)
        if values.min() < 0 or values.max() > MAX_CLASSES or (values % 1).any():
            raise DatasetError(f"{pair.label_path}: LabelMap does not hold ids, legal: whole numbers 0..{MAX_CLASSES}")
        return values.astype(np.uint16)
