"""export: round trips through each format, file names of hostile keys, and complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.coco import from_coco_rle
from shards.commands.export import FORMATS
from shards.errors import ConfigError, CorruptShardError
from shards.exports.file_names import file_name
from shards.exports.staging import staged_folder
from shards.files.storage import open_storage
from shards.manifest import ClassInfo, load_manifest
from shards.reader import iter_samples
from shards.rle import decode_segment_map, label_map_from_segments
from tests.conftest import REPOSITORY, make_shards
from tests.support.hand_made import Labelled, jpeg, png, write_labelled
from tests.support.shards_command import Done, shards_command

Command = Callable[..., Done]
CLASSES = [ClassInfo(name="sky, blue", color=(1, 2, 3)), ClassInfo(name='a "quoted" \\ name: ü', color=(250, 0, 9))]
HOSTILE = ["../../x", "/etc/x", "a\0b", "..", ".", "/", "a//b", "a/../../b", "~/.ssh/x", "con:", "a\\b", "x" * 5000,
           "x" * 5001, "/".join("d" * 700), ".hidden", "a.jpg/b", "a", "a.png/b", "a/b", "%2F", "a%00b", "\u202egpj",
           "é", "e\u0301", "日本/語", "a ", " a", "a.", "A", "a\n", "-rf", "$(x)", "*", "🙂", "a/", "a/."]


def sample(key: str, number: int = 0, size: tuple[int, int] = (5, 7)) -> Labelled:
    rng = np.random.default_rng(number)
    label_map = rng.integers(0, 2, size).astype(np.uint8)
    label_map[0, 0] = 255
    return key, png(rng.integers(0, 255, (*size, 3)).astype(np.uint8)), label_map


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return shards_command(monkeypatch, capsys)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- names -------------------------------------------------------------------------------------------------------------


def is_safe(name: str) -> bool:
    parts = name.split("/")
    return (len(name.encode()) <= 800 and all(0 < len(part.encode()) <= 150 for part in parts)
            and not any(part[0] in ". " or part[-1] in ". " for part in parts)
            and not re.search(r'[\x00-\x1f\x7f\\:*?"<>|$~]', name.replace("~", "", 1)))


def test_names_keep_what_is_plain_and_escape_what_is_not() -> None:
    for key in ("ADE_val_00000001", "aachen/aachen_000 019.v2", "Zürich/日本", "crop-003", "a,b(1)+c=d@e"):
        assert file_name(key) == key
    assert {key: file_name(key) for key in HOSTILE[:9]} == {
        "../../x": "%2E%2E/%2E%2E/x", "/etc/x": "%2F/etc/x", "a\0b": "a%00b", "..": "%2E%2E", ".": "%2E",
        "/": "%2F/%2F", "a//b": "a/%2F/b", "a/../../b": "a/%2E%2E/%2E%2E/b", "~/.ssh/x": "%7E/%2Essh/x"}
    assert file_name("a.jpg/b") == "a%2Ejpg/b"
    long = file_name("x" * 5000)
    assert long.startswith("x" * 117 + "~") and len(long) == 150


def test_hostile_keys_get_safe_names_one_to_one() -> None:
    names = [file_name(key) for key in HOSTILE]
    assert all(map(is_safe, names)) and len({PurePosixPath(name) for name in names}) == len(HOSTILE)


KEYS = st.text(st.one_of(st.sampled_from("./~%a b\\\0AéE2F"), st.characters(exclude_categories=["Cs"])), min_size=1)


@given(st.lists(KEYS, unique=True, min_size=2, max_size=2))
def test_different_keys_have_different_safe_names(keys: list[str]) -> None:
    one, other = map(file_name, keys)
    assert is_safe(one) and is_safe(other) and one != other
    assert PurePosixPath(one) != PurePosixPath(other)  # which ignores "//" and "/."
    assert not PurePosixPath(one).is_absolute() and ".." not in PurePosixPath(one).parts


@pytest.mark.parametrize("kind", ["png", "coco", "hf"])
def test_hostile_keys_stay_below_the_output(kind: str, tmp_path: Path, run: Command) -> None:
    root = write_labelled(tmp_path / "set", {"val": [sample(key, n) for n, key in enumerate(HOSTILE)]}, CLASSES)
    before = files_of(tmp_path)
    done = run("export", root, "--format", kind, "--output", tmp_path / "out/deep")
    assert done.code == 0, done.err
    after = {name: data for name, data in files_of(tmp_path).items() if not name.startswith("out/deep/")}
    assert after == before
    written = files_of(tmp_path / "out/deep")
    assert sum(name.startswith("images/") for name in written) == (0 if kind == "hf" else len(HOSTILE))


def test_a_key_that_occurs_twice_is_an_error_not_an_overwritten_file(tmp_path: Path, run: Command) -> None:
    root = write_labelled(tmp_path / "set", {"val": [sample("a"), sample("b"), sample("a", 2)]}, CLASSES)
    done = run("export", root, "--format", "png", "--output", tmp_path / "out")
    assert done.code == 2 and "two samples would be written to" in done.err and not (tmp_path / "out").exists()


# -- png ---------------------------------------------------------------------------------------------------------------


def test_the_folder_layout_comes_back_the_same(scene_shards: Path, tmp_path: Path, run: Command) -> None:
    assert run("export", scene_shards, "--format", "png", "--output", tmp_path / "out", "--split", "val").code == 0
    again = make_shards(tmp_path / "again", tmp_path / "out", "crops.splits=[]")
    assert load_manifest(again).classes == load_manifest(scene_shards).classes
    pairs = list(zip(iter_samples(scene_shards, "val"), iter_samples(again, "val"), strict=True))
    assert len(pairs) == 5
    for ours, theirs in pairs:
        assert ours.key == theirs.key and ours.image_bytes == theirs.image_bytes
        assert np.array_equal(ours.label_map(), theirs.label_map())


def test_label_pngs_have_the_class_colours(tmp_path: Path, run: Command) -> None:
    key, image, label_map = sample("a/b")
    root = write_labelled(tmp_path / "set", {"val": [(key, image, label_map)], "train": [sample("c")]}, CLASSES)
    assert run("export", root, "--format", "png", "--output", tmp_path / "out").code == 0
    assert sorted(files_of(tmp_path / "out")) == ["annotations/train/c.png", "annotations/val/a/b.png", "classes.txt",
                                                 "images/train/c.png", "images/val/a/b.png"]
    with Image.open(tmp_path / "out/annotations/val/a/b.png") as label:
        assert label.mode == "P" and np.array_equal(np.asarray(label), label_map)
        colors = np.asarray(label.convert("RGB"))
    for number, info in enumerate(CLASSES):
        assert (colors[label_map == number] == info.color).all()
    assert (colors[label_map == 255] == 0).all()
    assert (tmp_path / "out/images/val/a/b.png").read_bytes() == image
    assert (tmp_path / "out/classes.txt").read_text() == 'sky, blue\t#010203\na "quoted" \\ name: ü\t#fa0009\n'


def test_more_than_255_classes_take_16_bits_and_come_back(tmp_path: Path, run: Command) -> None:
    label_map = (np.arange(35, dtype=np.uint16).reshape(5, 7) * 8)
    label_map[0, 0] = 65535
    names = [f"class {number}" for number in range(300)]
    root = write_labelled(tmp_path / "set", {"val": [("a", sample("a")[1], label_map)]}, names)
    assert run("export", root, "--format", "png", "--output", tmp_path / "out").code == 0
    with Image.open(tmp_path / "out/annotations/val/a.png") as label:
        assert label.mode == "I;16" and np.array_equal(np.asarray(label), label_map)
    (again,) = iter_samples(make_shards(tmp_path / "again", tmp_path / "out", "crops.splits=[]"), "val")
    assert np.array_equal(again.label_map(), label_map)


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_an_image_that_viewers_would_turn_is_stored_as_its_pixels(kind: str, tmp_path: Path, run: Command) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)).save(buffer, "JPEG", exif=exif)
    root = write_labelled(tmp_path / "set", {"val": [("a", buffer.getvalue(), sample("a")[2])]}, CLASSES)
    assert run("export", root, "--format", kind, "--output", tmp_path / "out").code == 0
    (stored,) = iter_samples(root, "val")
    with Image.open(tmp_path / "out/images/val/a.png") as image:
        assert not image.getexif() and np.array_equal(np.asarray(image), stored.image)


# -- coco --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_pycocotools_reads_the_masks(scene_shards: Path, tmp_path: Path, run: Command) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    assert run("export", scene_shards, "--format", "coco", "--output", tmp_path / "out").code == 0
    classes = load_manifest(scene_shards).classes
    for split in ("train", "val"):
        with contextlib.redirect_stdout(io.StringIO()):
            found = coco.COCO(tmp_path / f"out/annotations/{split}.json")
        assert [item["name"] for item in found.loadCats(range(len(classes)))] == [info.name for info in classes]
        assert "not instances" in found.dataset["info"]["description"] and 0 not in found.anns
        samples = {sample.key: sample for sample in iter_samples(scene_shards, split)}
        assert {image["key"] for image in found.imgs.values()} == set(samples)
        for image in found.imgs.values():
            stored = samples[image["key"]]
            assert (tmp_path / "out/images" / split / image["file_name"]).read_bytes() == stored.image_bytes
            assert (image["height"], image["width"]) == stored.image.shape[:2]
            label_map = np.full(stored.image.shape[:2], 255)
            for item in found.loadAnns(found.getAnnIds(image["id"])):
                mask = found.annToMask(item).astype(bool)
                label_map[mask] = item["category_id"]
                rows, columns = np.nonzero(mask)
                left, top, width, height = item["bbox"]
                assert (left, top, left + width, top + height) == (columns.min(), rows.min(), columns.max() + 1,
                                                                   rows.max() + 1)
                assert item["area"] == mask.sum() and item["iscrowd"] == 0
            assert np.array_equal(label_map, stored.label_map())


def test_our_own_reader_of_coco_reads_them_too(tmp_path: Path, run: Command) -> None:
    samples = [sample("a", 1), sample("b", 2), ("c", sample("c")[1], np.full((5, 7), 255, np.uint8))]
    root = write_labelled(tmp_path / "set", {"val": samples}, CLASSES)
    assert run("export", root, "--format", "coco", "--output", tmp_path / "out").code == 0
    content = json.loads((tmp_path / "out/annotations/val.json").read_text())
    for image, (_, _, label_map) in zip(content["images"], samples, strict=True):
        rles = [{**item["segmentation"], "category_id": item["category_id"]} for item in content["annotations"]
                if item["image_id"] == image["id"]]
        record = from_coco_rle(rles, label_map.shape)
        assert np.array_equal(label_map_from_segments(*decode_segment_map(record)), label_map)


@pytest.mark.parametrize("samples", [0, 1])
def test_a_split_without_samples_or_annotations_is_valid_json(samples: int, tmp_path: Path, run: Command) -> None:
    unlabelled = ("c", sample("c")[1], np.full((5, 7), 255, np.uint8))
    root = write_labelled(tmp_path / "set", {"val": [unlabelled] * samples}, CLASSES)
    assert run("export", root, "--format", "coco", "--output", tmp_path / "out").code == 0
    content = json.loads((tmp_path / "out/annotations/val.json").read_text())
    assert len(content["images"]) == samples and content["annotations"] == []
    assert [item["id"] for item in content["categories"]] == [0, 1]


# -- hf ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_datasets_reads_pictures_labels_and_class_names(tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    samples = [sample(f"k/{number}", number) for number in range(7)] + [("jpg", jpeg(5, 7), sample("j")[2])]
    root = write_labelled(tmp_path / "set", {"val": samples, "mini-val": samples[:1]}, CLASSES)
    monkeypatch.setattr("shards.exports.parquet._FILE_BYTES", 1000)
    monkeypatch.setattr("shards.exports.parquet._GROUP_SAMPLES", 2)
    assert run("export", root, "--format", "hf", "--output", tmp_path / "out").code == 0
    files = sorted(path.name for path in (tmp_path / "out/data").iterdir())
    assert len(files) > 2 and files[0] == "mini_val-00000-of-00001.parquet"
    by_folder = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    by_files = datasets.load_dataset("parquet", data_files={"val": str(tmp_path / "out/data/val-*.parquet")},
                                     cache_dir=str(tmp_path / "cache2"))
    assert set(by_folder) == {"val", "mini_val"} and len(by_folder["mini_val"]) == 1
    for found in (by_folder["val"], by_files["val"]):
        assert all(isinstance(found.features[name], datasets.Image) for name in ("image", "label"))
        assert found.features["classes"].feature.names == [info.name for info in CLASSES]
        assert [row["key"] for row in found] == [key for key, _, _ in samples]
        for row, stored in zip(found, iter_samples(root, "val"), strict=True):
            assert np.array_equal(np.asarray(row["label"]), stored.label_map()) and row["label"].mode == "L"
            assert np.array_equal(np.asarray(row["image"].convert("RGB")), np.asarray(Image.fromarray(stored.image)))
            assert row["classes"] == stored.labels.tolist()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    root = write_labelled(tmp_path / "set", {"val": [sample("a")]}, CLASSES)
    done = run("export", root, "--format", "hf", "--output", tmp_path / "out")
    assert done.code == 2 and "pip install 'maskstream[hf]'" in done.err and not (tmp_path / "out").exists()


def test_a_split_without_samples_has_a_file(tmp_path: Path, run: Command) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    root = write_labelled(tmp_path / "set", {"val": []}, CLASSES)
    assert run("export", root, "--format", "hf", "--output", tmp_path / "out").code == 0
    table = parquet.read_table(tmp_path / "out/data/val-00000-of-00001.parquet")
    assert table.num_rows == 0 and table.column_names == ["key", "image", "label", "classes"]


def test_splits_that_datasets_could_not_tell_apart_are_refused(tmp_path: Path, run: Command) -> None:
    root = write_labelled(tmp_path / "set", {"a-b": [sample("a")], "a_b": [sample("a")]}, CLASSES)
    done = run("export", root, "--format", "hf", "--output", tmp_path / "out")
    assert done.code == 2 and "export them one by one" in done.err
    assert run("export", root, "--format", "hf", "--output", tmp_path / "out", "--split", "a-b").code == 0


# -- complete or absent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "coco", "hf"])
def test_the_same_set_gives_the_same_bytes(kind: str, scene_shards: Path, tmp_path: Path, run: Command) -> None:
    for name in ("one", "two"):
        assert run("export", scene_shards, "--format", kind, "--output", tmp_path / name).code == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") != {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("kind", ["png", "coco", "hf"])
def test_an_error_leaves_nothing(kind: str, scene_shards: Path, tmp_path: Path, run: Command) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    shard = root / "val-000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / "out").mkdir()
    done = run("export", root, "--format", kind, "--output", tmp_path / "out")
    assert done.code == 2 and "val-000000.tar" in done.err
    assert os.listdir(tmp_path / "out") == [] and sorted(os.listdir(tmp_path)) == ["out", "set"]


def test_a_label_that_is_no_class_is_an_error(tmp_path: Path) -> None:
    root = write_labelled(tmp_path / "set", {"val": [sample("a")]}, CLASSES)
    manifest = dataclasses.replace(load_manifest(root), classes=CLASSES[:1])
    for number, export in enumerate(FORMATS.values()):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(CorruptShardError, match=r"sample 'a': label 1, legal: 0\.\.0"):
            export(open_storage(root), manifest, ["val"], tmp_path / str(number), lambda: None)


@pytest.mark.parametrize("content", ["file", "hidden", "is a file", "link"])
def test_what_is_there_is_never_overwritten(content: str, scene_shards: Path, tmp_path: Path, run: Command) -> None:
    output = tmp_path / "out"
    if content == "is a file":
        output.write_text("mine")
    elif content == "link":
        output.symlink_to(tmp_path / "elsewhere")
    else:
        output.mkdir()
        (output / (".x" if content == "hidden" else "x")).write_text("mine")
    before = files_of(tmp_path)
    done = run("export", scene_shards, "--format", "png", "--output", output)
    assert done.code == 2 and "legal: a new or an empty folder" in done.err and files_of(tmp_path) == before
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_there_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"), staged_folder(tmp_path):
        raise AssertionError("too late")


def test_a_folder_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty"), staged_folder(tmp_path / "out") as staging:
        (staging / "a").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").touch()
    assert sorted(files_of(tmp_path)) == ["out/mine"]


KILLED = """
import os, sys, time
from pathlib import Path
from shards.exports.staging import staged_folder
with staged_folder(Path(sys.argv[1])) as staging:
    (staging / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_export_is_not_there_and_the_next_one_removes_its_rest(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE,
                          cwd=REPOSITORY) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        with staged_folder(tmp_path / "out2") as other:  # another output is not in the way
            (other / "x").touch()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists() and list(tmp_path.rglob("half"))
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with staged_folder(tmp_path / "out") as staging:
        (staging / "whole").touch()
    assert sorted(files_of(tmp_path)) == ["out/whole", "out2/x"] and sorted(os.listdir(tmp_path)) == ["out", "out2"]


@pytest.mark.parametrize(("words", "expected"), [
    (("--format", "png"), "--output"), (("--output", "x"), "--format"),
    (("--format", "voc", "--output", "x"), "invalid choice: 'voc'"),
    (("--format", "png", "--output", "s3://bucket/x"), "--output is 's3://bucket/x', legal: a local folder"),
    (("--format", "png", "--output", ""), "--output is '', legal: a local folder"),
    (("--format", "png", "--output", "x", "--split", "test"), "no split 'test', it has: train, val")])
def test_bad_arguments_are_errors(scene_shards: Path, words: tuple[str, ...], expected: str, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch, run: Command) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("export", scene_shards, *words)
    assert done.code == 2 and expected in done.err and os.listdir(tmp_path) == []


def test_a_set_in_object_storage_is_exported(s3_shards: str, scene_shards: Path, tmp_path: Path, run: Command) -> None:
    for root, name in ((s3_shards, "remote"), (scene_shards, "local")):
        assert run("export", root, "--format", "coco", "--output", tmp_path / name).code == 0
    assert files_of(tmp_path / "remote") == files_of(tmp_path / "local")
