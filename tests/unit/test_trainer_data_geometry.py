"""Rotations, reflections and erasing, pixel by pixel; the user's own augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shards.cli.config_file import config_to_dict
from shards.crops.resampling import PADDING_COLOR
from shards.errors import ConfigError
from tests.unit.test_trainer_data_crops import CPU, crops, equal
from trainer.config import load_run_config, run_config_from_dict
from trainer.data.batch import Batch, normalized_images
from trainer.data.geometry import Move, draw_move, rotate_image, rotate_labels
from trainer.data.targets import to_dense
from trainer.data.user_transform import load_transform, transformed
from trainer.data_config import DataConfig
from trainer.seeding import transform_generator

EVERYTHING = {"hflip": 0.5, "vflip": 0.5, "quarter_turns": 0.5, "rotate": 0.5, "rotate_degrees": 30.0, "erase": 0.5}
ZEROS, ONES = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
Pixels = npt.NDArray[Any]


def source_of(row: int, column: int, height: int, width: int, degrees: float) -> tuple[float, float]:
    """The place that a pixel shows after a counter-clockwise rotation (rows point down)."""
    y, x = row - (height - 1) / 2, column - (width - 1) / 2
    angle = math.radians(degrees)
    return (y * math.cos(angle) + x * math.sin(angle) + (height - 1) / 2,
            x * math.cos(angle) - y * math.sin(angle) + (width - 1) / 2)


def slow_rotation(picture: Pixels, degrees: float, nearest: bool, outside: Any) -> Pixels:
    """[H, W] or [H, W, 3], one pixel after the other."""
    height, width = picture.shape[:2]
    rotated = np.empty_like(picture)
    for row in range(height):
        for column in range(width):
            y, x = source_of(row, column, height, width, degrees)
            if not (-0.5 <= y < height - 0.5 and -0.5 <= x < width - 0.5):
                rotated[row, column] = outside
            elif nearest:
                rotated[row, column] = picture[math.floor(y + 0.5), math.floor(x + 0.5)]
            else:
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                top, left = int(y), int(x)
                value = np.zeros(3)
                for at, share in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
                    for place, part in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
                        value += share * part * picture[at, place]
                rotated[row, column] = np.floor(value + 0.5)
    return rotated


@given(st.integers(1, 14), st.integers(1, 14), st.floats(-180, 180), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_rotation_is_that_of_its_pixels(height: int, width: int, degrees: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, image = rng.integers(0, 5, (20, 20), np.uint8), rng.integers(0, 256, (20, 20, 3), np.uint8)
    rotated = rotate_labels(labels, (height, width), degrees, 255)
    part = labels[:height, :width]
    # A source on the border between two pixels may fall to either.
    assert (rotated[:height, :width] != slow_rotation(part, degrees, True, 255)).mean() <= 0.02 + 1 / part.size * (
        abs(degrees % 45) < 1e-6)
    untouched = np.ones((20, 20), bool)
    untouched[:height, :width] = False
    assert np.array_equal(rotated[untouched], labels[untouched])
    pixels = rotate_image(torch.from_numpy(image.transpose(2, 0, 1)), (height, width), degrees)
    slow = slow_rotation(image[:height, :width], degrees, False, PADDING_COLOR)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, height, width)
    assert (np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - slow.astype(int)) > 1).mean() <= 0.02


def test_a_rotation_is_counter_clockwise_and_image_and_labels_stay_together() -> None:
    labels = np.arange(49, dtype=np.uint8).reshape(7, 7)
    assert np.array_equal(rotate_labels(labels, (7, 7), 90, 255), np.rot90(labels))
    image = torch.from_numpy(np.stack([labels * 5] * 3))
    for degrees in (90.0, -90.0, 180.0):
        assert torch.equal(rotate_image(image, (7, 7), degrees), image.rot90(round(degrees / 90), (1, 2)))
    bright = np.full((9, 9), 0, np.uint8)
    bright[2, 6] = 1
    for degrees in range(0, 360, 15):
        moved = rotate_labels(bright, (9, 9), degrees, 255)
        shown = rotate_image(torch.from_numpy(np.stack([bright * 255] * 3)), (9, 9), degrees)
        outside = (shown != torch.tensor(PADDING_COLOR)[:, None, None]).any(0).logical_not().numpy()
        assert (moved[outside] == 255).mean() > 0.9 if outside.any() else True
        assert (shown[0][torch.from_numpy(moved == 1)] > 60).all()


def slowly_moved(picture: Pixels, valid: tuple[int, int], move: Move, padding: Any) -> Pixels:
    """Reflections and turns of the unpadded part of [H, W, ...], pixel by pixel."""
    height, width = valid
    sides = (width, height) if move.turns % 2 else (height, width)
    moved = picture.copy()
    if move.turns % 2 and height != width:
        moved[: max(valid), : max(valid)] = padding
    for row in range(sides[0]):
        for column in range(sides[1]):
            at, place, size = row, column, sides
            for _ in range(move.turns):  # undo a counter-clockwise turn
                size = size[::-1]
                at, place = place, size[1] - 1 - at
            at = height - 1 - at if move.flipped else at
            place = width - 1 - place if move.mirrored else place
            moved[row, column] = picture[at, place]
    return moved


@pytest.mark.parametrize("targets", ["segment_map", "dense"])
def test_a_batch_is_moved_as_its_pixels_are(scene_shards: Path, targets: str) -> None:
    """Everything but the rotation by degrees, of padded crops too."""
    dataset = crops(scene_shards, batch=12, targets=targets, **{**EVERYTHING, "rotate": 0.0})
    seen = set()
    for number in range(4):
        given_batch = dataset[number]
        moved = given_batch.to(CPU)
        assert moved.images.is_contiguous(memory_format=torch.channels_last)
        for place, (move, valid) in enumerate(zip(given_batch.moves, given_batch.valid, strict=True)):
            seen.add(move[1:4])
            image = given_batch.images[place].permute(1, 2, 0).numpy()
            expected = slowly_moved(image, valid, move, PADDING_COLOR)
            assert np.array_equal(moved.images[place].permute(1, 2, 0).numpy(), expected)
            before, after = given_batch.targets()[place], moved.targets()[place]
            assert torch.equal(before["labels"], after["labels"])
            masks = zip(to_dense(before)["masks"].numpy(), to_dense(after)["masks"].numpy(), strict=True)
            assert all(np.array_equal(slowly_moved(one, valid, move, False), other) for one, other in masks)
            assert moved.valid[place] == (valid[::-1] if move.turns % 2 else valid)
        assert not any(move.is_pending for move in moved.moves) and torch.equal(moved.to(CPU).images, moved.images)
    assert len(seen) == 16, "each combination of two reflections and four turns"
    assert any(size[0] != size[1] for size in given_batch.valid)


def test_rotated_crops_have_a_label_per_class_that_is_left(scene_shards: Path) -> None:
    settings_ = {"hflip": 0.0, "rotate": 1.0, "rotate_degrees": 45.0}
    plain, rotated = crops(scene_shards, batch=12, hflip=0.0), crops(scene_shards, batch=12, **settings_)
    fewer = 0
    for number in range(2):
        before, after = plain[number], rotated[number]
        done = after.to(CPU)
        assert done.segment_maps is not None
        for place, move in enumerate(after.moves):
            valid, old, new = before.valid[place], before.targets()[place], done.targets()[place]
            turned = rotate_labels(old["segment_map"].numpy(), valid, move.degrees, 255)
            ids, found = (np.append(target["labels"].numpy(), np.full(256 - len(target["labels"]), -1))
                          for target in (old, new))
            assert np.array_equal(found[new["segment_map"].numpy()], ids[turned])
            assert set(np.unique(new["segment_map"])) - {255} == set(range(len(new["labels"])))
            fewer += len(new["labels"]) < len(old["labels"])
            pixels = rotate_image(before.images[place], valid, move.degrees)
            assert torch.equal(done.images[place][:, : valid[0], : valid[1]], pixels)
    assert fewer


def test_what_is_erased_is_the_mean_for_the_network_and_keeps_its_labels(scene_shards: Path) -> None:
    erased, plain = crops(scene_shards, batch=24, erase=1.0)[0].to(CPU), crops(scene_shards, batch=24)[0].to(CPU)
    assert erased.segment_maps is not None and plain.segment_maps is not None
    shares = []
    images = normalized_images(replace(erased, photometric=None), ZEROS, ONES)
    unchanged = normalized_images(replace(erased, photometric=None, moves=[Move()] * 24), ZEROS, ONES)
    for place, move in enumerate(erased.moves):
        assert move.erased is not None
        top, left, height, width = move.erased
        valid = erased.valid[place]
        assert 0 <= top <= top + height <= valid[0] and 0 <= left <= left + width <= valid[1]
        inside = torch.zeros(images.shape[2:], dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (images[place][:, inside] == 0).all()
        assert torch.equal(images[place][:, ~inside], unchanged[place][:, ~inside])
        shares.append(height * width / (valid[0] * valid[1]))
    assert 0.005 < min(shares) < 0.1 and 0.2 < max(shares) <= 0.36
    assert erased.counts == plain.counts


def test_moves_are_drawn_as_often_as_configured_and_the_old_sequence_stays() -> None:
    config = DataConfig(hflip=0.5, vflip=0.3, quarter_turns=0.6, rotate=0.2, rotate_degrees=20.0, erase=0.4)
    moves = [draw_move(np.random.default_rng(number), config, (40, 60)) for number in range(4000)]
    for share, wanted in ((np.mean([move.mirrored for move in moves]), 0.5),
                          (np.mean([move.flipped for move in moves]), 0.3),
                          (np.mean([move.turns > 0 for move in moves]), 0.6),
                          (np.mean([move.degrees != 0 for move in moves]), 0.2),
                          (np.mean([move.erased is not None for move in moves]), 0.4)):
        assert share == pytest.approx(wanted, abs=0.03)
    assert np.bincount([move.turns for move in moves])[1:].min() > 650
    angles = [move.degrees for move in moves if move.degrees]
    assert -20 <= min(angles) < -18 and 18 < max(angles) <= 20 and abs(np.mean(angles)) < 1.5
    states = set()
    for chance in (0.0, 0.5, 1.0):
        rng = np.random.default_rng(7)
        draw_move(rng, DataConfig(vflip=0.1, quarter_turns=chance, rotate=chance, erase=chance), (40, 60))
        states.add(str(rng.bit_generator.state))
    assert len(states) == 1, "what is drawn does not move what is drawn later"
    rng, old = np.random.default_rng(3), np.random.default_rng(3)
    assert draw_move(rng, DataConfig(), (8, 8)) == Move(mirrored=bool(old.random() < 0.5))
    assert rng.bit_generator.state == old.bit_generator.state


@pytest.mark.parametrize("settings_", [{}, EVERYTHING])
def test_a_sample_is_moved_alike_in_any_micro_batch(scene_shards: Path, settings_: dict[str, float]) -> None:
    by_four, by_one = crops(scene_shards, batch=4, **settings_), crops(scene_shards, batch=1, **settings_)
    batch = by_four[3].to(CPU)
    for place in range(4):
        alone = by_one[12 + place].to(CPU)
        assert torch.equal(alone.images[0], batch.images[place]) and alone.moves == batch.moves[place : place + 1]
    assert equal(by_four[3].to(CPU), batch)


def halves_ignored(images: Tensor, segment_maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Darkens at random, and ignores the left half."""
    share = torch.rand((len(images), 1, 1, 1), generator=generator)
    segment_maps = segment_maps.clone()
    segment_maps[:, :, : segment_maps.shape[2] // 2] = 255
    return (images * share).to(torch.uint8), segment_maps


def apply(batch: Batch, transform: Callable[..., Any], number: int = 3) -> Batch:
    return transformed(batch.to(CPU), transform, transform_generator(0, number, CPU))


def test_the_users_function_changes_the_batch_and_absent_labels_go(scene_shards: Path) -> None:
    batch = crops(scene_shards, batch=8, hflip=0.0)[0]
    found = apply(batch, load_transform(f"{__name__}:halves_ignored"))
    assert torch.equal(found.images, apply(batch, halves_ignored).images)
    assert not torch.equal(found.images, apply(batch, halves_ignored, number=4).images)
    assert sum(found.counts) < sum(batch.counts) and len(found.labels) == sum(found.counts)
    for before, after in zip(batch.targets(), found.targets(), strict=True):
        old, new = (np.append(target["labels"].numpy(), np.full(256 - len(target["labels"]), -1))
                    for target in (before, after))
        right = before["segment_map"].numpy()[:, 32:]
        assert np.array_equal(new[after["segment_map"].numpy()[:, 32:]], old[right])
        assert (after["segment_map"][:, :32] == 255).all()
        assert set(np.unique(after["segment_map"])) - {255} == set(range(len(after["labels"])))


@pytest.mark.parametrize(("transform", "message"), [
    (lambda images, maps, _: (images.float(), maps), r"returned images of torch.float32 .*, legal: torch.uint8"),
    (lambda images, maps, _: (images, maps[:, 1:]), r"returned segment maps of torch.uint8 \[8, 63, 64\], legal"),
    (lambda images, maps, _: (images, torch.full_like(maps, 200)), r"segment map with index 200, legal: 0 to \d"),
])
def test_a_function_that_returns_something_else_is_named(scene_shards: Path, transform: Callable[..., Any],
                                                         message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply(crops(scene_shards, batch=8)[0], transform)


@pytest.mark.parametrize("name", ["nowhere:function", "math:nothing", "math:pi", "math", ":", "..x:y"])
def test_a_function_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"data.transform is {name!r}"):
        load_transform(name)


def test_a_checkpoint_names_no_function_to_run() -> None:
    config = load_run_config(None, ["data.transform=os:abort", "data.vflip=0.5"])
    read = run_config_from_dict(config_to_dict(config))
    assert read.data.transform is None and read.data.vflip == 0.5
    with pytest.raises(ConfigError, match=r"data.targets is dense, legal with data.transform: segment_map"):
        load_run_config(None, ["data.transform=os:abort", "data.targets=dense"])
