"""Padding of training crops: as the reference has it, right and below, not coloured, and 0 for the model.

The reference crops, mirrors, colours and normalises, and then pads (with 0; labels with "ignored"). We store padded
crops; `slow_reference` takes a stored crop's padding off, does the rest in the reference's order and pads again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.reader import ShardReader, iter_samples
from shards.rle import decode_header, encode_rle
from shards.sample import CropSample, decode_sample
from tests.conftest import make_shards
from tests.unit.test_trainer_data_crops import CPU, crops
from tests.unit.test_trainer_models_precision import NoWaiting
from trainer.data.batch import Batch, augmented_images, normalized_images
from trainer.data.targets import to_dense
from trainer.data.transforms import normalize, paddings, photometric_distort
from trainer.data_config import DataConfig
from trainer.interop import TransformersBatches
from trainer.loop import prepare_images
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def padded_shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of strongly downscaled scenes: most are padded below, on the right, or both."""
    return make_shards(tmp_path_factory.mktemp("padded") / "set", scenes, "crops.min_scale=0.4", "crops.max_scale=1.1")


def slow_reference(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(normalised image [3, H, W], label map [H, W]) of each sample of a batch, as the loader delivers it."""
    found = []
    for place, target in enumerate(batch.targets()):
        height, width = batch.valid[place]
        image, label_map = batch.images[place, :, :height, :width], label_map_of(target)[:height, :width]
        if batch.moves[place].mirrored:
            image, label_map = image.flip(2), label_map.flip(1)
        if batch.photometric is not None:
            image = photometric_distort(image[None], batch.photometric[place:place + 1])[0]
        padded = torch.zeros(3, *batch.images.shape[2:])
        padded[:, :height, :width] = normalize(image[None], IMAGENET_MEAN, IMAGENET_STD)[0]
        labels = torch.full(batch.images.shape[2:], -1)
        labels[:height, :width] = label_map
        found.append((padded, labels))
    return found


def label_map_of(target: Any) -> Tensor:
    """int64 [H, W], -1 for unlabelled pixels."""
    dense = to_dense(target)
    label_map = torch.full(dense["masks"].shape[1:], -1)
    for mask, label in zip(dense["masks"], dense["labels"], strict=True):
        label_map[mask] = label
    return label_map


@pytest.mark.parametrize("targets", ["segment_map", "dense"])
@pytest.mark.parametrize("photometric", [True, False])
def test_batches_are_what_the_reference_makes_of_the_same_crops(padded_shards: Path, targets: str,
                                                                photometric: bool) -> None:
    dataset = crops(padded_shards, batch=8, targets=targets, photometric=photometric)
    seen = {"below": 0, "right": 0, "mirrored": 0}
    for number in range(3):
        batch = dataset[number]
        moved = batch.to(CPU)
        images = normalized_images(moved, IMAGENET_MEAN, IMAGENET_STD)
        for place, (image, label_map) in enumerate(slow_reference(batch)):
            height, width = batch.valid[place]
            assert torch.equal(images[place], image)
            assert torch.equal(label_map_of(moved.targets()[place]), label_map)
            assert images[place, :, height:].eq(0).all() and images[place, :, :, width:].eq(0).all()
            seen["below"] += height < 64
            seen["right"] += width < 64
            seen["mirrored"] += batch.moves[place].mirrored and width < 64
    assert min(seen.values()) > 0, seen


def test_the_valid_size_is_that_of_the_crop_s_own_record(padded_shards: Path) -> None:
    """Also for shards written before the trainer read it: `meta.crop` has always been stored."""
    reader = ShardReader(padded_shards, "train")
    for sample in iter_samples(padded_shards, "train"):
        height, width = sample.valid_size
        assert (height, width) == (sample.meta["crop"]["height"], sample.meta["crop"]["width"])
        assert (sample.segment_map[height:] == 255).all() and (sample.segment_map[:, width:] == 255).all()
        assert np.abs(sample.image[height + 16:].astype(int) - (124, 116, 104)).max(initial=0) <= 2
    assert all(sample.valid_size == sample.image.shape[:2] for sample in iter_samples(padded_shards, "val"))
    assert reader.manifest.splits["train"].samples == 24


@pytest.mark.parametrize("meta", [
    {}, {"crop": None}, {"crop": [1, 2]}, {"crop": {"height": 3}}, {"crop": {"height": 0, "width": 2}},
    {"crop": {"height": 5, "width": 4}}, {"crop": {"height": 2.0, "width": 2}}, {"crop": {"height": True, "width": 2}},
], ids=str)
def test_where_nothing_sound_is_said_all_is_valid(meta: dict[str, Any]) -> None:
    record = encode_rle(np.zeros((4, 4), np.uint8)) | {"key": "k", "meta": meta}
    sample = CropSample(key="k", image_bytes=b"", image_suffix="jpg", record=record, header=decode_header(record),
                        payload=b"")
    assert sample.valid_size == (4, 4)


def test_a_sample_that_says_its_valid_size_is_read(padded_shards: Path) -> None:
    sample = next(iter_samples(padded_shards, "train"))
    record, _ = decode_sample(sample.payload)
    assert record["meta"]["crop"].keys() >= {"height", "width"}


@pytest.mark.parametrize("targets", ["segment_map", "dense"])
def test_cropping_again_keeps_padding_right_and_below(scenes: Path, tmp_path: Path, targets: str) -> None:
    """A larger stored window with padding: the crop holds as much of the picture as fits, and says how much."""
    root = make_shards(tmp_path / "set", scenes, "crops.stored_size=96", "crops.min_scale=0.4", "crops.max_scale=1.2")
    dataset = crops(root, batch=12, crop_size=64, targets=targets)
    samples = {sample.key: sample for sample in iter_samples(root, "train")}
    for number in range(2):
        batch = dataset[number]
        for place, key in enumerate(batch.keys):
            stored, (height, width) = samples[key], batch.valid[place]
            assert (height, width) == tuple(min(64, side) for side in stored.valid_size)
            windows = np.lib.stride_tricks.sliding_window_view(stored.image, (64, 64, 3))[:, :, 0]
            wanted = batch.images[place].permute(1, 2, 0).numpy()
            tops, lefts = np.nonzero((windows == wanted).all((2, 3, 4)))
            assert len(tops) and (tops[0] + height <= stored.valid_size[0] and lefts[0] + width <= stored.valid_size[1])
            assert (label_map_of(batch.targets()[place])[height:] == -1).all()
        images = normalized_images(batch.to(CPU), IMAGENET_MEAN, IMAGENET_STD)
        for image, (expected, _) in zip(images, slow_reference(batch), strict=True):
            assert torch.equal(image, expected)


def test_padding_keeps_its_colour_in_pictures_of_the_batch(padded_shards: Path) -> None:
    batch = crops(padded_shards, batch=24)[0].to(CPU)
    shown = augmented_images(batch)
    places = list(paddings(shown, batch.valid))
    assert places and all(torch.equal(shown[place], batch.images[place]) for place in places)
    assert batch.photometric is not None
    coloured = photometric_distort(batch.images, batch.photometric)
    assert any(not torch.equal(coloured[place], batch.images[place]) for place in places), "the colour would change it"


def test_other_libraries_get_the_same_padding(padded_shards: Path) -> None:
    (theirs,) = list(TransformersBatches(DataConfig(root=str(padded_shards), workers=0), batch_size=24, last_step=1,
                                         seed=5))
    ours = crops(padded_shards, batch=24)[0].to(CPU)
    assert torch.equal(theirs["pixel_values"], normalized_images(ours, IMAGENET_MEAN, IMAGENET_STD))
    assert all((theirs["pixel_values"][place] == 0).all() for place in paddings(ours.images, ours.valid))


def test_no_device_is_waited_for(padded_shards: Path) -> None:
    from trainer.config import load_run_config

    batch, config = crops(padded_shards, batch=8)[0], load_run_config(None, [])
    assert any(move.mirrored for move in batch.moves) and any(True for _ in paddings(batch.images, batch.valid))
    with NoWaiting():
        moved = batch.to(CPU)
        prepare_images(moved, config)
