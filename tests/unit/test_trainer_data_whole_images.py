"""A folder of images and label maps to evaluate on: what cannot be evaluated in full is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import ConfigError
from shards.manifest import ClassInfo
from trainer.data.whole_images import FolderImages
from trainer.data_config import DataConfig

CLASSES = [ClassInfo(name=name, color=(number, 0, 0)) for number, name in enumerate("abc")]


def folder(place: Path) -> FolderImages:
    return FolderImages(place / "images", place / "labels", CLASSES, DataConfig())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three images of a few pixels."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(3):
        Image.fromarray(np.full((2, 3 + number, 3), number, np.uint8)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(np.full((2, 3 + number), number, np.uint8)).save(tmp_path / f"labels/{number}.png")
    return tmp_path


def test_all_images_are_there_in_the_order_of_their_names(place: Path) -> None:
    found = folder(place)
    assert [found[number].key for number in range(len(found))] == ["0", "1", "2"]
    assert found[2].image.shape == (3, 2, 5) and (found[2].label_map == 2).all()


@pytest.mark.parametrize("suffix", [".webp", ".TIF", ".bmp"])
def test_an_image_of_a_kind_that_is_not_read_is_not_left_out_silently(place: Path, suffix: str) -> None:
    (place / f"images/sub{suffix}").write_bytes(b"an image")
    with pytest.raises(ConfigError, match=rf"1 images in \S+images are of another kind, .*sub{suffix}; legal"):
        folder(place)
    (place / f"images/sub{suffix}").rename(place / f"images/1{suffix}")  # another form of one that is read
    assert len(folder(place)) == 3


def test_an_image_that_is_a_link_to_nothing_is_missed(place: Path) -> None:
    (place / "images/1.png").unlink()
    (place / "images/1.png").symlink_to(place / "unmounted/1.png")
    with pytest.raises(FileNotFoundError, match=r"images/1\.png"):
        folder(place)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"red\x1b[31m"])
def test_names_that_no_table_can_hold_are_one_line(place: Path, name: bytes) -> None:
    for kind in ("images", "labels"):
        (place / f"{kind}/0.png").rename(place / kind / os.fsdecode(name + b".png"))
    with pytest.raises(ConfigError, match="rename it") as error:
        folder(place)
    assert str(error.value).isprintable()


def test_class_ids_with_fractions_are_refused(place: Path) -> None:
    (place / "labels/0.png").unlink()
    Image.fromarray(np.full((2, 3), 0.75, np.float32)).save(place / "labels/0.tif")
    with pytest.raises(ConfigError, match=r"labels/0\.tif holds numbers with fractions \(float32\), legal: whole"):
        _ = folder(place)[0]
