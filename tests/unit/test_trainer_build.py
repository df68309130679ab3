"""Crops that a head cannot train on are refused before the first step, naming the smallest legal size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards.errors import ConfigError
from shards.manifest import load_manifest
from tests.runs.test_end_to_end import tiny
from trainer.build import build_model, check_crop_size
from trainer.config import RunConfig
from trainer.run.run import open_crops


def settings(scene_shards: Path, tmp_path: Path, kind: str, micro: int, *overrides: str) -> RunConfig:
    config = tiny(scene_shards, tmp_path / "run", f"train.micro_batch_size={micro}", *overrides)
    return replace(config, decoder_head=replace(config.decoder_head, type=kind))


@pytest.mark.parametrize(("kind", "micro", "height", "width"), [
    ("m2f", 1, 32, 32), ("m2f", 2, 32, 32), ("m2f", 1, 32, 64), ("linear", 1, 16, 16), ("linear", 2, 16, 16),
    ("linear", 1, 32, 16), ("eomt", 1, 16, 16), ("pmt", 1, 16, 16),
])
def test_what_is_refused_is_what_cannot_be_trained(scene_shards: Path, tmp_path: Path, kind: str, micro: int,
                                                   height: int, width: int) -> None:
    config = settings(scene_shards, tmp_path, kind, micro)
    if kind == "eomt":
        refused = trains = None  # layer norms only
    else:
        torch.manual_seed(0)
        model = build_model(config, 5).train()
        try:
            model(torch.rand(micro, 3, height, width))
            trains = True
        except ValueError as error:
            assert "more than 1 value per channel" in str(error)
            trains = False
        refused = (kind, micro, height, width) in (("m2f", 1, 32, 32), ("linear", 1, 16, 16))
        assert trains != refused
    if refused:
        least = 2 * height
        with pytest.raises(ConfigError, match=rf"are {height}x{width} pixels and train\.micro_batch_size is 1: batch "
                           rf"norm .*crops of at least {least}x{least}, or a train\.micro_batch_size of at least 2"):
            check_crop_size(config, height, width)
    else:
        check_crop_size(config, height, width)


def test_a_linear_head_without_batch_norm_trains_on_one_cell(scene_shards: Path, tmp_path: Path) -> None:
    config = settings(scene_shards, tmp_path, "linear", 1, "decoder_head.type=linear",
                      "decoder_head.use_batchnorm=false")
    check_crop_size(config, 16, 16)
    with pytest.raises(ConfigError, match=r"24x16 pixels, legal for decoder_head\.type linear: multiples of 16"):
        check_crop_size(config, 24, 16)


def test_a_run_says_so_at_its_start(scene_shards: Path, tmp_path: Path) -> None:
    config = settings(scene_shards, tmp_path, "m2f", 1, "data.crop_size=32")
    with pytest.raises(ConfigError, match="crops of at least 64x64"):
        open_crops(config, load_manifest(scene_shards))
