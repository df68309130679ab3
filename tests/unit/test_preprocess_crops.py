"""Crop positions under the settings of other recipes, which must not change sets made before."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from preprocess.blocks import STORED_LATER, config_hash, producer
from preprocess.config import CropConfig, DatasetConfig, PreprocessConfig
from preprocess.pairs import open_dataset
from shards.cli.config_file import config_to_dict
from shards.crops.drawing import draw_crop
from shards.crops.label_runs import LabelRuns
from shards.manifest import FORMAT_VERSION, hash_of
from tests.support.label_maps import cut_labels


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (512, 512), (33, 2000)], ids=str)
def test_the_long_side_may_be_what_is_scaled(size: tuple[int, int]) -> None:
    """As in torchvision's ScaleJitter: ratio = min(target / height, target / width) x U, both sides floored."""
    config = CropConfig(size=512, scaled_side="long", cat_max_ratio=None)
    labels = np.zeros(size, np.uint8)
    crops = [draw_crop(np.random.default_rng(seed), LabelRuns(labels, 255), config.rules) for seed in range(200)]
    long_sides = []
    for seed, crop in enumerate(crops):
        assert crop is not None
        scale = 512 * np.random.default_rng(seed).uniform(0.5, 2.0)
        ratio = min(scale / size[0], scale / size[1])
        assert (crop.scaled_height, crop.scaled_width) == (int(size[0] * ratio), int(size[1] * ratio))
        assert (crop.height, crop.width) == (min(512, crop.scaled_height), min(512, crop.scaled_width))
        long_sides.append(max(crop.scaled_height, crop.scaled_width))
    assert 250 <= min(long_sides) < 300 and 980 < max(long_sides) <= 1024


def test_without_the_rule_on_classes_any_labelled_place_will_do() -> None:
    """A crop of a single class is redrawn under the rule, accepted without it; one without labels is never accepted."""
    labels = np.full((64, 64), 255, np.uint8)
    labels[:, :4] = 3
    for config, redraws in ((CropConfig(size=32, cat_max_ratio=None), False), (CropConfig(size=32), True)):
        rng = np.random.default_rng(0)
        crop = draw_crop(rng, LabelRuns(np.full((64, 64), 7, np.uint8), 255), config.rules)
        first = np.random.default_rng(0)
        first.uniform(), first.integers(0, 2), first.integers(0, 2)
        assert crop is not None and (rng.bit_generator.state != first.bit_generator.state or not redraws)
        for seed in range(50):
            crop = draw_crop(np.random.default_rng(seed), LabelRuns(labels, 255), config.rules)
            assert crop is None or (cut_labels(labels, crop) == 3).any()
    assert draw_crop(np.random.default_rng(0), LabelRuns(np.full((64, 64), 255, np.uint8), 255), config.rules) is None


def test_later_settings_leave_the_identity_of_earlier_sets_alone(scenes: Path) -> None:
    """The same command completes a set started before these settings existed; this hash was recorded then."""
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(scenes)), "fail")
    plain = PreprocessConfig(dataset=DatasetConfig(kind="folder", root=str(scenes)))
    content = config_to_dict(plain)
    assert content["crops"].pop("scaled_side") == "short"
    assert content["dataset"].pop("exif_orientation") == "refuse"
    for name, neutral in STORED_LATER["dataset"].items():
        assert content["dataset"].pop(name) == neutral
    for place in ("output", "staging", "workers", "executor", "ray_address", "on_error", "warn_ignored"):
        del content[place]
    for place in ("root", "class_file", "limit"):
        del content["dataset"][place]
    meaning = [asdict(item) for item in dataset.classes], *dataset.mapping.identity
    before = hash_of([FORMAT_VERSION, content, meaning, producer()])
    assert config_hash(plain, dataset) == before
    assert config_hash(replace(plain, crops=CropConfig(scaled_side="long")), dataset) != before
