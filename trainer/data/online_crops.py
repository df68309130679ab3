"""Training crops drawn anew in each epoch, from whole images or from stored crops larger than the trained size.

The same draw gives the same labels, and the same pixels but for the JPEG between them, as cutting offline
(`preprocess`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.crops.drawing import Crop, CropRules, draw_any_crop, draw_crop
from shards.crops.label_runs import LabelRuns
from shards.crops.resampling import PADDING_COLOR, resized_crop
from shards.rle import decode_runs, ignore_value, segment_map_from_runs
from shards.sample import CropSample, decode_reduced
from trainer.data.class_mapping import ClassMapping


class DrawnLabels(NamedTuple):
    """A crop of a sample, and its labels."""

    crop: Crop
    segment_map: npt.NDArray[Any]  # [side, side]: index into `labels`, padded on the right and below with "ignored"
    labels: npt.NDArray[np.int64]  # [N] class ids, ascending


def draw_labels(sample: CropSample, rules: CropRules, rng: np.random.Generator, mapping: ClassMapping | None = None
                ) -> DrawnLabels:
    """Draw a crop of the sample's unpadded part: where no try has a labelled pixel, any crop. Raises CorruptShardError.

    Labels are counted and cut as runs, after the `mapping` of their classes: the label map of the whole image is never
    made.
    """
    found, labels = decode_runs(sample.record, sample.header), sample.labels
    start, length, index = found
    if mapping is not None:
        (start, length, index), labels = mapping.of_runs(found, labels)
    source = LabelRuns.from_runs(start, length, index, sample.header.width, sample.valid_size)
    crop = draw_crop(rng, source, rules) or draw_any_crop(rng, source, rules)
    side = rules.window
    runs = source.cut(crop, side)
    present = np.flatnonzero(runs.counts())
    number = np.zeros(labels.size, np.int64)  # of each of the labels among those present
    number[present] = np.arange(present.size)
    segment_map = segment_map_from_runs(side, side, runs.start, runs.length, number[runs.value],
                                        ignore_value(present.size))
    return DrawnLabels(crop, segment_map, labels[present])


def cut_into(out: npt.NDArray[np.uint8], sample: CropSample, crop: Crop, reduced: bool) -> None:
    """Write the pixels of a crop to `out` `[side,side,3]`, padded on the right and below with the mean colour.

    With `reduced`, a JPEG is decoded at a fraction of its size where the crop needs no more (see `decode_reduced`).
    Raises CorruptShardError.
    """
    resized = resized_crop(Image.fromarray(source_pixels(sample, crop, reduced)), crop)
    out[: crop.height, : crop.width] = np.asarray(resized)
    out[crop.height :] = PADDING_COLOR
    out[: crop.height, crop.width :] = PADDING_COLOR


def source_pixels(sample: CropSample, crop: Crop, reduced: bool) -> npt.NDArray[np.uint8]:
    """The sample's unpadded pixels `[H,W,3]`, decoded at its own size or, with `reduced`, at a fraction of it."""
    stored, valid = (sample.header.height, sample.header.width), sample.valid_size
    if valid == stored and reduced:
        return decode_reduced(sample.image_bytes, sample.key, stored, (crop.scaled_height, crop.scaled_width))
    return sample.image[: valid[0], : valid[1]]
