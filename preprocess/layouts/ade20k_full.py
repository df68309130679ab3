"""The full ADE20K, release 2016_07_26, reduced to the 150 classes of the scene parsing benchmark.

Facts: CSAILVision/sceneparsing, convertFromADE; unlike there, label maps keep their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from preprocess.config import DatasetConfig
from preprocess.label_mapping import LabelMapping
from preprocess.layouts.layout import Layout
from preprocess.layouts.pairing import Pair
from preprocess.source_picture import read_stored_labels
from preprocess.source_tree import SourceTree
from shards.errors import DatasetError

_NEWER = "images/ADE"  # the folder of release 2021_17_01


class ADE20KFull(Layout):
    """Masks are RGB: red // 10 * 256 + green is the object's number in the index of the release, blue the instance."""

    name = "ade20k-full"
    images = "images/{split}/{stem}.jpg"
    labels = "images/{split}/{stem}_seg.png"
    splits: ClassVar[Mapping[str, str]] = {"train": "training", "val": "validation"}
    official: ClassVar[Mapping[str, int]] = {"train": 20210, "val": 2000}
    table = "ade20k-full.yaml"
    companions = ("_atr.txt", *(f"_parts_{level}.png" for level in range(1, 10)))

    def open(self, config: DatasetConfig) -> SourceTree:
        tree = super().open(config)
        if tree.has_files(_NEWER):
            raise DatasetError(f"{tree.name} is the release 2021_17_01: its numbers are explained only by "
                               "index_ade20k.pkl, a pickle, which is never read. Use release 2016_07_26, or "
                               "ADEChallengeData2016 with dataset.kind=ade20k")
        return tree

    def read_labels(self, data: bytes, pair: Pair, mapping: LabelMapping, height: int, width: int) -> npt.NDArray[Any]:
        red, green, _ = np.moveaxis(read_stored_labels(data, pair.label_path, True, height * width), -1, 0)
        if wrong := (red % 10).any():
            wrong = red[red % 10 != 0][0]
            raise DatasetError(f"{pair.label_path} has a pixel whose red is {wrong}, legal: multiples of 10")
        return red.astype(np.uint16) // 10 * 256 + green
