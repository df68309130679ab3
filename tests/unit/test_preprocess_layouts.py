"""Dataset layouts: their official trees and counts, file-name templates, files that are left out."""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess.class_table import read_class_table
from preprocess.config import KINDS, WITH_TEMPLATES, DatasetConfig, PreprocessConfig
from preprocess.dry_run import print_dry_run
from preprocess.layouts import layout as layout_module
from preprocess.layouts.layout import TABLES, Layout
from preprocess.layouts.pairing import IMAGE_SUFFIXES, LABEL_SUFFIXES, Template, find_pairs
from preprocess.layouts.registry import LAYOUTS
from preprocess.matlab_file import read_matrix
from preprocess.pairs import open_dataset, read_pair
from preprocess.source_tree import NoSuchFile
from shards.cli.config_file import load_config
from shards.errors import ConfigError, DatasetError
from shards.files.plain_file import LARGEST_PICTURE
from shards.manifest import load_manifest
from shards.reader import iter_samples
from shards.verify import verify
from tests.conftest import make_shards

scipy = pytest.importorskip("scipy.io")
Writer = Callable[[Path], dict[str, dict[str, np.ndarray]]]
HEIGHT, WIDTH = 20, 30


def test_the_settings_list_every_layout() -> None:
    assert sorted(KINDS) == sorted(LAYOUTS) and all(LAYOUTS[kind].name == kind for kind in KINDS)
    assert set(WITH_TEMPLATES) <= set(KINDS)


def save(root: Path, name: str, pixels: np.ndarray, palette: bool = False) -> None:
    """A picture; indices get a palette, as VOC and Mapillary have, if asked."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette([value * 7 % 256 for value in range(768)])
    image.save(path)


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def blocks(values: list[int], seed: int) -> np.ndarray:
    """Every value in some block of 5 x 5 pixels, as far as there is room."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(np.concatenate([values, rng.choice(values, 24)])[:24])
    return cells.reshape(4, 6).repeat(5, 0).repeat(5, 1)


def mapped(stored: np.ndarray, meaning: dict[int, int]) -> np.ndarray:
    """The definition: value by value, 255 for all that is not listed."""
    return np.array([[meaning.get(int(value), 255) for value in row] for row in stored])


# -- trees as published, and what their labels mean, written down independently of the tables ---------------


def cityscapes(root: Path) -> dict[str, dict[str, np.ndarray]]:
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected: dict[str, dict[str, np.ndarray]] = {}
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "munster")):
        stem = f"{city}_000000_000019"
        ids = blocks(list(range(34)) if city == "bochum" else [*evaluated, 0, 4, 29], len(city)).astype(np.uint8)
        train_ids = mapped(ids, {value: number for number, value in enumerate(evaluated)})
        save(root, f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", photo(len(city)))
        save(root, f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", ids)
        save(root, f"gtFine/{split}/{city}/{stem}_gtFine_labelTrainIds.png", train_ids.astype(np.uint8))
        save(root, f"gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png", ids.astype(np.uint16) * 1000)
        save(root, f"gtFine/{split}/{city}/{stem}_gtFine_color.png", np.stack([ids] * 4, -1))
        (root / f"gtFine/{split}/{city}/{stem}_gtFine_polygons.json").write_text("{}")
        expected.setdefault(split, {})[f"{city}/{stem}"] = train_ids
    return expected


def voc(root: Path) -> dict[str, dict[str, np.ndarray]]:
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}}
    for number, (split, stem) in enumerate((
            ("train", "2007_000032"), ("train", "2007_000039"), ("val", "2007_000033"))):
        ids = blocks([*range(21), 255], number).astype(np.uint8)
        save(root, f"VOC2012/JPEGImages/{stem}.jpg", photo(number))
        save(root, f"VOC2012/SegmentationClass/{stem}.png", ids, palette=True)
        expected[split][stem] = ids
    save(root, "VOC2012/JPEGImages/2007_000027.jpg", photo(9))  # in no list, as most
    for split, found in expected.items():
        lists = root / "VOC2012/ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in sorted(found)))
    return expected


def pascal_context(root: Path) -> dict[str, dict[str, np.ndarray]]:
    meaning = {2: 0, 9: 1, 18: 2, 19: 3, 23: 5, 44: 10, 113: 22, 284: 36, 397: 49, 427: 54, 458: 58}
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}}
    for number, (split, stem) in enumerate((("train", "2008_000008"), ("val", "2008_000002"))):
        ids = blocks([*meaning, 0, 1, 431, 459], number)
        save(root, f"JPEGImages/{stem}.jpg", photo(number))
        (root / "trainval").mkdir(exist_ok=True)
        scipy.savemat(root / f"trainval/{stem}.mat", {"LabelMap": ids.astype(np.float64 if number else np.uint16)},
                      do_compression=bool(number))
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{stem}\n")
        (root / f"ImageSets/Main/aeroplane_{split}.txt").write_text(f"{stem} -1\n")
        expected[split][stem] = mapped(ids, meaning)
    return expected


def coco_stuff(root: Path) -> dict[str, dict[str, np.ndarray]]:
    never = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    classes = [value for value in range(182) if value not in never]
    assert len(classes) == 171
    meaning = {value: number for number, value in enumerate(classes)}
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}}
    for number, (split, stem) in enumerate((("train", "000000000009"), ("val", "000000000139"))):
        ids = blocks([0, 10, 12, 24, 26, 27, 89, 91, 92, 156, 181, 255], number).astype(np.uint8)
        save(root, f"images/{split}2017/{stem}.jpg", photo(number))
        save(root, f"stuffthingmaps/{split}2017/{stem}.png", ids)
        expected[split][stem] = mapped(ids, meaning)
    return expected


def loveda(root: Path) -> dict[str, dict[str, np.ndarray]]:
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}}
    for number, (split, area) in enumerate((
            ("Train", "Rural"), ("Train", "Urban"), ("Val", "Rural"), ("Val", "Urban"))):
        ids = blocks(list(range(8)), number).astype(np.uint8)
        save(root, f"{split}/{area}/images_png/{number}.png", photo(number))
        save(root, f"{split}/{area}/masks_png/{number}.png", ids)
        expected[split.lower()][f"{area}/{number}"] = np.where(ids == 0, 255, ids.astype(int) - 1)
    return expected


VISTAS = [("animal--bird", "Bird", True), ("object--vehicle--car", "Car", True),
          ("void--unlabeled", "Unlabeled", False), ("nature--sky", "Sky", True), ("void--ego", "Ego Vehicle", False)]


def mapillary(root: Path, config: str, folder: str) -> dict[str, dict[str, np.ndarray]]:
    labels = [{"name": name, "readable": readable, "evaluate": evaluate, "color": [number, 2, 3], "instances": True}
              for number, (name, readable, evaluate) in enumerate(VISTAS)]
    root.mkdir(exist_ok=True)
    (root / config).write_text(json.dumps({"labels": labels, "version": 1.1, "mapping": "public"}))
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}}
    for number, (split, name) in enumerate((("train", "training"), ("val", "validation"))):
        ids = blocks(list(range(5)), number).astype(np.uint8)
        save(root, f"{name}/images/a{number}-X_y.jpg", photo(number))
        save(root, f"{name}/{folder}/a{number}-X_y.png", ids, palette=True)
        expected[split][f"a{number}-X_y"] = mapped(ids, {0: 0, 1: 1, 3: 2})
    return expected


def ade20k_full(root: Path) -> dict[str, dict[str, np.ndarray]]:
    meaning = {2978: 0, 312: 1, 774: 14, 783: 14, 2985: 35, 533: 35, 246: 88, 247: 88, 954: 149}
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "val": {}}
    for number, (split, folder, stem) in enumerate((
            ("train", "training/a/abbey", "ADE_train_00000970"), ("train", "training/outliers/x", "ADE_train_00000001"),
            ("val", "validation/a/abbey", "ADE_val_00000001"))):
        ids = blocks([*meaning, 0, 1, 3148], number)
        blue = np.random.default_rng(number).integers(0, 256, ids.shape)
        save(root, f"images/{folder}/{stem}.jpg", photo(number))
        save(root, f"images/{folder}/{stem}_seg.png", np.stack([ids // 256 * 10, ids % 256, blue], -1).astype(np.uint8))
        save(root, f"images/{folder}/{stem}_parts_1.png", photo(number))
        (root / f"images/{folder}/{stem}_atr.txt").write_text("001 # 0 # 0 # wall # wall # \"\"\n")
        expected[split][f"{folder.partition('/')[2]}/{stem}"] = mapped(ids, meaning)
    (root / "index_ade20k.mat").write_bytes(b"MATLAB")
    return expected


TREES: dict[str, tuple[str, Writer]] = {
    "cityscapes": ("cityscapes", cityscapes), "cityscapes-trainids": ("cityscapes-trainids", cityscapes),
    "voc": ("voc", voc), "pascal-context": ("pascal-context", pascal_context), "coco-stuff": ("coco-stuff", coco_stuff),
    "loveda": ("loveda", loveda), "ade20k-full": ("ade20k-full", ade20k_full),
    "mapillary-v1.2": ("mapillary-v1.2", lambda root: mapillary(root, "config.json", "labels")),
    "mapillary-v1.2 in v2.0": ("mapillary-v1.2", lambda root: mapillary(root, "config_v1.2.json", "v1.2/labels")),
    "mapillary-v2.0": ("mapillary-v2.0", lambda root: mapillary(root, "config_v2.0.json", "v2.0/labels")),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", TREES)
def test_a_tree_as_published_becomes_its_classes(name: str, packed: bool, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str],
                                                 caplog: pytest.LogCaptureFixture) -> None:
    kind, write = TREES[name]
    expected, root = write(tmp_path / "data"), tmp_path / "data"
    if packed:
        root = tmp_path / "data.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path in sorted((tmp_path / "data").rglob("*")):
                archive.write(path, path.relative_to(tmp_path if kind == "loveda" else tmp_path / "data"))
    output = make_shards(tmp_path / "set", root, f"dataset.kind={kind}", "crops.splits=[]")
    assert verify(output) == [] and load_manifest(output).dataset == kind
    for split, maps in expected.items():
        found = {sample.key: sample for sample in iter_samples(output, split)}
        assert sorted(found) == sorted(maps)
        for key, label_map in maps.items():
            assert np.array_equal(found[key].label_map(), label_map), key
    said = [record.getMessage() for record in caplog.records if "the complete release has" not in record.getMessage()
            and "that the class table does not list" not in record.getMessage()]
    assert said == []  # nothing is left out
    settings = [f"dataset.kind={kind}", f"dataset.root={root}", "crops.size=32"]
    config = load_config(PreprocessConfig, None, settings)
    print_dry_run(config, open_dataset(config.dataset, "fail"))
    printed = capsys.readouterr().out
    assert "labels in" in printed and "0 of them cannot be used" in printed
    assert len(re.findall(r"(?m)^ +\d+  .* from ", printed)) == load_manifest(output).num_classes


def test_tables_have_the_published_number_of_classes() -> None:
    counts = {"cityscapes.yaml": 19, "cityscapes-trainids.txt": 19, "voc.txt": 21, "coco-stuff.yaml": 171,
              "loveda.txt": 7, "pascal-context.yaml": 59, "ade20k-full.yaml": 150, "ade20k.txt": 150, "camvid.txt": 11}
    for name, count in counts.items():
        path = TABLES / name
        if name.endswith(".yaml"):
            classes, mapping = read_class_table(str(path))
            assert len(classes) == count and set(mapping.values.values()) <= {*range(count), 255}
        else:
            assert len(path.read_text().splitlines()) == count
        assert len({line for line in path.read_text().splitlines() if line}) == len(path.read_text().splitlines())
    assert len((TABLES / "pascal-context-names.txt").read_text().splitlines()) == 460
    names = (TABLES / "pascal-context-names.txt").read_text().splitlines()
    classes, mapping = read_class_table(str(TABLES / "pascal-context.yaml"))
    assert all(names[stored] == classes[number].name for stored, number in mapping.values.items())
    full, _ = read_class_table(str(TABLES / "ade20k-full.yaml"))
    assert [item.name for item in full] == [line.split("\t")[0].strip() for line in
                                            (TABLES / "ade20k.txt").read_text().splitlines()]


# -- official counts, on trees of names only ----------------------------------------------------------------


class Names:
    """A tree of names: every file has one byte, but for those with a content."""

    def __init__(self, names: Iterator[str], content: dict[str, bytes] | None = None) -> None:
        self.name, self.left_out, self.content = "names", set[str](), content or {}
        self.by_folder: dict[str, dict[str, int]] = {}
        for path in sorted([*names, *self.content]):
            parts = path.split("/")
            for depth in range(len(parts)):
                self.by_folder.setdefault("/".join(parts[:depth]), {})[path] = 1

    def files(self, folder: str) -> dict[str, int]:
        return self.by_folder.get(folder.strip("/"), {})

    def has_files(self, folder: str) -> bool:
        return folder.strip("/") in self.by_folder

    def read(self, path: str, most: int = LARGEST_PICTURE) -> bytes:
        if path not in self.content:
            raise NoSuchFile(f"{path} cannot be read")
        assert len(self.content[path]) <= most
        return self.content[path]


def official(kind: str, counts: dict[str, int]) -> Names:
    """The official names, as many as `counts` says."""
    train, val = counts["train"], counts["val"]
    if kind == "ade20k":
        return Names(f"{top}/{folder}/ADE_{split}_{number:08d}.{suffix}" for top, suffix in (
            ("images", "jpg"), ("annotations", "png")) for split, folder, count in (
            ("train", "training", train), ("val", "validation", val)) for number in range(count))
    if kind == "ade20k-full":
        return Names(f"images/{folder}/a/abbey/ADE_{split}_{number:08d}{end}" for end in (
            ".jpg", "_seg.png", "_atr.txt", "_parts_1.png") for split, folder, count in (
            ("train", "training", train), ("val", "validation", val)) for number in range(count))
    if kind.startswith("cityscapes"):
        return Names(f"{top}/{split}/c{number % 18}/c_{number:06d}_000019_{end}" for top, end in (
            ("leftImg8bit", "leftImg8bit.png"), ("gtFine", "gtFine_labelIds.png"), ("gtFine", "gtFine_color.png"),
            ("gtFine", "gtFine_labelTrainIds.png"), ("gtFine", "gtFine_polygons.json")) for split, count in (
            ("train", train), ("val", val), ("test", 3)) for number in range(count))
    if kind == "coco-stuff":
        return Names(f"{top}/{split}2017/{number:012d}.{suffix}" for top, suffix in (
            ("images", "jpg"), ("stuffthingmaps", "png")) for split, count in (("train", train), ("val", val))
            for number in range(count))
    if kind == "loveda":
        return Names(f"{split}/{('Rural', 'Urban')[number % 2]}/{top}/{number}.png" for top in (
            "images_png", "masks_png") for split, count in (("Train", train), ("Val", val)) for number in range(count))
    if kind.startswith("mapillary"):
        version, config = kind.partition("-")[2], f"config_{kind.partition('-')[2]}.json"
        text = json.dumps({"labels": [{"name": "a", "color": [1, 2, 3], "evaluate": True}]}).encode()
        return Names((f"{split}/{top}/{number}.{suffix}" for top, suffix in (
            ("images", "jpg"), (f"{version}/labels", "png"), (f"{version}/instances", "png")) for split, count in (
            ("training", train), ("validation", val)) for number in range(count)), {config: text})
    if kind == "camvid":
        return Names(f"{split}{end}/{number:05d}.png" for end in ("", "annot") for split, count in counts.items()
                     for number in range(count))
    folder, suffix, lists = {"voc": ("SegmentationClass", "png", "Segmentation"),
                             "pascal-context": ("trainval", "mat", "Main")}[kind]
    both = [f"2008_{number:06d}" for number in range(train + val)]
    content = {f"ImageSets/{lists}/{split}.txt": "\n".join(names).encode()
               for split, names in (("train", both[:train]), ("val", both[train:]))}
    return Names((f"{top}/{stem}.{end}" for top, end in (("JPEGImages", "jpg"), (folder, suffix))
                  for stem in [*both, "2008_999999"]), content)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_TEMPLATES
                                  and kind not in ("coco-instances", "coco-panoptic")])
def test_official_counts_are_checked(kind: str, monkeypatch: pytest.MonkeyPatch,
                                     caplog: pytest.LogCaptureFixture) -> None:
    counts = dict(LAYOUTS[kind].official)
    published = {"ade20k": (20210, 2000), "ade20k-full": (20210, 2000), "camvid": (367, 101), "cityscapes": (2975, 500),
                 "cityscapes-trainids": (2975, 500), "coco-stuff": (118287, 5000), "loveda": (2522, 1669),
                 "mapillary-v1.2": (18000, 2000), "mapillary-v2.0": (18000, 2000), "pascal-context": (4998, 5105),
                 "voc": (1464, 1449)}
    assert (counts["train"], counts["val"]) == published[kind]
    for missing in (0, 1):
        tree = official(kind, {**counts, "train": counts["train"] - missing})
        monkeypatch.setattr(layout_module, "open_tree", lambda root, markers, tree=tree: tree)
        dataset = open_dataset(DatasetConfig(kind=kind, root="names"), "fail")
        assert {split: len(pairs) for split, pairs in dataset.splits.items()} == {
            split: counts[split] - (missing if split == "train" else 0) for split in LAYOUTS[kind].splits}
        assert [record.getMessage() for record in caplog.records] == [
            f"split 'train' has {counts['train'] - 1} images with labels; the complete release has {counts['train']}"
        ] * missing


def test_chosen_splits_and_limits_are_not_compared_with_the_release(tmp_path: Path,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    loveda(tmp_path)
    dataset = open_dataset(DatasetConfig(kind="loveda", root=str(tmp_path), splits={"val": "Val"}, limit=1), "fail")
    assert list(dataset.splits) == ["val"] and len(dataset.splits["val"]) == 1
    assert "complete release" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_splits_are_checked_for_every_layout(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.splits has a split named '\.\./evil', legal: letters, digits"):
        open_dataset(DatasetConfig(kind=kind, root=".", splits={"../evil": "train"}), "fail")


# -- what is wrong in a tree --------------------------------------------------------------------------------


def test_lists_name_what_is_missing(tmp_path: Path) -> None:
    voc(tmp_path)
    config = DatasetConfig(kind="voc", root=str(tmp_path))
    listed = tmp_path / "VOC2012/ImageSets/Segmentation/val.txt"
    listed.write_text("2007_000033\n2007_999999\n")
    with pytest.raises(DatasetError, match="2007_999999: listed, but there is no such image"):
        open_dataset(config, "fail")
    assert open_dataset(config, "skip").skipped["val"] == [("2007_999999", "listed, but there is no such image")]
    listed.write_bytes(b"\xff\xfe\0")
    with pytest.raises(DatasetError, match=r"ImageSets/Segmentation/val\.txt is not a text file"):
        open_dataset(config, "fail")
    listed.unlink()
    with pytest.raises(DatasetError, match=r"ImageSets/Segmentation/val\.txt cannot be read"):
        open_dataset(config, "fail")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"labelme", "huggingface"}))  # these two have no folders
def test_a_root_that_is_another_dataset_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "something/else").mkdir(parents=True)
    (tmp_path / "something/else/a.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"has no folder '.+' with files in it; check dataset\.root and data"):
        open_dataset(DatasetConfig(kind=kind, root=str(tmp_path)), "fail")


def context_pair(root: Path, data: bytes) -> Any:
    pascal_context(root)
    (root / "trainval/2008_000002.mat").write_bytes(data)
    dataset = open_dataset(DatasetConfig(kind="pascal-context", root=str(root)), "fail")
    return read_pair(dataset, dataset.splits["val"][0])


def mat(packed: bool = False, **variables: Any) -> bytes:
    buffer = io.BytesIO()
    scipy.savemat(buffer, variables, do_compression=packed)
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8", "u8"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (20, 30), (301, 17)])
def test_matrices_are_read_as_scipy_reads_them(packed: bool, kind: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 128, shape).astype(kind)
    data = mat(packed, other=np.arange(5000.0), text="abc", cells={"a": [1, 2]}, LabelMap=values, z=1)
    assert np.array_equal(read_matrix(data, "x", "LabelMap", *shape), scipy.loadmat(io.BytesIO(data))["LabelMap"])


@pytest.mark.parametrize(("data", "message"), [
    (b"", "is not a readable MATLAB file"), (b"MATLAB 5.0" + bytes(300), "is not a readable MATLAB file"),
    (mat(LabelMap=np.zeros((HEIGHT, WIDTH), np.uint16))[:-200], "is not a readable MATLAB file"),
    (mat(Labels=np.zeros((HEIGHT, WIDTH))), r"has the variables \{'Labels': \(20, 30\)\}, legal: LabelMap of the im"),
    (mat(LabelMap=np.zeros((HEIGHT + 1, WIDTH))), r"has the variables \{'LabelMap': \(21, 30\)\}, legal: .*\(20, 30\)"),
    (mat(LabelMap=np.full((HEIGHT, WIDTH), 0.5)), "LabelMap does not hold ids"),
    (mat(LabelMap=np.full((HEIGHT, WIDTH), -1)), "LabelMap does not hold ids"),
    (mat(LabelMap=np.full((HEIGHT, WIDTH), np.nan)), "LabelMap does not hold ids"),
    (mat(LabelMap=np.full((HEIGHT, WIDTH), "a")), "has the variables"),
    (mat(LabelMap={"a": 1}), "has the variables"), (mat(LabelMap=np.zeros((4, 5, 6))), "has the variables"),
    (mat(LabelMap=np.zeros((HEIGHT, WIDTH)))[:124] + b"\0\2IM" + bytes(400), "is not .*: its version is not 5"),
])
def test_unusable_matlab_files_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"trainval/2008_000002\.mat:? ?{message}"):
        context_pair(tmp_path, data)


def test_damaged_matlab_files_raise_our_errors(tmp_path: Path) -> None:
    sound = mat(LabelMap=np.ones((HEIGHT, WIDTH), np.uint16))
    packed = mat(True, LabelMap=np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 459)
    pascal_context(tmp_path)
    dataset = open_dataset(DatasetConfig(kind="pascal-context", root=str(tmp_path)), "fail")
    pair, rng = dataset.splits["val"][0], np.random.default_rng(0)
    for number in range(400):
        data = bytearray(packed if number % 2 else sound)
        for place in 120 + rng.integers(0, len(data) - 120 if number % 4 > 1 else 110, 2):
            data[place] = int(rng.integers(0, 256))
        data = data[: int(rng.integers(1, len(data)))] if number % 5 == 0 else data
        (tmp_path / pair.label_path).write_bytes(data)
        try:
            read_pair(dataset, pair)
        except DatasetError as error:
            assert "2008_000002.mat" in str(error)


def test_the_newer_full_ade20k_is_refused_with_a_way_out(tmp_path: Path) -> None:
    save(tmp_path, "images/ADE/training/urban/street/ADE_train_00016869.jpg", photo(0))
    with pytest.raises(DatasetError, match=r"is the release 2021_17_01: .*a pickle, which is never read\. Use release "
                                           r"2016_07_26, or ADEChallengeData2016 with dataset\.kind=ade20k"):
        open_dataset(DatasetConfig(kind="ade20k-full", root=str(tmp_path)), "fail")


def test_a_mask_that_was_changed_by_compression_is_noticed(tmp_path: Path) -> None:
    ade20k_full(tmp_path)
    path = tmp_path / "images/validation/a/abbey/ADE_val_00000001_seg.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 4, 0] = 117
    Image.fromarray(pixels).save(path)
    dataset = open_dataset(DatasetConfig(kind="ade20k-full", root=str(tmp_path)), "fail")
    with pytest.raises(DatasetError, match=r"_seg\.png has a pixel whose red is 117, legal: multiples of 10"):
        read_pair(dataset, dataset.splits["val"][0])


@pytest.mark.parametrize(("text", "message"), [
    ("[1]", "must hold a JSON object"), ('{"labels": 3}', "labels is 3, legal: a list"), ("{", "is not valid JSON"),
    ('{"labels": [{"name": "a", "color": [1, 2, 3]}]}', r"labels\[0\] is .*legal: an object with name"),
    ('{"labels": [{"name": "a", "color": [1, 2, 300], "evaluate": true}]}', r"labels\[0\] is")])
def test_an_unusable_vistas_configuration_is_named(text: str, message: str, tmp_path: Path) -> None:
    mapillary(tmp_path, "config_v2.0.json", "v2.0/labels")
    (tmp_path / "config_v2.0.json").write_text(text)
    with pytest.raises(DatasetError, match=rf"config_v2\.0\.json:? {message}"):
        open_dataset(DatasetConfig(kind="mapillary-v2.0", root=str(tmp_path)), "fail")


def test_settings_that_the_own_table_replaces_are_refused(tmp_path: Path) -> None:
    cityscapes(tmp_path / "a")
    mapillary(tmp_path / "b", "config_v2.0.json", "v2.0/labels")
    for kind, folder in (("cityscapes", "a"), ("mapillary-v2.0", "b")):
        with pytest.raises(ConfigError, match=r"a class table, which says itself what is ignored; leave out data"):
            open_dataset(DatasetConfig(kind=kind, root=str(tmp_path / folder), ignore_labels=[3]), "fail")


@pytest.mark.parametrize(("kind", "names", "ids"), [
    ("cityscapes", ["car", "truck", "caravan"], [26, 27, 29]), ("mapillary-v2.0", ["Car", "animal--bird"], [1, 0]),
    ("coco-stuff", ["person", "street sign", "wood"], [0, 11, 181]), ("voc", ["cat", "tvmonitor"], [8, 20]),
    ("pascal-context", ["accordion", "wool"], [1, 459]), ("loveda", ["background", "agricultural"], [1, 7]),
    ("ade20k-full", ["chair", "wall"], None), ("cityscapes-trainids", ["road", "bicycle"], [0, 18])])
def test_class_tables_of_users_know_the_names_of_the_dataset(kind: str, names: list[str], ids: list[int] | None,
                                                             tmp_path: Path) -> None:
    _, write = TREES[kind]
    write(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"classes:\n  - {{name: mine, names: {names}}}\nignore: {{rest: true}}\n"
                                        .replace("'", ""))
    config = DatasetConfig(kind=kind, root=str(tmp_path), class_file=str(tmp_path / "mine.yaml"))
    dataset = open_dataset(config, "fail")
    assert [item.name for item in dataset.classes] == ["mine"]
    assert sorted(dataset.mapping.values) == sorted(ids if ids is not None else [471, 2978])
    read_pair(dataset, dataset.splits["val"][0])
    (tmp_path / "mine.yaml").write_text("classes: [{name: mine, names: [no such name]}]")
    with pytest.raises(ConfigError, match="'no such name', which is not in the list of names"):
        open_dataset(config, "fail")


# -- file-name templates ------------------------------------------------------------------------------------


def templated(root: Path, images: str, labels: str, **options: Any) -> Any:
    (root / "classes.txt").write_text("a\nb\n")
    return open_dataset(DatasetConfig(kind="folder", root=str(root), images=images, labels=labels, **options), "fail")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def keys_of(dataset: Any) -> dict[str, list[tuple[str, str, str]]]:
    return {split: [(pair.key, pair.image_path, pair.label_path) for pair in pairs]
            for split, pairs in dataset.splits.items()}


def test_templates_say_which_label_belongs_to_which_image(tmp_path: Path) -> None:
    touch(tmp_path, "leftImg8bit/train/a/a_1_leftImg8bit.png", "gt/train/a/a_1_labelTrainIds.png",
          "gt/train/a/a_1_color.png", "leftImg8bit/val/b/b.2_leftImg8bit.png", "gt/val/b/b.2_labelTrainIds.png")
    dataset = templated(tmp_path, "leftImg8bit/{split}/{stem}_leftImg8bit.png", "gt/{split}/{stem}_labelTrainIds.png")
    assert keys_of(dataset) == {
        "train": [("a/a_1", "leftImg8bit/train/a/a_1_leftImg8bit.png", "gt/train/a/a_1_labelTrainIds.png")],
        "val": [("b/b.2", "leftImg8bit/val/b/b.2_leftImg8bit.png", "gt/val/b/b.2_labelTrainIds.png")]}


def test_a_template_may_have_more_fields_in_any_order_and_no_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "rural/images/train/x/1.JPG", "labels/train/rural-x/1.png", "rural/images/val/x/2.webp",
          "labels/val/rural-x/2.tif")
    dataset = templated(tmp_path, "{area}/images/{split}/{place}/{stem}", "labels/{split}/{area}-{place}/{stem}")
    assert keys_of(dataset) == {"train": [("rural/x/1", "rural/images/train/x/1.JPG", "labels/train/rural-x/1.png")],
                                "val": [("rural/x/2", "rural/images/val/x/2.webp", "labels/val/rural-x/2.tif")]}


def test_images_and_labels_may_lie_in_one_folder_and_the_rest_is_said(tmp_path: Path,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.jpg", "a_mask.png", "b.jpg", "b_mask.png", "notes.txt", "c.gif")
    dataset = templated(tmp_path, "{stem}.jpg", "{stem}_mask.png", val_fraction=0.5, splits={})
    assert sorted(key for pairs in dataset.splits.values() for key in (pair.key for pair in pairs)) == ["a", "b"]
    assert "3 files are neither an image nor labels of this layout and are left out, such as c.gif" in caplog.text
    touch(tmp_path, "d_mask.png")
    with pytest.raises(DatasetError, match=r"d_mask\.png: no image in "):
        templated(tmp_path, "{stem}.jpg", "{stem}_mask.png")


def test_characters_of_regular_expressions_are_literal_in_templates(tmp_path: Path) -> None:
    touch(tmp_path, "i(1)/train/a+b.jpg", "l.x/train/a+b[0].png", "lyx/train/a+b[0].png")
    dataset = templated(tmp_path, "i(1)/{split}/{stem}.jpg", "l.x/{split}/{stem}[0].png", splits={"train": "train"})
    assert keys_of(dataset)["train"] == [("a+b", "i(1)/train/a+b.jpg", "l.x/train/a+b[0].png")]


def test_lists_select_among_images_and_labels_in_one_folder() -> None:
    tree = Names(iter(["a.jpg", "a.png", "a_seg.png", "b.jpg", "b_seg.png", "c_seg.png", "d.txt"]))
    images = Template("{stem}", IMAGE_SUFFIXES, "images")
    found = find_pairs(tree, images, Template("{stem}_seg.png", LABEL_SUFFIXES, "labels"), "", listed=["a", "c"])
    assert [(pair.key, pair.image_path, pair.label_path) for pair in found.pairs] == [("a", "a.jpg", "a_seg.png")]
    assert found.unpaired == [("a.png", "same name as a.jpg"), ("c_seg.png", "no image in ")] and found.others == []
    by_suffix = Template("{stem}.jpg", IMAGE_SUFFIXES, "images")
    found = find_pairs(tree, by_suffix, Template("{stem}_seg.png", LABEL_SUFFIXES, "labels"), "", listed=["a", "c"])
    assert found.unpaired == [("c_seg.png", "no image in ")] and found.others == ["a.png", "d.txt"]
    json_beside = Names(iter(["a.jpg", "a.json", "b.json", "c.txt"]))
    found = find_pairs(json_beside, images, Template("{stem}.json", (".json",), "labels"), "")
    assert [pair.key for pair in found.pairs] == ["a"] and [path for path, _ in found.unpaired] == ["c.txt", "b.json"]


@pytest.mark.parametrize(("images", "labels", "message"), [
    ("x/{split}/{stem}", "y/{stem}", r"\{split\} in both, or in neither"),
    ("x/{split}", "y/{split}", r"legal: a template with the field \{stem\}"),
    ("x/{split}/{stem}/{area}", "y/{split}/{stem}", "have different fields: "),
    ("x/{split}/{stem}{stem}", "y/{split}/{stem}", "legal: fields like {stem}, each once".replace("{", r"\{")),
    ("x/{split}/{}", "y/{split}/{stem}", "legal: fields like"), ("x/{split}/{stem", "y/{split}/{stem}", "expected '}'"),
    ("x/{split}/{a.b}", "y/{split}/{stem}", "legal: fields like"),
    ("x/{split}/{stem!r}", "y/{split}/{stem}", r"dataset\.images is 'x/\{split\}/\{stem!r\}', legal: fields without"),
    ("x/{split}/{stem}", "y/{split}/{stem:>5}", r"dataset\.labels is 'y/\{split\}/\{stem:>5\}', legal: fields without"),
    ("x/{split:}/{stem}", "y/{split:}/{stem}", "legal: fields without"),
    ("x/{split!s}/{stem}", "y/{split}/{stem}", "legal: fields without"),
    ("x/{split}/{stem:{split}}", "y/{split}/{stem}", "legal: fields without"),
    ("x/{{split}}/{stem}", "y/{split}/{stem}", r"\{split\} in both, or in neither")])
def test_mistakes_in_templates_are_named(images: str, labels: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "x/train/a.jpg", "y/train/a.png")
    with pytest.raises(ConfigError, match=message):
        templated(tmp_path, images, labels, splits={"train": "train"})


def test_braces_may_be_part_of_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "x{1}/train/a.jpg", "y/train/a.png")
    for images in ("x{{1}}/{split}/{stem}", "x{{{area}}}/{split}/{stem}"):
        labels = "y/{split}/{stem}" if "area" not in images else "y{area}/{split}/{stem}"
        touch(tmp_path, "y1/train/a.png")
        dataset = templated(tmp_path, images, labels, splits={"train": "train"})
        assert [pair.image_path for pair in dataset.splits["train"]] == ["x{1}/train/a.jpg"]


@pytest.mark.parametrize("name", ["dataset.images", "dataset.labels", "dataset.class_file", "dataset.root",
                                  "ray_address"])
def test_an_empty_text_is_not_taken_for_null(name: str, tmp_path: Path) -> None:
    """As in dataset.images=$TEMPLATE without a TEMPLATE."""
    section, _, last = name.rpartition(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {last}: ''\n" if section else f"{last}: ''\n")
    for given in (lambda: load_config(PreprocessConfig, None, [f"{name}="]),
                  lambda: load_config(PreprocessConfig, None, [], {name: ""}),
                  lambda: load_config(PreprocessConfig, tmp_path / "c.yaml")):
        with pytest.raises(ConfigError, match=rf"{name} is empty, legal: .*, or null"):
            given()
    assert load_config(PreprocessConfig, None, [f"{name}=null"]) == PreprocessConfig()


def test_templates_come_in_twos_and_for_layouts_without_official_folders() -> None:
    for options in ({"images": "x/{stem}"}, {"labels": "x/{stem}"}):
        with pytest.raises(ConfigError, match="legal: both, with kind folder, labelme, yolo, huggingface, or none"):
            DatasetConfig(kind="folder", **options)
    with pytest.raises(ConfigError, match=r"dataset\.kind voc, legal: both"):
        DatasetConfig(kind="voc", images="x/{stem}", labels="y/{stem}")


# -- junk ---------------------------------------------------------------------------------------------------

JUNK = ("images/train/.DS_Store", "images/train/._a.jpg", "images/train/Thumbs.db", "annotations/train/desktop.ini",
        "annotations/train/__MACOSX/a.png", "annotations/train/.ipynb_checkpoints/a.png")


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_files_of_operating_systems_are_skipped_and_counted(packed: bool, tmp_path: Path,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    save(data, "images/train/a.jpg", photo(0))
    save(data, "annotations/train/a.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    touch(data, *JUNK, "images/train/.hidden.jpg", "annotations/train/.git/config")
    (data / "classes.txt").write_text("a\n")
    root = data
    if packed:
        root = tmp_path / "data.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path in sorted(data.rglob("*")):
                archive.write(path, path.relative_to(data))
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(DatasetConfig(kind="folder", root=str(root)), "fail")
    assert [pair.key for pair in dataset.splits["train"]] == ["a"] and dataset.skipped["train"] == []
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert said == ["6 files and folders of operating systems are left out, such as "
                    "annotations/train/.ipynb_checkpoints",
                    "2 hidden files and folders are left out, such as annotations/train/.git"]


# -- a new layout -------------------------------------------------------------------------------------------


def test_the_layout_that_the_documentation_shows_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/your-data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(from preprocess[^`]*class \w+\(Layout\)[^`]*)```", page)
    assert len(block.splitlines()) <= 20
    space: dict[str, Any] = {}
    exec(block, space)  # noqa: S102
    layout = next(value() for value in space.values() if isinstance(value, type) and issubclass(value, Layout)
                  and value is not Layout)
    monkeypatch.setitem(LAYOUTS, layout.name, layout)
    instances = blocks([7, 26, 33, 0], 0).astype(np.uint16) * 256 + 5
    save(tmp_path, "training/image_2/000000_10.png", photo(0))
    save(tmp_path, "training/instance/000000_10.png", instances)
    dataset = open_dataset(DatasetConfig(kind=layout.name, root=str(tmp_path)), "fail")
    found = read_pair(dataset, dataset.splits["train"][0]).label_map
    assert np.array_equal(found, mapped(instances // 256, {7: 0, 26: 13, 33: 18}))


# -- real images --------------------------------------------------------------------------------------------


def test_real_clothing_photographs_survive_sharding(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "clothing-co-parsing"
    if not root.is_dir():
        pytest.skip(f"{root} is missing")
    output = make_shards(tmp_path / "set", root, "dataset.limit=6", "crops.size=128")
    assert verify(output) == []
    for sample in iter_samples(output, "val"):
        assert np.array_equal(sample.label_map(), np.asarray(Image.open(root / f"annotations/val/{sample.key}.png")))
        assert sample.image_bytes == (root / f"images/val/{sample.key}.jpg").read_bytes()


def test_real_camvid_by_templates_equals_its_own_layout(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "camvid"
    names = TABLES / "camvid.txt"
    by_kind = open_dataset(DatasetConfig(kind="camvid", root=str(root), limit=3), "fail")
    by_templates = open_dataset(DatasetConfig(
        kind="folder", root=str(root), limit=3, images="{split}/{stem}", labels="{split}annot/{stem}.png",
        class_file=str(names), ignore_labels=[11]), "fail")
    assert by_kind.splits == by_templates.splits
    for pair in by_kind.splits["val"]:
        assert np.array_equal(read_pair(by_kind, pair).label_map, read_pair(by_templates, pair).label_map)




def test_real_ade20k_in_other_layouts_gives_the_same_labels(shared_data: Path, tmp_path: Path) -> None:
    """Three real pairs, written as the full ADE20K, as COCO instances and as panoptic segments."""
    coco = pytest.importorskip("pycocotools.mask")
    root = shared_data / "ade20k-sample"
    own = open_dataset(DatasetConfig(kind="ade20k", root=str(root), limit=3), "fail")
    full = read_class_table(str(TABLES / "ade20k-full.yaml"))[1].values
    index = np.zeros(256, np.int64)
    for stored, number in sorted(full.items(), reverse=True):
        index[number] = stored if number < 150 else 0
    categories = [{"id": number + 1, "name": item.name} for number, item in enumerate(own.classes)]
    files: dict[str, Any] = {kind: {"images": [], "annotations": [], "categories": categories}
                             for kind in ("instances", "panoptic")}
    expected = {}
    for number, pair in enumerate(own.splits["val"]):
        labels = expected[pair.key] = read_pair(own, pair).label_map
        photograph = np.asarray(Image.open(root / pair.image_path).convert("RGB"))
        ids, zero = index[labels], np.zeros(labels.shape, np.int64)
        save(tmp_path, f"full/images/validation/a/x/{pair.key}.jpg", photograph)
        save(tmp_path, f"full/images/validation/a/x/{pair.key}_seg.png",
             np.stack([ids // 256 * 10, ids % 256, zero], -1).astype(np.uint8))
        save(tmp_path, f"coco/val/{pair.key}.jpg", photograph)
        segments = np.where(labels == 255, 0, labels.astype(np.int64) * 400 + 1)
        save(tmp_path, f"coco/panoptic_val/{pair.key}.png",
             np.stack([segments % 256, segments // 256, zero], -1).astype(np.uint8))
        present = [int(value) for value in np.unique(labels) if value < 255]
        for content in files.values():
            content["images"].append({"id": number, "file_name": f"{pair.key}.jpg", "height": labels.shape[0],
                                      "width": labels.shape[1]})
        files["panoptic"]["annotations"].append({"image_id": number, "file_name": f"{pair.key}.png", "segments_info": [
            {"id": value * 400 + 1, "category_id": value + 1} for value in present]})
        for value in present:
            coded = coco.encode(np.asfortranarray(labels == value).astype(np.uint8))
            files["instances"]["annotations"].append({
                "id": 1000 * number + value, "image_id": number, "category_id": value + 1,
                "segmentation": {"size": list(labels.shape), "counts": coded["counts"].decode()}})
    (tmp_path / "coco/annotations").mkdir()
    for kind, content in files.items():
        (tmp_path / f"coco/annotations/{kind}_val.json").write_text(json.dumps(content))
    for kind, folder, splits in (("ade20k-full", "full", {"val": "validation"}),
                                 ("coco-instances", "coco", {"val": "val"}), ("coco-panoptic", "coco", {"val": "val"})):
        dataset = open_dataset(DatasetConfig(kind=kind, root=str(tmp_path / folder), splits=splits), "fail")
        assert len(dataset.splits["val"]) == 3
        for pair in dataset.splits["val"]:
            assert np.array_equal(read_pair(dataset, pair).label_map, expected[Path(pair.key).name]), kind
