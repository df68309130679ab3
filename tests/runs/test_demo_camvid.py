"""`make demo-camvid` on a folder of the same layout as the shared one, with drawn pictures and a small random ViT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tests.unit.test_trainer_models_backbones_dinov2 import vit

DEMO = (sys.executable, REPOSITORY / "benchmarks" / "demo.py")


def shared_folder(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 4)):
        images, labels = root / "data" / "camvid" / split, root / "data" / "camvid" / f"{split}annot"
        images.mkdir(parents=True)
        labels.mkdir()
        for number in range(count):
            label = np.repeat(np.repeat(generator.integers(0, 12, (6, 8), dtype=np.uint8), 30, 0), 30, 1)
            Image.fromarray(label).save(labels / f"{number:04}.png")
            Image.fromarray(np.stack([20 * label] * 3, axis=2)).save(images / f"{number:04}.jpg")
    vit().save_pretrained(root / "weights" / "dinov2-vits14")
    return root


@pytest.mark.slow
def test_its_commands_run_and_the_numbers_are_reported(tmp_path: Path) -> None:
    shared = shared_folder(tmp_path / "shared")
    result = subprocess.run([*DEMO, "--output", tmp_path / "demo", "--shared", shared, "--steps", "2"],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "demo/run/evaluation/metrics.json").read_text())
    assert f"val mIoU {metrics['mIoU']:.3f}; predicting" in result.stdout
    assert len(list((tmp_path / "demo/predictions").glob("*-overlay.png"))) == 4


def test_a_folder_that_it_did_not_make_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine" / "shards").mkdir(parents=True)
    result = subprocess.run([*DEMO, "--output", tmp_path / "mine"], capture_output=True, text=True)
    assert result.returncode == 1 and (tmp_path / "mine" / "shards").exists()
    assert "is not a folder that this demo made" in result.stderr


def test_without_photographs_it_says_what_is_missing(tmp_path: Path) -> None:
    result = subprocess.run([*DEMO, "--output", tmp_path / "demo", "--shared", tmp_path], capture_output=True,
                            text=True)
    assert result.returncode == 1 and not (tmp_path / "demo").exists()
    assert result.stderr.startswith(f"error: {tmp_path / 'data' / 'camvid'} does not exist; set MASKSTREAM_SHARED")
