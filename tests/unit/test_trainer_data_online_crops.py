"""Crops drawn from whole images in each epoch: those of the offline stage for the same draw, distributed like the
reference's, and pure functions of (seed, epoch, sample)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from shards.crops.drawing import Crop, CropRules, draw_crop
from shards.crops.label_runs import LabelRuns
from shards.crops.resampling import PADDING_COLOR, cut_image
from shards.errors import ConfigError
from shards.reader import ShardReader
from shards.rle import decode_header, encode_rle
from shards.sample import CropSample, decode_reduced
from tests.conftest import make_shards
from tests.support.label_maps import cut_labels, pad_labels
from tests.unit.test_trainer_data_crops import CPU, crops, equal
from trainer.config import load_run_config
from trainer.data.batch import Batch, augmented_images
from trainer.data.crops import TrainCrops
from trainer.data.loader import train_loader
from trainer.data.online_crops import draw_labels
from trainer.data.resampling import region_of, resample
from trainer.data_config import DataConfig
from trainer.seeding import sample_rng

RULES = CropRules(window=48, size=48, scaled_side="short", min_scale=0.5, max_scale=2.0, cat_max_ratio=0.75, tries=10)


def online(root: Path, batch: int = 3, size: int = 48, **changed: Any) -> TrainCrops:
    data = load_run_config(None, [f"data.crop_size={size}", "data.online.scaled_side=short",
                                  *(f"data.online.{name}={value}" for name, value in changed.items())]).data
    return crops(root, batch, crop_size=size, online=data.online)


def sample_of(image: npt.NDArray[np.uint8], label_map: npt.NDArray[Any], meta: dict[str, Any] | None = None,
              ) -> CropSample:
    """A sample with a lossless image."""
    import io

    with io.BytesIO() as stream:
        Image.fromarray(image).save(stream, "PNG")
        data = stream.getvalue()
    record = {"meta": meta or {}, **encode_rle(label_map, 255)}
    return CropSample(key="x", image_bytes=data, image_suffix="png", record=record, header=decode_header(record),
                      payload=b"")


@pytest.mark.parametrize("scaled_side", ["short", "long"])
def test_a_draw_gives_the_crop_of_the_offline_stage(whole_shards: Path, scaled_side: str) -> None:
    dataset = online(whole_shards, scaled_side=scaled_side)
    rules = dataset.rules
    assert rules is not None and rules.scaled_side == scaled_side
    padded = 0
    for number in range(12):
        batch = dataset[number]
        for place, draw in enumerate(dataset.sources[0].plan.micro_batch(number)):
            sample = dataset.sources[0].reader.read(draw.sample)
            label_map = sample.label_map()
            crop = draw_crop(sample_rng(5, draw.epoch, draw.sample), LabelRuns(label_map, 255), rules)
            assert crop is not None and batch.valid[place] == (crop.height, crop.width)
            pixels = np.asarray(cut_image(Image.fromarray(sample.image), crop, 48))
            assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), pixels)
            target = batch.targets()[place]
            table = np.append(target["labels"].numpy(), np.full(256 - target["labels"].numel(), 255))
            assert np.array_equal(table[target["segment_map"].numpy()],
                                  pad_labels(cut_labels(label_map, crop), 48, 255))
            padded += crop.height < 48
    assert padded or scaled_side == "short"


def test_each_epoch_draws_anew_and_nothing_else_matters(whole_shards: Path) -> None:
    dataset = online(whole_shards, batch=1)
    images = {number: dataset[number] for number in range(24)}
    by_key: dict[str, list[Batch]] = {}
    for batch in images.values():
        by_key.setdefault(batch.keys[0], []).append(batch)
    assert len(by_key) == 12 and all(len(pair) == 2 for pair in by_key.values())
    assert sum(torch.equal(one.images, other.images) for one, other in by_key.values()) == 0
    by_three = online(whole_shards, batch=3)
    assert torch.equal(by_three[2].images[1], images[7].images[0]), "micro-batches do not matter"
    assert torch.equal(online(whole_shards, batch=1)[20].images, images[20].images)


@pytest.mark.slow
@pytest.mark.parametrize("resample_on", ["worker", "device"])
def test_workers_change_nothing(whole_shards: Path, resample_on: str) -> None:
    alone = list(train_loader(online(whole_shards, resample_on=resample_on), range(10), CPU))
    dataset = online(whole_shards, resample_on=resample_on)
    dataset.config = replace(dataset.config, workers=2)
    helped = list(train_loader(dataset, range(10), CPU))
    assert all(equal(one.to(CPU), other.to(CPU)) for one, other in zip(alone, helped, strict=True))


@st.composite
def crops_of_images(draw: st.DrawFn) -> tuple[npt.NDArray[np.uint8], Crop]:
    """A random image, and a crop of it scaled by up to three either way."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    scaled = [max(1, int(side * draw(st.floats(0.3, 3)))) for side in (height, width)]
    size = [draw(st.integers(1, min(side, 60))) for side in scaled]
    top, left = (draw(st.integers(0, whole - part)) for whole, part in zip(scaled, size, strict=True))
    return image, Crop(scaled[0], scaled[1], top, left, size[0], size[1])


@given(crops_of_images())
@settings(max_examples=300, deadline=None)
def test_the_device_resizes_as_pillow_does(case: tuple[npt.NDArray[np.uint8], Crop]) -> None:
    image, crop = case
    side = max(crop.height, crop.width)
    expected = np.asarray(cut_image(Image.fromarray(image), crop, side))[: crop.height, : crop.width].astype(int)
    region, resize = region_of(image, crop)
    found = resample(torch.from_numpy(region.copy()), resize).numpy().astype(int)
    assert np.array_equal(found, expected)


def test_batches_resized_on_the_device_are_those_of_the_workers(whole_shards: Path) -> None:
    on_worker, on_device = online(whole_shards), online(whole_shards, resample_on="device")
    for number in range(8):
        sent = on_device[number]
        assert len(sent.regions) == 3 and sent.images.numel() == 0
        one, other = on_worker[number].to(CPU), sent.to(CPU)
        assert not other.regions and one.images.shape == other.images.shape and one.valid == other.valid
        assert one.images.is_contiguous(memory_format=torch.channels_last) == other.images.is_contiguous(
            memory_format=torch.channels_last)
        assert torch.equal(one.images, other.images)
        assert one.segment_maps is not None and other.segment_maps is not None
        assert torch.equal(one.segment_maps, other.segment_maps) and torch.equal(one.labels, other.labels)
        assert augmented_images(other).shape == one.images.shape


def reference_draw(rng: np.random.Generator, label_map: npt.NDArray[np.uint8], side: int) -> tuple[float, ...]:
    """The reference's transform, written down step by step on the whole scaled label map: what describes its crop."""
    height, width = label_map.shape
    short = int(side * rng.uniform(0.5, 2.0))
    scale = short / min(height, width)
    scaled = (short, int(width * scale + 0.5)) if height <= width else (int(height * scale + 0.5), short)
    rows = (np.arange(scaled[0]) * height // scaled[0])[:, None]
    resized = label_map[rows, np.arange(scaled[1]) * width // scaled[1]]
    for _ in range(11):
        top, left = (int(rng.integers(0, max(part - side, 0) + 1)) for part in scaled)
        cut = resized[top : top + side, left : left + side]
        found, counts = np.unique(cut[cut != 255], return_counts=True)
        if len(found) > 1 and counts.max() / counts.sum() < 0.75:
            break
    return describe(cut, short, top / max(scaled[0] - side, 1), left / max(scaled[1] - side, 1))


def describe(cut: npt.NDArray[np.uint8], short: int, top: float, left: float) -> tuple[float, ...]:
    counts = np.bincount(cut[cut != 255].reshape(-1))
    return short, top, left, np.count_nonzero(counts), counts.max() / max(counts.sum(), 1), cut.size


def assert_same_distribution(label_maps: list[npt.NDArray[np.uint8]], draws: int, side: int) -> None:
    """Two-sample Kolmogorov-Smirnov tests of scale, place, classes, the largest class's share, and size."""
    rules = replace(RULES, window=side, size=side)
    ours, theirs = [], []
    for image, label_map in enumerate(label_maps):
        sample = sample_of(np.zeros((*label_map.shape, 3), np.uint8), label_map)
        for number in range(draws):
            drawn = draw_labels(sample, rules, np.random.default_rng([0, image, number]))
            crop = drawn.crop
            label_ids = np.append(drawn.labels, np.full(256 - drawn.labels.size, 255)).astype(np.uint8)
            cut = label_ids[drawn.segment_map][: crop.height, : crop.width]
            ours.append(describe(cut, min(crop.scaled_height, crop.scaled_width),
                                 crop.top / max(crop.scaled_height - side, 1),
                                 crop.left / max(crop.scaled_width - side, 1)))
            theirs.append(reference_draw(np.random.default_rng([1, image, number]), label_map, side))
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 0.01


def test_crops_are_distributed_like_those_of_the_reference(whole_shards: Path) -> None:
    reader = ShardReader(whole_shards, "train")
    assert_same_distribution([reader.read(number).label_map() for number in range(len(reader))], 60, 48)


def test_crops_of_real_photographs_are_distributed_like_those_of_the_reference(shared_data: Path) -> None:
    files = sorted((shared_data / "ade20k-sample/annotations").rglob("*.png"))[:20]
    label_maps = [np.asarray(Image.open(file)) - np.uint8(1) for file in files]
    assert_same_distribution([label_map for label_map in label_maps if (label_map != 255).any()], 15, 128)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (700, 2), (20, 20)], ids=str)
def test_tiny_and_elongated_images_are_padded(size: tuple[int, int]) -> None:
    label_map = (np.arange(size[0] * size[1]).reshape(size) % 5).astype(np.uint8)
    for number in range(20):
        drawn = draw_labels(sample_of(np.zeros((*size, 3), np.uint8), label_map), RULES, np.random.default_rng(number))
        crop, labelled = drawn.crop, drawn.segment_map != 255
        assert drawn.segment_map.shape == (48, 48) and labelled[: crop.height, : crop.width].all()
        assert labelled.sum() == crop.height * crop.width


def test_an_image_without_labels_still_gives_a_crop() -> None:
    drawn = draw_labels(sample_of(np.zeros((60, 60, 3), np.uint8), np.full((60, 60), 255, np.uint8)), RULES,
                        np.random.default_rng(0))
    assert not drawn.labels.size and (drawn.segment_map == 255).all() and drawn.segment_map.dtype == np.uint8


def test_larger_stored_crops_are_rescaled_and_cropped_within_their_unpadded_part(scenes: Path, tmp_path: Path) -> None:
    root = make_shards(tmp_path / "large", scenes, "crops.stored_size=96", "crops.min_scale=1.0")
    dataset = online(root, scaled_side="stored", min_scale=0.8, max_scale=1.25)
    assert dataset.rules is not None
    for number in range(8):
        batch = dataset[number]
        for place, draw in enumerate(dataset.sources[0].plan.micro_batch(number)):
            sample = dataset.sources[0].reader.read(draw.sample)
            height, width = sample.valid_size
            label_map = sample.label_map()[:height, :width]
            crop = draw_crop(sample_rng(5, draw.epoch, draw.sample), LabelRuns(label_map, 255), dataset.rules)
            assert crop is not None and 0.75 < crop.scaled_height / height <= 1.25
            pixels = np.asarray(cut_image(Image.fromarray(sample.image[:height, :width]), crop, 48))
            assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), pixels)
            ids = np.append(batch.targets()[place]["labels"].numpy(), np.full(256, 255))
            assert np.array_equal(ids[batch.targets()[place]["segment_map"].numpy()],
                                  pad_labels(cut_labels(label_map, crop), 48, 255))


def test_a_reduced_jpeg_is_decoded_no_smaller_than_needed(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 14, 3), np.uint8)).resize((410, 330))
    image.save(tmp_path / "x.jpg", quality=95)
    data = (tmp_path / "x.jpg").read_bytes()
    for least in ((330, 410), (166, 100), (165, 205), (80, 100), (41, 51), (1, 1)):
        found = decode_reduced(data, "x", (330, 410), least)
        assert found.shape[0] >= least[0] and found.shape[1] >= least[1]
        small = np.asarray(image.resize((41, 33), Image.Resampling.BOX)).astype(float)
        again = np.asarray(Image.fromarray(found).resize((41, 33), Image.Resampling.BOX)).astype(float)
        assert np.abs(small - again).mean() < 15  # unrelated pictures: about 80
    assert decode_reduced(data, "x", (330, 410), (165, 205)).shape == (165, 205, 3)
    assert decode_reduced(data, "x", (330, 410), (166, 205)).shape == (330, 410, 3)


def test_reduced_decoding_changes_pixels_a_little_and_nothing_else(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    for file in sorted(scenes.rglob("*")):
        target = folder / file.relative_to(scenes)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".jpg", ".png"):
            picture = Image.open(file)
            way = Image.Resampling.BICUBIC if file.suffix == ".jpg" else Image.Resampling.NEAREST
            picture.resize((picture.width * 3, picture.height * 3), way).save(target)
        elif file.is_file():
            target.write_bytes(file.read_bytes())
    root = make_shards(tmp_path / "set", folder, "crops.splits=[]")
    changed = 0.0
    for number in range(4):
        exact, reduced = online(root)[number], online(root, reduced_decoding=True)[number]
        assert exact.valid == reduced.valid and torch.equal(exact.labels, reduced.labels)
        assert exact.segment_maps is not None and reduced.segment_maps is not None
        assert torch.equal(exact.segment_maps, reduced.segment_maps)
        difference = (exact.images.int() - reduced.images.int()).abs().float()
        assert difference.mean() < 4
        changed += difference.sum()
    assert changed > 0


def test_padding_has_the_colour_that_normalises_to_zero(whole_shards: Path) -> None:
    dataset = online(whole_shards, min_scale=0.5, max_scale=0.5)
    batch = dataset[0]
    height, width = batch.valid[0]
    assert height < 48 or width < 48
    colour = torch.tensor(PADDING_COLOR, dtype=torch.uint8)[:, None, None]
    assert (batch.images[0][:, height:] == colour).all() and (batch.images[0][:, :, width:] == colour).all()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.crop_size is not set, but data.online.scaled_side is short"):
        load_run_config(None, ["data.online.scaled_side=short"])
    with pytest.raises(ConfigError, match=r"online.min_scale is 3.0, legal: at most data.online.max_scale \(2.0\)"):
        load_run_config(None, ["data.online.min_scale=3"])
    with pytest.raises(ConfigError, match=r"data.online.scaled_side is 'shot', legal: short, long, stored"):
        load_run_config(None, ["data.online.scaled_side=shot", "data.crop_size=64"])
    assert DataConfig(crop_size=64).crop_rules is None
