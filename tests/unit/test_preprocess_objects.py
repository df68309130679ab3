"""Layouts whose labels are drawn: COCO instances and panoptic segments, LabelMe, YOLO."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocess import extras
from preprocess.config import DatasetConfig, PreprocessConfig
from preprocess.dry_run import print_dry_run
from preprocess.layouts.coco_json import read_categories, read_coco
from preprocess.layouts.drawn import NOTHING, Canvas, checked_points
from preprocess.pairs import Dataset, open_dataset, read_pair
from shards.cli.config_file import load_config
from shards.errors import ConfigError, DatasetError
from shards.manifest import load_manifest
from shards.reader import iter_samples
from shards.verify import verify
from tests.conftest import make_shards

coco = pytest.importorskip("pycocotools.mask")
HEIGHT, WIDTH = 40, 60
Json = dict[str, Any]


def save(root: Path, name: str, pixels: np.ndarray | None = None) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(name)).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise if pixels is None else pixels).save(path)


def write(root: Path, name: str, content: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def opened(kind: str, root: Path, on_error: str = "fail", **options: Any) -> Dataset:
    return open_dataset(DatasetConfig(kind=kind, root=str(root), **options), on_error)


def first_map(kind: str, root: Path, split: str = "val", **options: Any) -> np.ndarray:
    dataset = opened(kind, root, **options)
    return read_pair(dataset, dataset.splits[split][0]).label_map


def check_set(kind: str, root: Path, output: Path, expected: dict[str, dict[str, np.ndarray]],
              capsys: pytest.CaptureFixture[str]) -> None:
    """A whole set: verified, equal pixel for pixel, and shown by --dry-run."""
    make_shards(output, root, f"dataset.kind={kind}", "crops.splits=[]")
    assert verify(output) == [] and load_manifest(output).dataset == kind
    for split, maps in expected.items():
        found = {sample.key: sample.label_map() for sample in iter_samples(output, split)}
        assert sorted(found) == sorted(maps)
        for key, label_map in maps.items():
            assert np.array_equal(found[key], label_map), key
    config = load_config(PreprocessConfig, None, [f"dataset.kind={kind}", f"dataset.root={root}", "crops.size=32"])
    print_dry_run(config, open_dataset(config.dataset, "fail"))
    printed = capsys.readouterr().out
    assert re.search(rf"ignored .* from .*{NOTHING}\n", printed) and "0 of them cannot be used" in printed


# -- COCO: instances ----------------------------------------------------------------------------------------

CATEGORIES = [{"id": 1, "name": "person", "supercategory": "x"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "cup"}]


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    """A polygon that covers the pixels left..right-1, top..bottom-1."""
    return [left, top, right, top, right, bottom, left, bottom]


def counts(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths, by their definition."""
    found, value = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            found.append(0)
            value = pixel
        found[-1] += 1
    return found


def instances(root: Path, **changes: Any) -> dict[str, dict[str, np.ndarray]]:
    """The official tree with small files; `changes` replace lists of the val file."""
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[30:38, ::2] = 1  # 240 pixels, as a crowd
    coded = np.asfortranarray(np.zeros((HEIGHT, WIDTH), np.uint8))
    coded[2:6, 50:58] = 1
    compressed = {"size": [HEIGHT, WIDTH], "counts": coco.encode(coded)["counts"].decode()}
    annotations: list[Json] = [
        {"id": 7, "image_id": 139, "category_id": 18, "segmentation": [box(12, 12, 16, 16)], "iscrowd": 0, "area": 1e9},
        {"id": 8, "image_id": 139, "category_id": 1, "segmentation": [box(10, 10, 30, 30)], "iscrowd": 0},
        {"id": 9, "image_id": 139, "category_id": 90, "segmentation": [box(25, 25, 35, 35), box(40, 0, 44, 4)]},
        {"id": 10, "image_id": 139, "category_id": 1, "iscrowd": 1,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts(crowd)}},
        {"id": 11, "image_id": 139, "category_id": 18, "segmentation": compressed},
        {"id": 12, "image_id": 139, "category_id": 18, "segmentation": [box(50, 20, 54, 24)]},
        {"id": 13, "image_id": 139, "category_id": 90, "segmentation": [box(52, 20, 56, 24)]},  # as large: on top
    ]
    content = {"info": {"year": 2017}, "licenses": [], "images": [
        {"id": 139, "file_name": "000000000139.jpg", "height": HEIGHT, "width": WIDTH, "license": 2}],
        "annotations": annotations, "categories": CATEGORIES}
    write(root, "annotations/instances_val2017.json", {**content, **changes})
    write(root, "annotations/instances_train2017.json", {
        "categories": CATEGORIES, "images": [
            {"id": 9, "file_name": "000000000009.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 5, "file_name": "000000000005.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": 1, "image_id": 9, "category_id": 90, "segmentation": [box(0, 0, WIDTH, HEIGHT)]}]})
    for name in ("train2017/000000000009", "train2017/000000000005", "val2017/000000000139"):
        save(root, f"{name}.jpg")
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[10:30, 10:30] = 0  # 400 pixels
    expected[crowd == 1] = 0
    expected[25:35, 25:35], expected[0:4, 40:44] = 2, 2  # 116
    expected[2:6, 50:58] = 1  # 32
    expected[12:16, 12:16], expected[20:24, 50:54] = 1, 1  # 16 each
    expected[20:24, 52:56] = 2
    return {"val": {"000000000139": expected},
            "train": {"000000000009": np.full((HEIGHT, WIDTH), 2), "000000000005": np.full((HEIGHT, WIDTH), 255)}}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_instances_are_drawn_by_area_smaller_ones_on_top(packed: bool, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "coco"
    expected = instances(root)
    if packed:
        with zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(tmp_path))
        root = tmp_path / "coco.zip"
    check_set("coco-instances", root, tmp_path / "set", expected, capsys)
    assert [item.name for item in load_manifest(tmp_path / "set").classes] == ["person", "dog", "cup"]


def test_images_may_lie_in_a_folder_of_images_and_the_rest_is_said(tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    expected = instances(tmp_path)
    (tmp_path / "images").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).rename(tmp_path / "images" / split)
    save(tmp_path, "images/val2017/unlisted.jpg")
    assert np.array_equal(first_map("coco-instances", tmp_path), expected["val"]["000000000139"])
    said = [record.getMessage() for record in caplog.records]
    assert said == ["split 'train' has 2 images with labels; the complete release has 118287",
                    "split 'val': 1 files are neither an image nor labels of this layout and are left out, such as "
                    "images/val2017/unlisted.jpg",
                    "split 'val' has 1 images with labels; the complete release has 5000"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools' decode
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_objects_equal_those_of_pycocotools(seed: int) -> None:
    """Random polygons and masks, drawn by the rule, against pycocotools' decoding of each."""
    import tempfile

    rng = np.random.default_rng(seed)
    annotations: list[Json] = []
    masks: list[tuple[int, np.ndarray]] = []
    for number in range(int(rng.integers(1, 7))):
        kind, category = rng.integers(0, 3), int(rng.choice([1, 18, 90]))
        if kind == 0:
            segmentation: Any = [rng.uniform(-5, [WIDTH + 5, HEIGHT + 5], (int(points), 2)).round(2).ravel().tolist()
                                 for points in rng.integers(3, 9, int(rng.integers(1, 4)))]
            mask = coco.decode(coco.merge(coco.frPyObjects(segmentation, HEIGHT, WIDTH)))
        else:
            mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < rng.random() ** 2).astype(np.uint8)
            text = coco.encode(mask)["counts"].decode()
            segmentation = {"size": [HEIGHT, WIDTH], "counts": text if kind == 1 else counts(mask)}
        annotations.append({"id": number, "image_id": 139, "category_id": category, "segmentation": segmentation})
        masks.append((category, mask.astype(bool)))
    expected = np.full((HEIGHT, WIDTH), 255)
    for category, mask in sorted(masks, key=lambda item: item[1].sum(), reverse=True):
        expected[mask] = {1: 0, 18: 1, 90: 2}[category]
    with tempfile.TemporaryDirectory() as folder:
        instances(Path(folder), annotations=annotations)
        assert np.array_equal(first_map("coco-instances", Path(folder)), expected)


def annotation(**changes: Any) -> Json:
    return {"id": 1, "image_id": 139, "category_id": 1, "segmentation": [box(0, 0, 9, 9)], **changes}


IMAGE = {"id": 139, "file_name": "000000000139.jpg", "height": HEIGHT, "width": WIDTH}
WHERE = r"annotations/instances_val2017\.json"
AT = WHERE + r", image id 139 \(val2017/000000000139\.jpg\)"


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": [{**IMAGE, "file_name": "gone.jpg"}]},
     rf"val2017/gone\.jpg: {WHERE}: the image id 139 has the file_name 'gone\.jpg', but there is no such file"),
    ({"images": [{**IMAGE, "file_name": "../train2017/000000000009.jpg"}]}, "but there is no such file"),
    ({"images": [IMAGE, IMAGE]}, rf"{WHERE}: images\[1\]\.id is 139, which another image has too"),
    ({"images": [IMAGE, {**IMAGE, "id": 140}]}, "the image id 140 has the same name as val2017/000000000139"),
    ({"images": [{**IMAGE, "id": "139"}]}, r"images\[0\]\.id is '139', legal: a whole number"),
    ({"images": [{**IMAGE, "height": 0}]}, r"images\[0\] \(id 139\): height is 0, legal: 1 or more"),
    ({"images": [{**IMAGE, "file_name": None}]}, r"images\[0\] \(id 139\): file_name is None, legal: the name"),
    ({"images": []}, rf"{WHERE} has no images, or an empty list"), ({"images": 3}, "images is or holds 3, legal: a l"),
    ({"images": [3]}, "images is or holds 3, legal: a list of objects"),
    ({"categories": [*CATEGORIES, {"id": 1, "name": "x"}]}, r"categories\[3\]\.id is 1, which another category has"),
    ({"categories": [{"id": -1, "name": "x"}]}, r"categories\[0\]\.id is -1, legal: 0\.\.65534"),
    ({"categories": [{"id": 1, "name": " "}]}, r"categories\[0\] \(id 1\): name is ' ', legal: text"),
    ({"categories": CATEGORIES[:2]}, "has other categories than the file of another split"),
    ({"annotations": [annotation(category_id=3)]},
     rf"val2017/000000000139\.jpg: .*{WHERE}: annotations\[0\]\.category_id is 3, which is not among the categories"),
    ({"annotations": [annotation(category_id=None)]}, r"annotations\[0\]\.category_id is None, which is not among"),
    ({"annotations": [annotation(), annotation()]}, r"annotations\[1\]\.id is 1, which another annotation has too"),
    ({"annotations": [annotation(id=None)]}, r"annotations\[0\]\.id is None, legal: a whole number"),
    ({"annotations": [annotation(image_id=5)]}, "an annotation has the image_id 5, which is not among the images"),
    ({"annotations": [annotation(image_id="x")]}, r"annotations\[0\]\.image_id is 'x', legal: the id of an image"),
])
def test_what_is_wrong_in_a_coco_file_is_named(changes: Json, message: str, tmp_path: Path) -> None:
    instances(tmp_path, **changes)
    with pytest.raises((DatasetError, ConfigError), match=message):
        opened("coco-instances", tmp_path)


@pytest.mark.parametrize(("segmentation", "message"), [
    ([[1, 2, 3, 4]], r"segmentation\[0\] is 4 numbers, legal: x and y of at least 3 points"),
    ([box(0, 0, 5, 5), [1, 2, 3, 4, 5]], r"segmentation\[1\] is 5 numbers"),
    ([[1, 2, 3, 4, 5, "6"]], r"segmentation\[0\]\[5\] is '6', legal: a number from -40 to 80, in pixels of the 60x40"),
    ([[1, 2, 3, 4, 5, math.nan]], r"segmentation\[0\]\[5\] is nan"),
    ([[1, 2, 3, 4, 1e9, 1]], r"\[4\] is 1000000000\.0"), ([1, 2, 3, 4, 5, 6], "is 1, legal: x and"),
    ([[1, 2, 3, 4, 5, None]], "is None"), ([[1, 2, 3, 4, 5, True]], "is True"),
    ([], r"segmentation is \[\], legal: a list of polygons, or run lengths"), (None, "segmentation is None"),
    ({"size": [HEIGHT, WIDTH + 1], "counts": [9]}, r"segmentation\.size is \[40, 61\], but the image has \[40, 60\]"),
    ({"size": [HEIGHT, WIDTH], "counts": [9, 99999]}, "COCO counts must be"), ({"counts": [9]}, "COCO mask has size"),
    ({"size": [HEIGHT, WIDTH], "counts": "\x00"}, "illegal byte 0"), ({"size": [HEIGHT, WIDTH], "counts": "o"}, "COCO"),
    ({"size": [HEIGHT, WIDTH], "counts": [-9, 9]}, "COCO counts must be"), ({"size": "x", "counts": []}, "has size x"),
])
def test_what_is_wrong_with_an_object_is_named(segmentation: Any, message: str, tmp_path: Path) -> None:
    instances(tmp_path, annotations=[annotation(id=4, segmentation=segmentation)])
    with pytest.raises(DatasetError, match=rf"{AT}, annotation id 4: (.*{message})"):
        first_map("coco-instances", tmp_path)


def test_an_image_of_another_size_than_its_entry_is_named_and_skipped(tmp_path: Path) -> None:
    instances(tmp_path, images=[{**IMAGE, "width": 61}, {**IMAGE, "id": 140, "file_name": "b.jpg"},
                                {**IMAGE, "id": 141, "file_name": "gone.jpg"}],
              annotations=[annotation(), annotation(id=2, image_id=140)])
    save(tmp_path, "val2017/b.jpg")
    options = ("dataset.kind=coco-instances", "crops.splits=[]")
    output = make_shards(tmp_path / "set", tmp_path, *options, "on_error=skip")
    split = load_manifest(output).splits["val"]
    assert [sample.key for sample in iter_samples(output, "val")] == ["b"]
    reasons = {item["image"]: item["reason"] for item in split.skipped_images}
    assert re.search(rf"{AT}: height and width are \[40, 61\], but the image has \[40, 60\]",
                     reasons["val2017/000000000139.jpg"])
    assert "no such file" in reasons["val2017/gone.jpg"]


@pytest.mark.parametrize("text", [
    "", "[]", "3", "{", '{"images"', '{"images":', '{"images": [', '{"images": [{}', '{"images": [{},]}', '{"a": 1,}',
    '{"a": 1} x', '{"a": [1, 2', '{1: 2}', '{"a": ' + "[" * 100_000, '{"a" 1}', '{"a": [1 2]}', '{"a": NaNN}'])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(DatasetError, match=r"x\.json is not (valid JSON|a JSON object)"):
        read_categories(text.encode(), "x.json")
    with pytest.raises(DatasetError, match=r"^x\.json"):
        read_coco(text.encode(), "x.json", {1}, has_ids=True)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31))
def test_files_in_any_order_and_spacing_equal_the_json_module(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [{"id": int(number), "file_name": f"ü{number}.jpg", "height": 3, "width": 4, "x": [{}, "]}", None]}
              for number in rng.permutation(9)]
    annotations = [{"id": number, "image_id": int(rng.integers(0, 9)), "category_id": 1, "segmentation": [[1.5, -2e3]],
                    "note": 'a"},{]['} for number in range(20)]
    parts = {"images": images, "annotations": annotations, "categories": CATEGORIES, "info": {"a": []}, "n": [], "s": 1}
    content = {key: parts[key] for key in rng.permutation(list(parts)).tolist()}
    text = json.dumps(content, indent=[None, 1, "\t"][seed % 3], ensure_ascii=bool(seed % 2))
    found = read_coco(b"\xef\xbb\xbf" * (seed % 2) + text.encode(), "x", {1, 18, 90}, has_ids=True)
    assert list(found.images) == [image["id"] for image in images]
    assert {key: [json.loads(raw) for raw in texts] for key, texts in found.annotations.items()} == {
        key: [entry for entry in annotations if entry["image_id"] == key]
        for key in {entry["image_id"] for entry in annotations}}
    assert found.categories == {1: ("person", None), 18: ("dog", None), 90: ("cup", None)}
    assert found.problems == {} and found.strays == []


def test_tables_and_lists_choose_among_the_categories(tmp_path: Path) -> None:
    expected = instances(tmp_path)["val"]["000000000139"]
    write(tmp_path, "mine.yaml", "classes:\n  - {name: alive, names: [person, dog]}\n"
                                 "  - {name: rest, names: [background]}\nignore: {names: [cup]}")
    found = first_map("coco-instances", tmp_path, class_file=str(tmp_path / "mine.yaml"))
    assert np.array_equal(found, np.choose(np.where(expected == 255, 3, expected), [0, 0, 255, 1]))
    write(tmp_path, "mine.yaml", "classes: [{name: cup, ids: [90]}]\nignore: {rest: true}")
    assert np.array_equal(first_map("coco-instances", tmp_path, class_file=str(tmp_path / "mine.yaml")),
                          np.where(expected == 2, 0, 255))
    write(tmp_path, "mine.txt", "cup\nperson\ndog\n")
    assert np.array_equal(first_map("coco-instances", tmp_path, class_file=str(tmp_path / "mine.txt")),
                          np.choose(np.where(expected == 255, 3, expected), [1, 2, 0, 255]))
    write(tmp_path, "mine.txt", "cup\n")
    with pytest.raises(DatasetError, match=r"holds the label 1 'person' \(.*\), legal: 90 \("):
        first_map("coco-instances", tmp_path, class_file=str(tmp_path / "mine.txt"))
    write(tmp_path, "mine.txt", "cap\n")
    with pytest.raises(ConfigError, match="'cap', which is not in the list of names; did you mean 'cup'"):
        opened("coco-instances", tmp_path, class_file=str(tmp_path / "mine.txt"))
    with pytest.raises(ConfigError, match="leave out dataset.ignore_labels".replace(".", r"\.")):
        opened("coco-instances", tmp_path, ignore_labels=[1])


def test_a_category_called_background_holds_what_nobody_drew(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "background"}, *CATEGORIES]
    instances(tmp_path, categories=categories, annotations=[annotation(), annotation(id=2, category_id=0, segmentation=[
        box(3, 3, 5, 5)])])
    train = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    write(tmp_path, "annotations/instances_train2017.json", {**train, "categories": categories})
    expected = np.zeros((HEIGHT, WIDTH))
    expected[0:9, 0:9], expected[3:5, 3:5] = 1, 0
    assert np.array_equal(first_map("coco-instances", tmp_path), expected)


def test_changed_annotations_make_another_set(tmp_path: Path) -> None:
    instances(tmp_path)
    options = ("dataset.kind=coco-instances", "crops.splits=[]")
    make_shards(tmp_path / "set", tmp_path, *options)
    make_shards(tmp_path / "set", tmp_path, *options)  # already complete
    instances(tmp_path, annotations=[annotation()])
    with pytest.raises(ConfigError, match="complete shard set made with other settings, sources"):
        make_shards(tmp_path / "set", tmp_path, *options)


def test_the_extra_is_named_where_pycocotools_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    instances(tmp_path)
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs the extra 'coco' \(.*\): pip install 'maskstream\[coco\]'"):
        first_map("coco-instances", tmp_path)


# -- COCO: panoptic -----------------------------------------------------------------------------------------


def panoptic(root: Path, change: Callable[[Json], None] = lambda content: None,
             top: str = "annotations/") -> dict[str, dict[str, np.ndarray]]:
    categories = [{"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
                  {"id": 200, "name": "rug-merged", "isthing": 0, "color": [1, 2, 3]}, {"id": 90, "name": "cup"}]
    expected: dict[str, dict[str, np.ndarray]] = {}
    for seed, (split, names) in enumerate((("train", ["000000000009"]), ("val", ["000000000139", "000000000285"]))):
        content: Json = {"images": [], "annotations": [], "categories": categories}
        for number, stem in enumerate(names):
            rng = np.random.default_rng(10 * seed + number)
            ids = [0, 5, 300, 70_000, 8_345_037, 16_777_215]
            meaning = {0: 255, 5: 0, 300: 1, 70_000: 2, 8_345_037: 0, 16_777_215: 1}
            segments = rng.choice(ids, (8, 12)).repeat(5, 0).repeat(5, 1)
            save(root, f"{split}2017/{stem}.jpg")
            save(root, f"{top}panoptic_{split}2017/{stem}.png", np.stack(
                [segments % 256, segments // 256 % 256, segments // 65536], -1).astype(np.uint8))
            content["images"].append({"id": int(stem), "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH})
            content["annotations"].append({"image_id": int(stem), "file_name": f"{stem}.png", "segments_info": [
                {"id": segment, "category_id": [1, 200, 90][meaning[segment]], "iscrowd": 0, "area": 1, "bbox": []}
                for segment in ids[1:]]})
            expected.setdefault(split, {})[stem] = np.vectorize(meaning.get)(segments)
        if split == "val":
            change(content)
        write(root, f"annotations/panoptic_{split}2017.json", content)
    return expected


@pytest.mark.parametrize("top", ["annotations/", ""])
def test_panoptic_segments_become_their_categories(top: str, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    expected = panoptic(tmp_path, top=top)
    check_set("coco-panoptic", tmp_path, tmp_path / "set", expected, capsys)
    classes = load_manifest(tmp_path / "set").classes
    assert [item.name for item in classes] == ["person", "rug-merged", "cup"] and classes[0].color == (220, 20, 60)


def first_segments(content: Json) -> list[Json]:
    found: list[Json] = content["annotations"][0]["segments_info"]
    return found


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: first_segments(content).pop(0),
     r"image id 139 \(val2017/000000000139\.jpg\): annotations/panoptic_val2017/000000000139\.png has the segment id 5"
     ", which is not in its segments_info"),
    (lambda content: first_segments(content)[1].update(id=5), "a segment has the id 5, legal: whole numbers, from 1"),
    (lambda content: first_segments(content)[1].update(id="5"), "a segment has the id '5'"),
    (lambda content: first_segments(content)[1].update(category_id=2),
     r"annotations\[0\]\.segments_info\[1\]\.category_id is 2, which is not among the categories"),
    (lambda content: content["annotations"].append(content["annotations"][0]),
     r"annotations\[2\]\.image_id is 139, which another annotation has too"),
    (lambda content: content["annotations"][0].update(segments_info=3), r"segments_info is 3, legal: a list of ob"),
    (lambda content: content["annotations"][0].update(file_name="x.png"), "has no annotation with the name of a"),
    (lambda content: content["annotations"].pop(0), "has no annotation with the name of a file in the label folder"),
    (lambda content: content["images"][0].update(height=3), r"height and width are \[3, 60\], but the image has"),
])
def test_what_is_wrong_with_segments_is_named(change: Callable[[Json], None], message: str, tmp_path: Path) -> None:
    panoptic(tmp_path, change)
    with pytest.raises(DatasetError, match=rf"panoptic_val2017\.json.*{message}"):
        first_map("coco-panoptic", tmp_path)


# -- drawing ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 8))
def test_polygons_cover_what_is_inside_and_nothing_else(seed: int, points: int) -> None:
    """Pixels more than one away from the outline are drawn exactly if they are inside (even-odd)."""
    exact = np.random.default_rng(seed).uniform(-10, [WIDTH + 10, HEIGHT + 10], (points, 2)).round(3)
    canvas = Canvas(HEIGHT, WIDTH)
    canvas.polygon([(float(x), float(y)) for x, y in exact], 7)
    corners = np.floor(exact)
    drawn = canvas.stored() == 7
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    inside, distance = np.zeros((HEIGHT, WIDTH), bool), np.full((HEIGHT, WIDTH), np.inf)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
        length = max(1e-9, float((x2 - x1) ** 2 + (y2 - y1) ** 2))
        along = np.clip(((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length, 0, 1)
        distance = np.minimum(distance, np.hypot(x - x1 - along * (x2 - x1), y - y1 - along * (y2 - y1)))
    assert np.array_equal(drawn[distance > 1], inside[distance > 1])
    assert canvas.stored().dtype == np.uint16 and set(np.unique(canvas.stored())) <= {7, NOTHING}


def test_later_objects_lie_on_top_and_ids_are_kept() -> None:
    canvas = Canvas(10, 12)
    for stored, corner in ((65534, 2), (0, 5)):
        canvas.polygon([(corner, corner), (corner + 4, corner), (corner + 4, corner + 4), (corner, corner + 4)], stored)
    expected = np.full((10, 12), NOTHING)
    expected[2:7, 2:7], expected[5:10, 5:10] = 65534, 0
    assert np.array_equal(canvas.stored(), expected)


@pytest.mark.parametrize("flat", [[], [1, 2, 3, 4], [1] * 7, [1, 2, 3, 4, 5, math.inf], "123456", [1, 2, 3, 4, 5, "6"],
                                  [1, 2, 3, 4, 5, False], [0, 0, 9, 9, 21, 0], [0, 0, 9, 9, 0, -11]])
def test_points_are_numbers_near_the_image(flat: Any) -> None:
    with pytest.raises(DatasetError, match=r"^here"):
        checked_points(flat, 10, 10, "here")
    assert checked_points([0, -10, 20, 0, -10, 20], 10, 10, "here") == [(0, -10), (20, 0), (-10, 20)]


# -- LabelMe ------------------------------------------------------------------------------------------------


def shape(label: str, points: list[list[float]], kind: str = "polygon", **more: Any) -> Json:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def corners(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    """A polygon that covers the pixels left..right, top..bottom."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


SHAPES = [shape("car", corners(5, 5, 20, 20)), shape("bus", [[30, 30], [10, 10]], "rectangle"),
          shape("car", corners(40, 5, 45, 9)), shape("__ignore__", corners(50, 0, 59, 39))]


def labelme(root: Path, names: list[str], shapes: list[Json] = SHAPES, **changes: Any) -> np.ndarray:
    """Pairs of an image and a JSON file; returns the class ids with classes car, bus."""
    for name in names:
        save(root, f"{name}.jpg")
        write(root, f"{name}.json", {"version": "5.2.1", "flags": {}, "shapes": shapes, "imageData": "AAAA" * 1000,
                                     "imagePath": f"{name}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH, **changes})
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[5:21, 5:21], expected[10:31, 10:31], expected[5:10, 40:46] = 0, 1, 0
    expected[:, 50:60] = 255
    return expected


def test_labelme_files_are_drawn_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    expected = labelme(root, ["train/a", "train/b", "val/c"])
    write(root, "labels.txt", "__ignore__\ncar\nbus\n")
    write(root, "notes.md", "a root may hold other files")
    check_set("labelme", root, tmp_path / "set",
              {"train": {"a": expected, "b": expected}, "val": {"c": expected}}, capsys)
    assert [item.name for item in load_manifest(tmp_path / "set").classes] == ["car", "bus"]


def test_labelme_files_without_split_folders_are_divided(tmp_path: Path) -> None:
    expected = labelme(tmp_path, [f"deep/{number}" for number in range(12)])
    write(tmp_path, "classes.txt", "__ignore__\n_background_\ncar\nbus\n")
    dataset = opened("labelme", tmp_path, val_fraction=0.4)
    assert len(dataset.splits["train"]) + len(dataset.splits["val"]) == 12
    found = read_pair(dataset, dataset.splits["val"][0]).label_map
    expected[expected < 255] += 1
    nothing = expected == 255
    nothing[:, 50:60] = False
    assert np.array_equal(found, np.where(nothing, 0, expected))  # _background_ is what nobody drew


def test_labelme_by_templates_and_as_a_zip(tmp_path: Path) -> None:
    expected = labelme(tmp_path / "data/set", ["train/a", "val/c"])
    write(tmp_path, "data/set/classes.txt", "car\nbus\n__ignore__\n")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted((tmp_path / "data").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "data"))
    assert np.array_equal(first_map("labelme", tmp_path / "data.zip"), expected)
    for split in ("train", "val"):
        (tmp_path / f"json/{split}").mkdir(parents=True)
        (tmp_path / f"photos/{split}").mkdir(parents=True)
        for path in (tmp_path / f"data/set/{split}").iterdir():
            path.rename(tmp_path / ("json" if path.suffix == ".json" else "photos") / split / path.name)
    (tmp_path / "data/set/classes.txt").rename(tmp_path / "classes.txt")
    assert np.array_equal(first_map("labelme", tmp_path, images="photos/{split}/{stem}",
                                    labels="json/{split}/{stem}.json"), expected)


def test_labelme_names_are_known_to_class_tables(tmp_path: Path) -> None:
    expected = labelme(tmp_path, ["train/a", "val/c"])
    table = tmp_path / "mine.yaml"
    table.write_text("classes: [{name: vehicle, names: [car, bus]}]\nignore: {names: [__ignore__]}")
    assert np.array_equal(first_map("labelme", tmp_path, class_file=str(table)), np.where(expected == 255, 255, 0))
    table.write_text("classes: [{name: bus, names: [bus]}]")
    with pytest.raises(DatasetError, match=r"val/c\.json holds the label 0 '__ignore__' \("):
        first_map("labelme", tmp_path, class_file=str(table))
    table.write_text("classes: [{name: bus, names: [buss]}]")
    with pytest.raises(ConfigError, match="'buss', which is not in the list of names; did you mean 'bus'"):
        first_map("labelme", tmp_path, class_file=str(table))
    with pytest.raises(ConfigError, match=r"has no list of classes: write one name per line to classes\.txt there, or "
                                          r"set dataset\.class_file\. The JSON files use these names: __.*, bus, car"):
        first_map("labelme", tmp_path)
    write(tmp_path, "mine.txt", "bus\ncar\n__ignore__\n")
    assert np.array_equal(first_map("labelme", tmp_path, class_file=str(tmp_path / "mine.txt")),
                          np.choose(np.where(expected == 255, 2, expected), [1, 0, 255]))


def test_the_names_are_part_of_a_labelme_sets_identity(tmp_path: Path) -> None:
    labelme(tmp_path, ["train/a"])
    found = []
    for names in ("car\nbus\n__ignore__\n", "bus\ncar\n__ignore__\n"):
        write(tmp_path, "classes.txt", names)
        found.append(opened("labelme", tmp_path).mapping.identity)
    assert found[0] != found[1]


def test_circles_cover_their_radius(tmp_path: Path) -> None:
    labelme(tmp_path, ["val/c"], [shape("car", [[30, 20], [30, 29]], "circle")])
    write(tmp_path, "classes.txt", "car\n")
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - 30, y - 20)
    found = first_map("labelme", tmp_path) == 0
    assert found[distance < 8.5].all() and not found[distance > 9.5].any()


@pytest.mark.parametrize(("changes", "message"), [
    ({"imageHeight": 41}, r"imageHeight is 41, but val/c\.jpg has 40; they must be equal"),
    ({"imageWidth": "60"}, "imageWidth is '60', but"),
    ({"shapes": None}, "shapes is None, legal: a list of objects"), ({"shapes": [3]}, r"shapes is \[3\]"),
    ({"shapes": [shape("cra", corners(0, 0, 5, 5))]},
     r"shapes\[0\]\.label is 'cra', which is not in the list of names; did you mean 'car'"),
    ({"shapes": [shape("car", [[1, 2], [3, 4]])]}, r"shapes\[0\]\.points is 4 numbers, legal: x and y of at least 3"),
    ({"shapes": [*SHAPES[:1], shape("car", [[1, 2], [3, 4]], "line")]},
     r"shapes\[1\]\.shape_type is 'line', which covers no area; legal: polygon, rectangle, circle"),
    ({"shapes": [shape("car", [[1, 2]], "point")]}, "shape_type is 'point'"),
    ({"shapes": [shape("car", [[1, 2], [3, 4], [5, 6]], "rectangle")]}, "legal: a list of .*, two for a rectangle"),
    ({"shapes": [shape("car", [[1, 2, 3]] * 3)]}, "points is .*, legal: a list of"),
    ({"shapes": [shape("car", [[1, 2], [3, "4"], [5, 6]])]}, r"shapes\[0\]\.points\[3\] is '4', legal: a number from"),
    ({"shapes": [shape("car", [[1, 2], [3, 1e30], [5, 6]])]}, "is 1e.30, legal: a number from -40 to 80"),
])
def test_what_is_wrong_in_a_labelme_file_is_named(changes: Json, message: str, tmp_path: Path) -> None:
    labelme(tmp_path, ["val/c"], **changes)
    write(tmp_path, "classes.txt", "car\nbus\n__ignore__\n")
    with pytest.raises(DatasetError, match=rf"val/c\.json: (.*{message})"):
        first_map("labelme", tmp_path)


def test_sizes_that_are_not_given_are_not_compared_and_text_is_refused(tmp_path: Path) -> None:
    expected = labelme(tmp_path, ["val/c"], imageHeight=None, imageWidth=None)
    write(tmp_path, "classes.txt", "car\nbus\n__ignore__\n")
    assert np.array_equal(first_map("labelme", tmp_path), expected)
    write(tmp_path, "val/c.json", "hello")
    with pytest.raises(DatasetError, match=r"val/c\.json is not valid JSON"):
        first_map("labelme", tmp_path)
    (tmp_path / "val/c.json").unlink()
    save(tmp_path, "val/d.jpg")
    with pytest.raises(DatasetError, match=r"val/(c|d)\.jpg: no label map in val"):
        first_map("labelme", tmp_path)


def test_shapes_fit_the_view_that_exif_orientation_gives(tmp_path: Path) -> None:
    """The tool shows images upright, so its points fit the rotated image."""
    save(tmp_path, "val/c.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "val/c.png") as image:
        image.save(tmp_path / "val/c.png", exif=exif)
    write(tmp_path, "val/c.json", {"shapes": [shape("car", corners(0, 50, 39, 59))], "imageHeight": 60,
                                   "imageWidth": 40})
    write(tmp_path, "classes.txt", "car\n")
    found = first_map("labelme", tmp_path, exif_orientation="apply")
    assert found.shape == (60, 40) and (found[50:] == 0).all() and (found[:50] == 255).all()


# -- YOLO ---------------------------------------------------------------------------------------------------

LINES = f"""0 {5 / WIDTH} {5 / HEIGHT} {20 / WIDTH} {5 / HEIGHT} {20 / WIDTH} {20 / HEIGHT} {5 / WIDTH} {20 / HEIGHT}

2 0.1666667 0.25 0.5 0.25 0.5 0.75 0.1666667 0.75
"""


def yolo(root: Path, text: str = LINES) -> np.ndarray:
    for split in ("train", "val"):
        save(root, f"images/{split}/a.jpg")
        write(root, f"labels/{split}/a.txt", text)
    write(root, "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: car\n  1: dog\n  2: bus\n")
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[5:21, 5:21], expected[10:31, 10:31] = 0, 2
    return expected


def test_yolo_lines_are_drawn_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = yolo(tmp_path)
    check_set("yolo", tmp_path, tmp_path / "set", {"train": {"a": expected}, "val": {"a": expected}}, capsys)
    assert [item.name for item in load_manifest(tmp_path / "set").classes] == ["car", "dog", "bus"]


def test_yolo_classes_come_from_lists_tables_and_either_form_of_names(tmp_path: Path) -> None:
    expected = yolo(tmp_path)
    for text in ("names: [car, dog, bus]", "names: {2: bus, 0: car, 1: dog}"):
        write(tmp_path, "data.yaml", text)
        assert np.array_equal(first_map("yolo", tmp_path), expected)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no class table: .*data\.yaml cannot be read.*or set dataset\.class_file"):
        first_map("yolo", tmp_path)
    write(tmp_path, "mine.yaml", "classes: [{name: any, ids: [0, 2]}, {name: none, names: [background]}]")
    assert np.array_equal(first_map("yolo", tmp_path, class_file=str(tmp_path / "mine.yaml")),
                          np.where(expected == 255, 1, 0))
    write(tmp_path, "classes.txt", "car\ndog\nbus\n")
    assert np.array_equal(first_map("yolo", tmp_path), expected)
    write(tmp_path, "mine.yaml", "classes: [{name: any, names: [bus]}]\nignore: {rest: true}")
    assert np.array_equal(first_map("yolo", tmp_path, class_file=str(tmp_path / "mine.yaml")),
                          np.where(expected == 2, 0, 255))
    assert [item.name for item in opened("yolo", tmp_path, class_file=str(tmp_path / "classes.txt")).classes] == [
        "car", "dog", "bus"]


def test_a_roboflow_export_is_read_by_templates(tmp_path: Path) -> None:
    expected = yolo(tmp_path)
    for split, folder in (("train", "train"), ("val", "valid")):
        for top in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / top / split).rename(tmp_path / folder / top)
    found = first_map("yolo", tmp_path, images="{split}/images/{stem}", labels="{split}/labels/{stem}.txt",
                      splits={"train": "train", "val": "valid"})
    assert np.array_equal(found, expected)


def test_an_empty_file_is_an_image_without_objects(tmp_path: Path) -> None:
    yolo(tmp_path, "")
    assert (first_map("yolo", tmp_path) == 255).all()


@pytest.mark.parametrize(("text", "message"), [
    ("0 0.5 0.5 0.2 0.2", "line 1 has 5 numbers: the file holds boxes, not polygons"),
    (LINES + "0 0.1 0.1 0.2 0.2", "line 4 has 5 numbers"),
    ("0 0.1 0.1 0.2 0.2 0.3", "line 1 is 5 numbers, legal: x and y of at least 3 points"),
    ("0 0.1 0.1 0.2", "line 1 is 3 numbers"), ("0", "line 1 is 0 numbers"),
    ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "line 1 is 7 numbers"),
    ("car 0.1 0.1 0.2 0.2 0.3 0.3", "line 1 is 'car 0.1 0.1 0.2 0.2 0.3 0.3', legal: numbers only"),
    ("-1 0.1 0.1 0.2 0.2 0.3 0.3", "line 1 begins with '-1', legal: a class number"),
    ("0.5 0.1 0.1 0.2 0.2 0.3 0.3", "line 1 begins with '0.5'"), ("nan 0.1 0.1 0.2 0.2 0.3 0.3", "begins with 'nan'"),
    ("0 10 10 200 10 200 200", "line 1 has the coordinate '10', legal: 0 to 1, as shares"),
    ("0 0.1 0.1 0.2 0.2 0.3 nan", "line 1 has the coordinate 'nan'"), ("0 0.1 0.1 0.2 0.2 0.3 inf", "coordinate 'inf'"),
])
def test_what_is_wrong_in_a_yolo_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    yolo(tmp_path, text)
    with pytest.raises(DatasetError, match=rf"labels/val/a\.txt, (line . .*)?{message}"):
        first_map("yolo", tmp_path)


def test_a_class_without_a_name_and_a_file_that_is_no_text_are_named(tmp_path: Path) -> None:
    yolo(tmp_path, LINES.replace("2 0.16", "3 0.16"))
    with pytest.raises(DatasetError, match=r"labels/val/a\.txt holds the label 3 \(.*\), legal: 0, 1, 2 \("):
        first_map("yolo", tmp_path)
    (tmp_path / "labels/val/a.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(DatasetError, match=r"labels/val/a\.txt is not a text file"):
        first_map("yolo", tmp_path)


@pytest.mark.parametrize("text", ["names: 3", "x: 1", "names: {}", "names: {-1: a}", "names: {a: 1}", "- a",
                                  "names: [[1]]", "names: [", "names: &a [*a]"])
def test_unusable_names_of_yolo_are_refused(text: str, tmp_path: Path) -> None:
    yolo(tmp_path)
    write(tmp_path, "data.yaml", text)
    with pytest.raises(ConfigError, match=r"data\.yaml(: names is .*, legal: a list of class| is not valid YAML)"):
        first_map("yolo", tmp_path)
