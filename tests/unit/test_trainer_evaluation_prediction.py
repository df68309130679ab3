"""A prediction as people use it: areas, masks, pictures, files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.coco import rle_mask
from shards.manifest import ClassInfo
from trainer.evaluation.prediction import Prediction

CLASSES = [ClassInfo(name="wall", color=(200, 0, 0)), ClassInfo(name="sky", color=(0, 0, 200)),
           ClassInfo(name="tree", color=(0, 200, 0))]


@pytest.fixture
def prediction() -> Prediction:
    label_map = np.full((40, 60), 1, np.uint8)
    label_map[:10] = 2
    return Prediction(image=np.full((40, 60, 3), 100, np.uint8), label_map=label_map, classes=CLASSES)


def test_areas_are_the_predicted_classes_the_largest_first(prediction: Prediction) -> None:
    sky, tree = prediction.areas()
    assert (sky.id, sky.name, sky.pixels, sky.share) == (1, "sky", 1800, 0.75) and tree.name == "tree"
    assert repr(prediction) == "Prediction(60 x 40: sky 75.0%, tree 25.0%)"


def test_masks_by_id_and_name(prediction: Prediction) -> None:
    assert np.array_equal(prediction.mask("tree"), prediction.label_map == 2)
    assert np.array_equal(prediction.mask(1), prediction.label_map == 1) and not prediction.mask("wall").any()
    for wrong in ("lamp", 3, -1):
        with pytest.raises(KeyError, match="legal: an id from 0 to 2, or a name"):
            prediction.mask(wrong)


def test_a_notebook_shows_image_overlay_and_legend(prediction: Prediction) -> None:
    with Image.open(io.BytesIO(prediction._repr_png_())) as shown:
        pixels = np.asarray(shown.convert("RGB")).reshape(-1, 3)
    colors = {tuple(color) for color in np.unique(pixels, axis=0).tolist()}
    assert {(100, 100, 100), (50, 50, 150), (50, 150, 50), (0, 0, 200), (0, 200, 0)} <= colors
    assert (200, 0, 0) not in colors, "a class that was not predicted is not in the legend"
    assert prediction.overlay().size == (60, 40)


def test_files_hold_ids_and_show_colours(prediction: Prediction, tmp_path: Path) -> None:
    prediction.save(tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as saved:
        assert saved.mode == "P" and np.array_equal(np.asarray(saved), prediction.label_map)
        assert saved.convert("RGB").getpixel((0, 0)) == (0, 200, 0)


def test_rle_is_cocos(prediction: Prediction) -> None:
    sky, tree = prediction.rle()
    assert (sky["category_id"], sky["category"], sky["area"]) == (1, "sky", 1800)
    for row in (sky, tree):
        assert np.array_equal(rle_mask(row["segmentation"]), prediction.label_map == row["category_id"])
