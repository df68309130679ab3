"""Prediction shows images upright, as viewers do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shards.sample import decode_image
from tests.conftest import REPOSITORY
from tests.support.zygote import run_forked
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loop import train
from trainer.pretrained import load_pretrained


@pytest.fixture(scope="module")
def checkpoint(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    config = load_run_config(REPOSITORY / "tests/support/tiny.yaml", [f"data.root={scene_shards}", f"output_dir={run}",
                                                              "train.total_steps=1"])
    train(config, DistContext(rank=0, world_size=1, device=torch.device("cpu")))
    return run / "checkpoints/best.pt"


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, -1), (8, 1), (9, 0)])
def test_files_are_predicted_upright(checkpoint: Path, scenes: Path, tmp_path: Path, orientation: int,
                                     turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(next((scenes / "images/val").iterdir())) as scene:
        scene.save(tmp_path / "photo.png", exif=exif)
    stored = decode_image((tmp_path / "photo.png").read_bytes(), "photo")
    upright = np.ascontiguousarray(np.rot90(stored, turns))
    model = load_pretrained(checkpoint)
    expected = model.predict(upright).label_map
    assert np.array_equal(model.predict(tmp_path / "photo.png").label_map, expected)
    if orientation != 6:
        return
    done = run_forked(REPOSITORY / "trainer/predict.py", "--checkpoint", checkpoint, "--output", tmp_path / "out",
                      tmp_path / "photo.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out/photo.png") as found, Image.open(tmp_path / "out/photo-overlay.png") as overlay:
        assert np.array_equal(np.asarray(found), expected) and overlay.width > found.width  # a legend
