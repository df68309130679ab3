"""Sharding: layouts, label mapping, crops, determinism, errors that name the file, interruption and resumption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocess.config import CropConfig, DatasetConfig, PreprocessConfig
from preprocess.encoding import crop_rng
from preprocess.make_scenes import CLASSES
from preprocess.pairs import open_dataset, read_pair
from shards.cli.config_file import load_config
from shards.crops.drawing import Crop, draw_crop
from shards.crops.label_runs import LabelRuns
from shards.crops.resampling import cut_image
from shards.errors import ConfigError, DatasetError
from shards.manifest import load_manifest
from shards.reader import iter_samples
from shards.verify import verify
from tests.conftest import REPOSITORY, heed_ctrl_c, make_shards
from tests.support.label_maps import cut_labels, pad_labels


def write_pair(root: Path, image: str, label: str, labels: np.ndarray, mode: str = "RGB") -> None:
    """Write a noise image and its label map below `root`."""
    pixels = np.random.default_rng(labels.sum()).integers(0, 255, (*labels.shape, 3), np.uint8)
    for name, picture in ((image, Image.fromarray(pixels).convert(mode)), (label, Image.fromarray(labels))):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def tiny_ade(root: Path) -> Path:
    """Two training and one validation pair in ADE20K's official layout."""
    rng = np.random.default_rng(0)
    for split, name in (("training", "ADE_train_00000001"), ("training", "ADE_train_00000002"),
                        ("validation", "ADE_val_00000001")):
        labels = rng.integers(0, 151, (6, 9), np.uint8).repeat(12, 0).repeat(12, 1)
        write_pair(root, f"images/{split}/{name}.jpg", f"annotations/{split}/{name}.png", labels)
    return root


# -- layouts and labels -------------------------------------------------------------------------------------


def test_ade20k_zero_becomes_ignored_and_the_rest_moves_down(tmp_path: Path) -> None:
    dataset = open_dataset(DatasetConfig(kind="ade20k", root=str(tiny_ade(tmp_path))), "fail")
    assert len(dataset.classes) == 150 and dataset.classes[0].name == "wall"
    assert {split: len(pairs) for split, pairs in dataset.splits.items()} == {"train": 2, "val": 1}
    pair = dataset.splits["val"][0]
    stored = np.asarray(Image.open(tmp_path / pair.label_path)).astype(np.int64)
    assert np.array_equal(read_pair(dataset, pair)[3], np.where(stored == 0, 255, stored - 1))


def test_the_original_zip_gives_the_same_shards_as_the_folder(tmp_path: Path) -> None:
    root = tiny_ade(tmp_path / "ADEChallengeData2016")
    with zipfile.ZipFile(tmp_path / "release.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    options = ("dataset.kind=ade20k", "crops.size=64")
    from_zip = make_shards(tmp_path / "a", tmp_path / "release.zip", *options)
    from_folder = make_shards(tmp_path / "b", root, *options)
    assert contents(from_zip) == contents(from_folder)


def test_camvid_layout_takes_png_images_and_ignores_eleven(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4).repeat(20, 0).repeat(20, 1)
    for split, suffix in (("train", "png"), ("val", "jpg")):
        write_pair(tmp_path, f"{split}/0001TP_0.{suffix}", f"{split}annot/0001TP_0.png", labels)
    output = make_shards(tmp_path / "set", tmp_path, "dataset.kind=camvid", "crops.splits=[]")
    for split, suffix in (("train", "png"), ("val", "jpg")):
        (sample,) = iter_samples(output, split)
        assert np.array_equal(sample.label_map(), np.where(labels == 11, 255, labels))
        assert sample.image_suffix == suffix
        assert sample.image_bytes == (tmp_path / split / f"0001TP_0.{suffix}").read_bytes()


def test_folder_layout_with_nested_dotted_names_and_many_classes(tmp_path: Path) -> None:
    labels = np.array([[0, 299], [65535, 7]], np.uint16).repeat(40, 0).repeat(40, 1)
    write_pair(tmp_path, "images/train/a.b/img.v2.png", "annotations/train/a.b/img.v2.png", labels)
    write_pair(tmp_path, "images/train/a.b/img.v3.png", "annotations/train/a.b/img.v3.png", labels)
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    output = make_shards(tmp_path / "set", tmp_path, "crops.splits=[]")
    samples = list(iter_samples(output, "train"))
    assert [sample.key for sample in samples] == ["a.b/img.v2", "a.b/img.v3"]
    assert np.array_equal(samples[0].label_map(), labels) and load_manifest(output).ignore_index == 65535
    assert verify(output) == []


def test_a_flat_folder_can_be_split_by_name(tmp_path: Path) -> None:
    labels = np.zeros((70, 70), np.uint8)
    for i in range(30):
        write_pair(tmp_path, f"images/i{i}.jpg", f"annotations/i{i}.png", labels)
    (tmp_path / "classes.txt").write_text("only\t#102030\n")
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(tmp_path), val_fraction=0.3), "fail")
    keys = {split: {pair.key for pair in pairs} for split, pairs in dataset.splits.items()}
    assert keys["train"] | keys["val"] == {f"i{i}" for i in range(30)} and not keys["train"] & keys["val"]
    assert dataset.classes[0].color == (16, 32, 48)


def test_split_folders_may_be_capitalised_but_nothing_is_left_out_silently(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    for top in ("images", "annotations"):
        (root / top / "train").rename(root / top / "Training")
    config = DatasetConfig(kind="folder", root=str(root))
    splits = open_dataset(config, "fail").splits
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 12, "val": 5}
    (root / "images/extra").mkdir()
    shutil.copy(next((root / "images/val").iterdir()), root / "images/extra/x.jpg")
    with pytest.raises(ConfigError, match="has 'extra' beside the split folders"):
        open_dataset(config, "fail")
    (root / "images/extra").rename(root / "images/train")
    with pytest.raises(ConfigError, match="has both 'Training' and 'train' for the split 'train'"):
        open_dataset(config, "fail")


def test_class_tables_may_have_a_byte_order_mark_but_no_repeated_name(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + (scenes / "classes.txt").read_bytes().replace(b"\n", b"\r\n"))
    config = DatasetConfig(kind="folder", root=str(scenes), class_file=str(tmp_path / "bom.txt"))
    assert [item.name for item in open_dataset(config, "fail").classes] == [name for name, _, _ in CLASSES]
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(ConfigError, match="lines 1 and 3 both name the class 'a'"):
        open_dataset(DatasetConfig(kind="folder", root=str(scenes), class_file=str(tmp_path / "twice.txt")), "fail")


def test_camera_files_with_several_pictures_are_ordinary_jpegs(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    image = root / "images/val/scene_val_00000.jpg"
    with Image.open(image) as picture:
        picture.save(tmp_path / "x.mpo", "MPO", save_all=True, append_images=[picture.copy()])
    shutil.copy(tmp_path / "x.mpo", image)
    sample = next(iter_samples(make_shards(tmp_path / "set", root), "val"))
    assert sample.image_bytes == image.read_bytes() and sample.image_suffix == "jpg"


def test_folders_of_others_are_left_alone(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in (".notes.tmp", "train-000000.tar"):
        (tmp_path / "mine" / name).write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and is not an unfinished shard set"):
        make_shards(tmp_path / "mine", scenes)
    assert {path.read_text() for path in (tmp_path / "mine").iterdir()} == {"precious"}


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    root = tiny_ade(tmp_path / "ADEChallengeData2016")
    path = tmp_path / "release.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path))
    with zipfile.ZipFile(path) as archive:
        item = next(item for item in archive.infolist() if item.filename.endswith("00000002.jpg"))
    data = bytearray(path.read_bytes())
    data[item.header_offset + 200 : item.header_offset + 240] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"ADE_train_00000002\.jpg cannot be read"):
        make_shards(tmp_path / "set", path, "dataset.kind=ade20k")


def test_blocks_that_skipped_images_are_redone_when_failing_is_asked_for(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    pattern = spoil(root, "image is text")
    for image in (root / "images/val").iterdir():
        image.write_bytes(b"")
    with pytest.raises(DatasetError, match="'val' has no usable sample"):
        make_shards(tmp_path / "set", root, "on_error=skip")
    for image in (scenes / "images/val").iterdir():
        shutil.copy(image, root / "images/val" / image.name)
    with pytest.raises(DatasetError, match=pattern):
        make_shards(tmp_path / "set", root, "on_error=fail")


def test_two_runs_cannot_write_the_same_set(scenes: Path, tmp_path: Path) -> None:
    import fcntl

    progress = tmp_path / "set/.progress"
    progress.mkdir(parents=True)
    with (progress / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is writing"):
            make_shards(tmp_path / "set", scenes)
    assert verify(make_shards(tmp_path / "set", scenes)) == []


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_usual_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    write_pair(tmp_path, f"images/train/x.{suffix}", "annotations/train/x.png", np.zeros((64, 64), np.uint8), mode)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (sample,) = iter_samples(make_shards(tmp_path / "set", tmp_path, "crops.splits=[]"), "train")
    assert sample.image.shape == (64, 64, 3)


# -- bad input ----------------------------------------------------------------------------------------------


def spoil(root: Path, how: str) -> str:
    """Damage pair scene_train_00003; returns a pattern for the expected error."""
    image = root / "images/train/scene_train_00003.jpg"
    label = root / "annotations/train/scene_train_00003.png"
    if how == "truncated image":
        image.write_bytes(image.read_bytes()[:900])
        return "scene_train_00003.jpg is not a readable"
    if how == "image is text":
        image.write_text("hello")
        return "scene_train_00003.jpg is not a readable"
    if how == "truncated label":
        label.write_bytes(label.read_bytes()[:60])
        return "scene_train_00003.png is not a readable"
    if how == "size differs":
        Image.fromarray(np.zeros((10, 11), np.uint8)).save(label)
        return r"scene_train_00003.jpg is \d+x\d+ pixels but .*scene_train_00003.png is 11x10"
    if how == "illegal label":
        labels = np.asarray(Image.open(label)).copy()
        labels[0, 0] = 8
        Image.fromarray(labels).save(label)
        return r"scene_train_00003.png holds the label 8 .*, legal: 0\.\.7"
    if how == "colour label":
        Image.open(label).convert("RGB").save(label)
        return "scene_train_00003.png has mode RGB"
    if how == "no label":
        label.unlink()
        return "scene_train_00003.jpg: no label map in annotations/train"
    if how == "no image":
        image.unlink()
        return "scene_train_00003.png: no image in images/train"
    if how == "same name":
        shutil.copy(image, image.with_suffix(".jpeg"))
        return "same name as"
    if how == "16-bit image":
        image.unlink()
        with Image.open(label) as stored:
            Image.fromarray(np.zeros(stored.size[::-1], np.uint16)).save(image.with_suffix(".png"))
        return "scene_train_00003.png has 16 bits per channel"
    if how == "empty file":
        image.write_bytes(b"")
        return "scene_train_00003.jpg is not a readable JPEG, PNG, WebP, TIFF or BMP file of 0 bytes"
    if how == "dangling link":
        image.unlink()
        image.symlink_to("nowhere.jpg")
        return "scene_train_00003.jpg cannot be read"
    (root / "images/train/notes.txt").write_text("x")
    return "notes.txt: not one of"


BAD_INPUTS = ["truncated image", "image is text", "truncated label", "size differs", "illegal label", "colour label",
              "no label", "no image", "same name", "stray file", "16-bit image",
              "empty file", "dangling link"]


@pytest.mark.parametrize("how", BAD_INPUTS)
def test_unusable_files_are_named_or_recorded(scenes: Path, tmp_path: Path, how: str) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    pattern = spoil(root, how)
    with pytest.raises(DatasetError, match=pattern):
        make_shards(tmp_path / "set", root)
    assert not list((tmp_path / "set").glob("manifest.json"))
    output = make_shards(tmp_path / "set", root, "on_error=skip")
    split = load_manifest(output).splits["train"]
    skipped = {Path(item["image"]).stem for item in split.skipped_images}
    assert skipped == {"notes" if how == "stray file" else "scene_train_00003"}
    usable = 12 if how in ("stray file", "same name") else 11
    assert split.images == usable and split.samples == 2 * usable and verify(output) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.root=/nowhere"], "/nowhere does not exist"),
        (["dataset.root={scenes}/images"], "no folder 'images'"),
        (["dataset.splits={{train: morning}}"], "no image with a label map for the split 'train': images/morning"),
        (["crops.splits=[train, tset]"], "'tset'"),
        (["dataset.class_file=/nowhere.txt"], "cannot be read"),
        (["dataset.val_fraction=0.5"], "has split folders"),
        (["crops.stored_size=32"], "at least crops.size"),
        (["crops.min_scale=3"], "at most crops.max_scale"),
        (["dataset.splits={{../evil: train}}"], "has a split named '../evil'"),
        (["output="], "output is not set"),
        (["crops.tries=1001"], r"crops\.tries is 1001, legal: from 1 to 1000"),
        ([f"crops.tries={10**30}"], rf"crops\.tries is {10**30}, legal: from 1 to 1000"),
        (["images_per_shard=1000001"], "images_per_shard is 1000001, legal: from 1 to 1000000"),
        (["images_per_shard=0"], "images_per_shard is 0, legal: from 1 to 1000000"),
        (["workers=4097"], "workers is 4097, legal: from 0 to 4096"),
        ([f"dataset.limit={2**62 + 1}"], rf"dataset\.limit is {2**62 + 1}, legal: from 1 to {2**62}"),
        (["dataset.limit=0"], r"dataset\.limit is 0, legal: at least 1"),
        (["dataset.ignore_labels=[255, 65536]"], r"ignore_labels is \[255, 65536\], legal: from 0 to 65535"),
        (["dataset.ignore_labels=[-1]"], r"ignore_labels is \[-1\], legal: from 0 to 65535"),
        (["dataset.image_bands=[1, 2, 99999]"], r"image_bands is \[1, 2, 99999\], legal: from 1 to 65535"),
        (["dataset.root=s3://bucket/x"], r"dataset\.root is 's3://bucket/x', legal: a local folder or zip archive"),
        (["output=s3://bucket/x", "staging=s3://bucket/y"], "staging is 's3://bucket/y', legal: a local folder"),
    ],
)
def test_bad_settings_say_what_is_legal(scenes: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DatasetError), match=message):
        make_shards(tmp_path / "set", scenes, *[item.format(scenes=scenes) for item in overrides])


# -- crops --------------------------------------------------------------------------------------------------


@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_cut_equals_cutting_the_whole_scaled_image(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
    labels = rng.integers(0, 5, (height, width), np.uint8)
    config = CropConfig(size=48, min_scale=0.5, max_scale=2.0)
    crop = draw_crop(rng, LabelRuns(labels, 255), config.rules)
    assert crop is not None and min(crop.scaled_height, crop.scaled_width) in range(24, 97)
    inside = np.s_[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    whole = np.asarray(image.resize((crop.scaled_width, crop.scaled_height), Image.Resampling.BILINEAR))
    cut = np.asarray(cut_image(image, crop, 48))
    assert np.abs(cut[: crop.height, : crop.width].astype(int) - whole[inside]).max() <= 2
    assert (cut[crop.height :] == (124, 116, 104)).all() and (cut[:, crop.width :] == (124, 116, 104)).all()
    rows = (np.arange(crop.scaled_height) * height / crop.scaled_height).astype(int)
    columns = (np.arange(crop.scaled_width) * width / crop.scaled_width).astype(int)
    assert (cut_labels(labels, crop) == labels[np.ix_(rows, columns)][inside]).mean() > 0.999


def test_crops_avoid_a_single_class_when_they_can() -> None:
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 80:] = 1
    config = CropConfig(size=50, min_scale=2.0, max_scale=2.0, tries=200)
    for number in range(20):
        crop = draw_crop(crop_rng(0, "image", number), LabelRuns(labels, 255), config.rules)
        assert crop is not None
        assert np.bincount(cut_labels(labels, crop).reshape(-1)).max() < 0.75 * 2500
    anywhere = CropConfig(size=50, cat_max_ratio=1.0)
    without = [draw_crop(crop_rng(0, "image", number), LabelRuns(labels, 255), anywhere.rules) for number in range(20)]
    assert any(np.bincount(cut_labels(labels, crop).reshape(-1)).max() >= 0.75 * 2500 for crop in without if crop)


def test_an_unlabelled_image_gives_no_crop_and_is_counted(scenes: Path, tmp_path: Path) -> None:
    unlabelled = LabelRuns(np.full((40, 40), 255, np.uint8), 255)
    assert draw_crop(crop_rng(0, "x", 0), unlabelled, CropConfig(size=32).rules) is None
    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    label = root / "annotations/train/scene_train_00000.png"
    Image.fromarray(np.full(np.asarray(Image.open(label)).shape, 255, np.uint8)).save(label)
    split = load_manifest(make_shards(tmp_path / "set", root)).splits["train"]
    assert split.skipped_crops == {"no labelled pixel in any try": 2} and split.samples == 22


def test_stored_windows_may_be_larger_than_the_training_crop(scenes: Path, tmp_path: Path) -> None:
    output = make_shards(tmp_path / "set", scenes, "crops.stored_size=96")
    assert {sample.image.shape for sample in iter_samples(output, "train")} == {(96, 96, 3)}


def test_crop_geometry_is_recorded(scene_shards: Path) -> None:
    for sample in iter_samples(scene_shards, "train"):
        crop = Crop(**sample.meta["crop"])
        labels = np.asarray(Image.open(_source(sample.meta["source"], scene_shards)))
        assert np.array_equal(pad_labels(cut_labels(labels, crop), 64, 255), sample.label_map())
        break


def _source(image: str, scene_shards: Path) -> Path:
    scenes = next(scene_shards.parent.parent.glob("scenes*"))
    return scenes / Path(image.replace("images", "annotations")).with_suffix(".png")


# -- the set ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "preprocess" / "make_shards.py"), "--config",
            str(REPOSITORY / "configs" / "scenes-shards.yaml"), *arguments]


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(scenes: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        subprocess.run(command("--root", str(scenes), "--output", str(tmp_path / str(workers)), "--workers",
                               str(workers), "crops.size=64", "images_per_shard=4"), check=True, capture_output=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) == 3 * 4 + 2 + 9


def test_seed_and_settings_change_the_crops(scenes: Path, scene_shards: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "set", scenes, "seed=1")
    assert contents(other)["train-000000.tar"] != contents(scene_shards)["train-000000.tar"]
    assert contents(other)["val-000000.tar"] == contents(scene_shards)["val-000000.tar"]


def test_a_rerun_of_a_complete_set_does_nothing_and_other_settings_are_refused(scenes: Path, tmp_path: Path) -> None:
    output = make_shards(tmp_path / "set", scenes)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    make_shards(output, scenes)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    for change in ("seed=1", "crops.jpeg_quality=90", "dataset.limit=3"):
        with pytest.raises(ConfigError, match="complete shard set made with other settings"):
            make_shards(output, scenes, change)


LONG = ("--workers", "2", "images_per_shard=3", "crops.per_image=24")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes/ and with set/, which takes a while to write."""
    from preprocess.make_scenes import write_scenes

    folder = tmp_path_factory.mktemp("long")
    write_scenes(folder / "scenes", {"train": 48, "val": 4}, seed=1)
    subprocess.run(command("--root", str(folder / "scenes"), "--output", str(folder / "set"), *LONG), check=True,
                   capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_half_shard_and_a_rerun_finishes_it(uninterrupted: Path, tmp_path: Path,
                                                                    how: signal.Signals) -> None:
    arguments = ["--root", str(uninterrupted / "scenes"), "--output", str(tmp_path / "set"), *LONG]
    process = subprocess.Popen(command(*arguments), start_new_session=True, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_ctrl_c)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "set").glob(".progress/*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "finished before it could be stopped"
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # so that a test that was kept waiting does not interrupt a finished run
    assert not (tmp_path / "set" / "manifest.json").exists(), "finished before it could be stopped"
    process.send_signal(how)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == (130 if how != signal.SIGKILL else -signal.SIGKILL)
    wait_for_orphans(process.pid)
    assert not (tmp_path / "set" / "manifest.json").exists()
    if how != signal.SIGKILL:
        assert "interrupted" in process.stderr.read()
        assert not list((tmp_path / "set").glob(".*.tmp"))
    process.stderr.close()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob(".progress/*.json")}
    kept = [json.loads((tmp_path / "set/.progress" / name).read_bytes())["shards"][0]["name"] for name in finished]
    times = {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in kept}
    subprocess.run(command(*arguments), check=True, capture_output=True)
    assert {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in kept} == times  # not done again
    assert verify(tmp_path / "set") == []
    assert contents(tmp_path / "set") == contents(uninterrupted / "set")


def wait_for_orphans(group: int) -> None:
    """Wait until every process of the session has exited by itself."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("worker processes outlived their parent")


def test_a_changed_source_is_done_again(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    spoil(root, "image is text")
    with pytest.raises(DatasetError):
        make_shards(tmp_path / "set", root)  # blocks before the bad one may be done
    shutil.copy(scenes / "images/train/scene_train_00003.jpg", root / "images/train/scene_train_00003.jpg")
    assert contents(make_shards(tmp_path / "set", root)) == contents(make_shards(tmp_path / "fresh", scenes))


# -- command line -------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(REPOSITORY / "preprocess" / "make_shards.py"), *arguments],
                          capture_output=True, text=True, check=False)


def test_the_bare_command_says_in_one_line_what_it_needs() -> None:
    result = run()
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "python preprocess/make_shards.py --dataset ade20k --root" in result.stderr


def test_help_lists_every_setting_and_dry_run_writes_nothing(scenes: Path, tmp_path: Path) -> None:
    text = run("--help").stdout
    for name in ("crops.cat_max_ratio = 0.75", "dataset.kind = ade20k", "images_per_shard = 500", "--on-error"):
        assert name in text
    result = run("--dataset", "folder", "--root", str(scenes), "--output", str(tmp_path / "set"), "--dry-run")
    assert result.returncode == 0 and "train: 12 images x 4 crops -> 4 shards" in result.stdout
    assert "scene_train_00000-000" in result.stdout and list(tmp_path.iterdir()) == []


def test_an_unknown_setting_names_the_nearest() -> None:
    result = run("crops.siz=3", "--root", "x")
    assert result.returncode == 2 and "'crops.siz'" in result.stderr and "Did you mean: 'size'" in result.stderr


def test_the_shards_command_shows_and_verifies(scene_shards: Path, tmp_path: Path) -> None:
    def shards(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "shards", *arguments], capture_output=True, text=True, check=False)

    assert "24 crops from 12 images in 4 shards" in shards("info", str(scene_shards)).stdout
    assert shards("verify", str(scene_shards)).returncode == 0
    assert shards("show", str(scene_shards), "--output", str(tmp_path / "s.png")).returncode == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 500
    broken = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    (broken / "val.index").unlink()
    result = shards("verify", str(broken))
    assert result.returncode == 1 and "val.index" in result.stdout
    assert shards("info", str(tmp_path)).returncode == 2


# -- real images --------------------------------------------------------------------------------------------


def test_real_ade20k_samples_survive_sharding(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "ade20k-sample"
    output = make_shards(tmp_path / "set", root, "dataset.kind=ade20k", "crops.size=512",
                         "dataset.splits={train: training, val: validation}")
    assert verify(output) == []
    for sample in iter_samples(output, "val"):
        stored = np.asarray(Image.open(root / "annotations/validation" / f"{sample.key}.png")).astype(int)
        assert np.array_equal(sample.label_map(), np.where(stored == 0, 255, stored - 1))
        original = Image.open(root / "images/validation" / f"{sample.key}.jpg").convert("RGB")
        assert np.array_equal(sample.image, np.asarray(original))


def test_real_camvid_samples_survive_sharding(shared_data: Path, tmp_path: Path) -> None:
    output = make_shards(tmp_path / "set", shared_data / "camvid", "dataset.kind=camvid", "dataset.limit=4",
                         "crops.size=256")
    assert verify(output) == []
    for sample in iter_samples(output, "val"):
        stored = np.asarray(Image.open(shared_data / "camvid/valannot" / f"{sample.key}.png"))
        assert np.array_equal(sample.label_map(), np.where(stored == 11, 255, stored))


def test_configuration_round_trips_through_yaml(tmp_path: Path) -> None:
    from shards.cli.config_file import config_to_yaml

    config = load_config(PreprocessConfig, REPOSITORY / "configs" / "ade20k-shards.yaml", ["dataset.root=a,b {c}"])
    (tmp_path / "c.yaml").write_text(config_to_yaml(config))
    assert load_config(PreprocessConfig, tmp_path / "c.yaml") == config
    assert config.dataset.root == "a,b {c}"


@pytest.mark.parametrize("output", ["s3://bucket/x", ""])
def test_scenes_are_drawn_into_local_folders_only(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preprocess import make_scenes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_scenes.py", "--output", output, "--train", "1", "--val", "1"])
    with pytest.raises(ConfigError, match=rf"--output is '{output}', legal: a local folder"):
        make_scenes.main()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value", "legal"), [
    ("--train", 0, "from 1 to 1000000"), ("--train", 10**12, "from 1 to 1000000"),
    ("--val", 10**12, "from 1 to 1000000"),
    ("--seed", -1, f"from 0 to {2**62}"), ("--seed", 2**63, f"from 0 to {2**62}")])
def test_numbers_of_scenes_have_limits(option: str, value: int, legal: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    from preprocess import make_scenes

    monkeypatch.setattr(sys, "argv", ["make_scenes.py", "--output", str(tmp_path / "x"), option, str(value)])
    with pytest.raises(ConfigError, match=f"{option} is {value}, legal: {legal}"):
        make_scenes.main()
    assert not any(tmp_path.iterdir())


def test_scenes_are_never_mixed_with_other_files(tmp_path: Path) -> None:
    from preprocess.make_scenes import write_scenes

    write_scenes(tmp_path / "drawn", {"train": 1}, seed=0)
    write_scenes(tmp_path / "drawn", {"train": 2}, seed=0)  # a folder of drawn scenes
    for name in ("images/train/cat.jpg", "classes.txt"):
        own = tmp_path / name.replace("/", "-") / name
        own.parent.mkdir(parents=True)
        own.write_bytes(b"mine")
        with pytest.raises(ConfigError, match=rf"holds files other than drawn scenes, such as .*{name}"):
            write_scenes(tmp_path / name.replace("/", "-"), {"train": 1}, seed=0)
        assert own.read_bytes() == b"mine"
