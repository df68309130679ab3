"""LoveDA, land cover in aerial photographs: 7 classes, 0 = no data.

Facts: Junjue-Wang/LoveDA, README; open-mmlab/mmsegmentation, mmseg/datasets/loveda.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from preprocess.layouts.layout import Layout


class LoveDA(Layout):
    """Train.zip and Val.zip, unpacked side by side; each has the areas Rural and Urban."""

    name = "loveda"
    images = "{split}/{area}/images_png/{stem}.png"
    labels = "{split}/{area}/masks_png/{stem}.png"
    splits: ClassVar[Mapping[str, str]] = {"train": "Train", "val": "Val"}
    official: ClassVar[Mapping[str, int]] = {"train": 2522, "val": 1669}
    table = "loveda.txt"
    reduces_zero_label = True
