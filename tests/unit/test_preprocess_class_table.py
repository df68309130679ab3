"""Class tables: ids with gaps, merged and ignored ones, names from another table, colours exact and nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocess.class_table import read_class_table
from preprocess.config import DatasetConfig
from preprocess.dry_run import print_mapping
from preprocess.label_mapping import LabelMapping, plain_mapping
from preprocess.pairs import open_dataset, read_pair
from shards.class_list import parse_classes
from shards.errors import ConfigError, DatasetError

IDS = """
names: labels.txt
classes:
  - {name: road, ids: [7], color: '#804080'}
  - {name: vehicle, ids: [26], names: [truck, bus]}
ignore: {ids: [0, 255], names: [static]}
"""
RGB = """
labels: rgb
tolerance: 10
classes:
  - {name: road, color: '#804080'}
  - {name: person, color: '#ffffff', colors: ['#dc143c', '#ff0000']}
ignore: {colors: ['#000000']}
"""


def table(folder: Path, text: str, names: str = "none\nstatic\ntruck\nbus\ntruck\n") -> Any:
    (folder / "labels.txt").write_text(names)
    (folder / "classes.yaml").write_text(text)
    return read_class_table(str(folder / "classes.yaml"))


def test_ids_with_gaps_are_merged_named_and_ignored(tmp_path: Path) -> None:
    classes, mapping = table(tmp_path, IDS)
    assert (classes[0].name, classes[0].color) == ("road", (128, 64, 128))
    stored = np.array([[7, 26, 2, 3, 4], [0, 255, 1, 7, 7]], np.uint8)
    label_map, nearest, rest = mapping.apply(stored, "x.png")
    assert label_map.tolist() == [[0, 1, 1, 1, 1], [255, 255, 255, 0, 0]] and (nearest, rest) == (0, 0)
    with pytest.raises(DatasetError, match=r"x\.png holds the label 9 \(2 pixels, and 1 more values\), legal: 0, 1, 2, "
                                           r"3, 4, 7, 26, 255 \(listed in .*classes\.yaml\); the nearest is 7"):
        mapping.apply(np.array([[9, 9, 30, 7]], np.uint8), "x.png")
    _, ignoring = table(tmp_path, IDS.replace("names: [static]", "names: [static], rest: true"))
    label_map, _, rest = ignoring.apply(np.array([[9, 9, 30, 7]], np.uint8), "x.png")
    assert label_map.tolist() == [[255, 255, 255, 0]] and rest == 3


def test_colours_are_exact_or_within_the_tolerance_and_counted(tmp_path: Path) -> None:
    _, mapping = table(tmp_path, RGB)
    colors = np.array([[(128, 64, 128), (220, 20, 60), (255, 0, 0)], [(0, 0, 0), (130, 66, 120), (255, 6, 8)]],
                      np.uint8)
    label_map, nearest, rest = mapping.apply(colors, "x.png")
    assert label_map.tolist() == [[0, 1, 1], [255, 0, 1]] and (nearest, rest) == (2, 0)
    far = np.array([[(0, 0, 0), (128, 64, 117), (128, 64, 117)]], np.uint8)
    with pytest.raises(DatasetError, match=r"holds the colour #804075 \(2 pixels\), legal: #000000, #804080, #dc143c, "
                                           r"#ff0000 \(listed in .*\); the nearest is #804080 at distance 11\.0 \(tol"):
        mapping.apply(far, "x.png")


def test_ignored_colours_are_exact_with_more_than_255_classes() -> None:
    colors = {(number % 256, number // 256, 7): number for number in range(300)} | {(0, 0, 0): 65535}
    stored = np.array([[(0, 0, 0), (43, 1, 7)]], np.uint8)
    label_map, nearest, rest = LabelMapping(num_classes=300, colors=colors, tolerance=5).apply(stored, "x")
    assert label_map.dtype == np.uint16 and label_map.tolist() == [[65535, 299]] and (nearest, rest) == (0, 0)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20, unique=True), st.integers(0, 2**31))
def test_mapping_equals_its_definition(stored_ids: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    classes = int(generator.integers(1, 5))
    values = {value: int(generator.integers(0, classes)) if generator.random() < 0.8 else 255 for value in stored_ids}
    mapping = LabelMapping(num_classes=classes, values=values)
    stored = generator.choice(np.array(stored_ids, np.uint16), (5, 7))
    expected = [[values[int(value)] for value in row] for row in stored]
    assert mapping.apply(stored, "x").label_map.tolist() == expected


@settings(max_examples=20, deadline=None)  # each builds a table of all colours
@given(st.integers(0, 2**31), st.floats(0, 60))
def test_nearest_colour_equals_its_definition(seed: int, tolerance: float) -> None:
    generator = np.random.default_rng(seed)
    listed = [tuple(map(int, color)) for color in generator.integers(0, 256, (4, 3))]
    mapping = LabelMapping(num_classes=4, colors={color: number for number, color in enumerate(listed)},
                           tolerance=tolerance, ignore_rest=True)
    stored = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    found = mapping.apply(stored, "x")
    for color, value in zip(stored.reshape(-1, 3).tolist(), found.label_map.flat, strict=True):
        distances = {other: float(np.linalg.norm(np.subtract(color, other))) for other in listed}
        best = min(sorted(distances), key=distances.__getitem__)
        assert value == (mapping.colors[best] if distances[best] <= tolerance else 255)
    assert found.rest == int((found.label_map == 255).sum())


@pytest.mark.parametrize("text, message", [
    ("classes: []", r"classes\.yaml lists 0 classes, legal: 1\.\.65535"),
    ("classes: [{name: a, ids: [1]}]\nextra: 1", "extra is '1': unexpected keyword argument"),
    ("classes: [{name: a, id: [1]}]", r"classes\[0\]\.id is"),
    ("classes: [{name: a, ids: [x]}]", r"classes\[0\]\.ids\[0\] is 'x': input should be a valid integer"),
    ("classes: [{name: a}]", "class 'a' lists nothing that label maps hold; give it ids or names"),
    ("classes: [{name: a, ids: [1]}, {name: b, ids: [2, 1]}]", "class 'b' lists 1, which already means class 'a'"),
    ("classes: [{name: a, ids: [1]}]\nignore: {ids: [1]}", "ignore lists 1, which already means class 'a'"),
    ("classes: [{name: a, ids: [-1]}]", r"class 'a' has the id -1, legal: 0\.\.65535"),
    ("classes: [{name: a, ids: [0]}, {name: ' a', ids: [1]}]", "two classes are named 'a'"),
    ("classes: [{name: a, names: [x]}]", "'x', which is known only with a list of names: set `names`"),
    ("classes: [{name: a, colors: ['#000000']}]", "class 'a' has colors, legal with labels: ids"),
    ("labels: rgb\nclasses: [{name: a, ids: [1]}]", "class 'a' has ids or names, legal with labels: rgb: colors"),
    ("labels: rgb\nclasses: [{name: a, colors: [red]}]", "class 'a': colour 'red', legal: #rrggbb"),
    ("labels: hsv\nclasses: [{name: a, ids: [1]}]", "labels is 'hsv': input should be 'ids' or 'rgb'"),
    ("tolerance: 3\nclasses: [{name: a, ids: [1]}]", "tolerance is 3, legal: 0 or more with labels: rgb, 0 with ids"),
    ("names: nowhere.txt\nclasses: [{name: a, ids: [1]}]", r"names is nowhere\.txt, but .*nowhere\.txt cannot be read"),
])
def test_mistakes_in_a_table_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        table(tmp_path, text)


@pytest.mark.parametrize("labels", ["ids", "rgb"])
@pytest.mark.parametrize("color", ["red", "#80408", "#80408040", "x" * 9999])
def test_a_bad_colour_is_named_once_and_shortly(tmp_path: Path, labels: str, color: str) -> None:
    stored = "ids: [1], " if labels == "ids" else ""
    with pytest.raises(ConfigError) as found:
        table(tmp_path, f"labels: {labels}\nclasses: [{{name: {'a' * 999}, {stored}color: '{color}'}}]")
    said = str(found.value)
    assert said.count("classes.yaml") == 1 and "legal: #rrggbb" in said and len(said) < 500
    assert color[:40] in said
    with pytest.raises(ConfigError) as found:
        parse_classes(f"a\nb\t{color}", "classes.txt")
    assert str(found.value).startswith("classes.txt, line 2: colour '") and len(str(found.value)) < 200


# -- in a dataset ------------------------------------------------------------------------------------------------------


def dataset_of(root: Path, text: str, labels: Image.Image, *, count: int = 2) -> DatasetConfig:
    for folder in ("images/train", "annotations/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", labels.size, (9, 9, number)).save(root / f"images/train/{number}.png")
        labels.save(root / f"annotations/train/{number}.png")
    table(root, text)
    return DatasetConfig(kind="folder", root=str(root), class_file=str(root / "classes.yaml"))


def test_rgb_palette_and_grey_label_maps_are_read_by_colour(tmp_path: Path) -> None:
    colors = np.zeros((4, 6, 3), np.uint8)
    colors[:, 2:4], colors[:, 4:] = (128, 64, 128), (255, 0, 0)
    expected = np.where(colors[..., 0] == 128, 0, np.where(colors[..., 0] == 255, 1, 255))
    for name, image in (("rgb", Image.fromarray(colors)), ("rgba", Image.fromarray(colors).convert("RGBA")),
                        ("palette", Image.fromarray(colors).quantize(4))):
        dataset = open_dataset(dataset_of(tmp_path / name, RGB, image), "fail")
        found = read_pair(dataset, dataset.splits["train"][0])
        assert np.array_equal(found.label_map, expected), name
    grey = dataset_of(tmp_path / "grey", RGB.replace("#804080", "#404040"), Image.new("L", (6, 4), 64))
    dataset = open_dataset(grey, "fail")
    assert not read_pair(dataset, dataset.splits["train"][0]).label_map.any()
    deep = dataset_of(tmp_path / "deep", RGB, Image.fromarray(np.zeros((4, 6), np.uint16)))
    dataset = open_dataset(deep, "fail")
    with pytest.raises(DatasetError, match="has mode I;16; legal with labels: rgb: RGB"):
        read_pair(dataset, dataset.splits["train"][0])


def test_colours_without_a_table_are_refused_with_advice(tmp_path: Path) -> None:
    config = dataset_of(tmp_path, RGB, Image.new("RGB", (6, 4)))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    dataset = open_dataset(DatasetConfig(kind="folder", root=config.root), "fail")
    with pytest.raises(DatasetError, match=r"write a class table with labels: rgb and set dataset\.class_file"):
        read_pair(dataset, dataset.splits["train"][0])


def test_settings_that_a_table_replaces_are_refused(tmp_path: Path) -> None:
    config = dataset_of(tmp_path, IDS, Image.new("L", (6, 4), 7))
    for change in ({"ignore_labels": [3]}, {"reduce_zero_label": False}):
        with pytest.raises(ConfigError, match=r"a class table, which says itself what is ignored; leave out"):
            open_dataset(DatasetConfig(kind="folder", root=config.root, class_file=config.class_file, **change), "fail")


def test_the_dry_run_prints_the_mapping_and_what_fell_outside(tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.full((4, 5), 7, np.uint8)
    labels[0, 0] = 255
    config = dataset_of(tmp_path, IDS, Image.fromarray(labels), count=3)
    Image.fromarray(np.full((4, 5), 99, np.uint8)).save(tmp_path / "annotations/train/2.png")
    print_mapping(open_dataset(config, "fail"))
    printed = capsys.readouterr().out
    assert "labels in 3 of 3 images:" in printed
    assert [line.split() for line in printed.splitlines() if "road" in line] == [["0", "road", "95.00%", "from", "7"]]
    assert "ignored                    5.00%   from 0, 1, 255" in printed
    assert "1 of them cannot be used: " in printed and "holds the label 99 (20 pixels)" in printed


def test_the_mapping_is_part_of_a_sets_identity() -> None:
    assert plain_mapping(3, (255,), True).identity == ((255,), True), "as before class tables existed"
