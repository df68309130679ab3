"""Malformed files and huge sets: an immediate error, bounded memory, no hang."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess.config import DatasetConfig, PreprocessConfig
from preprocess.make_scenes import write_scenes
from preprocess.pairs import open_dataset
from shards.cli.config_file import load_config
from shards.errors import ConfigError, CorruptShardError, DatasetError, ShardError, StorageError
from shards.files.plain_file import LARGEST_TEXT, LARGEST_YAML, read_plain, read_plain_text
from shards.files.storage import LocalStorage
from shards.manifest import INDEX_DTYPE, MANIFEST_NAME, load_manifest, manifest_bytes
from shards.mirror import copy_set
from shards.reader import ShardReader, iter_samples
from shards.rle import encode_rle
from shards.sample import encode_sample
from shards.verify import verify
from shards.writer import ShardWriter
from tests.conftest import make_shards
from tests.support.hand_made import as_version_1, edit_table, jpeg, shards_of, write_manifest, write_set

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def damaged(scene_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scene_shards, tmp_path / "set"))


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(60 << 30)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, legal: a regular file"),
    "folder": (Path.mkdir, "is a folder, legal: a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, legal: a regular file"),
    "sparse": (make_sparse, f"has {60 << 30} bytes"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", [MANIFEST_NAME, "train.index", "train-000001.tar"])
def test_no_reader_opens_what_is_no_file_of_its_size(damaged: Path, tmp_path: Path, name: str, kind: str) -> None:
    make, message = ODD[kind]
    (damaged / name).unlink()
    make(damaged / name)
    tracemalloc.start()
    try:
        assert any(name in problem and message in problem for problem in verify(damaged))
        with pytest.raises(ShardError, match=name.replace(".", r"\.")):
            list(iter_samples(damaged, "train"))
        with pytest.raises(ShardError, match=message):
            copy_set(damaged, tmp_path / "mirror")
        if name == MANIFEST_NAME:
            with pytest.raises(StorageError, match=message):
                load_manifest(damaged)
        assert tracemalloc.get_traced_memory()[1] < 40 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_pipe_among_source_images_is_named(scenes: Path, tmp_path: Path) -> None:
    from preprocess.pairs import read_pair

    root = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    first = sorted((root / "images" / "train").iterdir())[0]
    first.unlink()
    os.mkfifo(first)
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(root)), "fail")
    with pytest.raises(DatasetError, match=rf"{first.name} is a named pipe"):
        read_pair(dataset, dataset.splits["train"][0])
    with pytest.raises(DatasetError, match="is a named pipe"):
        make_shards(tmp_path / "set", root)


def a_dataset(root: Path, kind: str) -> dict[str, Any]:
    """An image and what the layout needs beside it, but for one file; returns the settings."""
    for name in ("images/train/a.png", "annotations/train/a.png", "JPEGImages/a.jpg", "SegmentationClass/a.png",
                 "training/images/a.jpg", "training/v2.0/labels/a.png", "train/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "train/a.json").write_text('{"shapes": []}')
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/a.txt").touch()
    return {"kind": kind, "root": str(root), "splits": {"train": "training" if kind.startswith("map") else "train"}}


# What reads a file that somebody wrote: layout, settings, the file, and how the error begins.
SIDE_FILES: dict[str, tuple[str, dict[str, str], str, str]] = {
    "list of classes": ("folder", {"class_file": "odd.txt"}, "odd.txt", r"dataset\.class_file .*odd\.txt"),
    "list of classes, ADE20K": ("ade20k", {"class_file": "odd.txt"}, "odd.txt", r"dataset\.class_file .*odd\.txt"),
    "list of classes, LabelMe": ("labelme", {"class_file": "odd.txt"}, "odd.txt", r"dataset\.class_file .*odd\.txt"),
    "list of classes, YOLO": ("yolo", {"class_file": "odd.txt"}, "odd.txt", r"dataset\.class_file .*odd\.txt"),
    "class table": ("folder", {"class_file": "odd.yaml"}, "odd.yaml", r"configuration file .*odd\.yaml"),
    "names of a table": ("folder", {"class_file": "table.yaml"}, "odd.txt", r"table\.yaml: names is .*odd"),
    "classes.txt": ("folder", {}, "classes.txt", r"no class table: .*classes\.txt"),
    "classes.txt, LabelMe": ("labelme", {}, "classes.txt", r".*classes\.txt"),
    "data.yaml, YOLO": ("yolo", {}, "data.yaml", r"no class table: .*data\.yaml"),
    "list of images": ("voc", {}, "ImageSets/Segmentation/train.txt", r".*Segmentation/train\.txt"),
    "config": ("mapillary-v2.0", {}, "config_v2.0.json", r".*config_v2\.0\.json"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", SIDE_FILES)
def test_no_file_beside_a_dataset_hangs_or_fills_the_memory(tmp_path: Path, name: str, kind: str) -> None:
    layout, settings, file, message = SIDE_FILES[name]
    config = DatasetConfig(**a_dataset(tmp_path, layout), **{key: str(tmp_path / value)  # type: ignore[arg-type]
                                                             for key, value in settings.items()})
    (tmp_path / "table.yaml").write_text("names: odd.txt\nclasses: [{name: a, names: [a]}]")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    make, what = ODD[kind]
    make(tmp_path / file)
    tracemalloc.start()
    try:
        with pytest.raises((ConfigError, DatasetError), match=f"{message}.* ?{what}"):
            open_dataset(config, "fail")
        assert tracemalloc.get_traced_memory()[1] < 40 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_the_largest_text_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    config = DatasetConfig(**a_dataset(tmp_path, "folder"))
    (tmp_path / "classes.txt").write_text("a\nb" + " " * (LARGEST_TEXT - 3))
    assert [item.name for item in open_dataset(config, "fail").classes] == ["a", "b"]
    with (tmp_path / "classes.txt").open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match=rf"txt has {LARGEST_TEXT + 1} bytes, legal: at most {LARGEST_TEXT} for a "):
        open_dataset(config, "fail")
    (tmp_path / "data.yaml").write_text("names: [a]\n" + " " * LARGEST_YAML)
    with pytest.raises(ConfigError, match=rf"yaml has {LARGEST_YAML + 11} characters, legal: at most {LARGEST_YAML}"):
        open_dataset(replace(config, kind="yolo"), "fail")
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_plain_text(path) == "a\nb\nc\n"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_root_that_is_neither_folder_nor_file_is_named(tmp_path: Path, kind: str) -> None:
    make, what = ODD[kind]
    make(tmp_path / "root")
    with pytest.raises(DatasetError, match=f"dataset.root: .*root {what}, which is a zip archive, or a folder"):
        open_dataset(DatasetConfig(kind="folder", root=str(tmp_path / "root")), "fail")


@pytest.mark.parametrize("kind", ODD)
def test_a_configuration_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    make, what = ODD[kind]
    make(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=rf"configuration file .*c\.yaml {what}"):
        load_config(PreprocessConfig, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"configuration file .*none\.yaml does not exist"):
        load_config(PreprocessConfig, tmp_path / "none.yaml")


def test_many_keys_are_compared_in_linear_time(tmp_path: Path) -> None:
    """As a list, 30,000 keys took a minute."""
    lines = [f"k{number}: 1\n" for number in range(30_000)]
    (tmp_path / "c.yaml").write_text("".join(lines))
    with pytest.raises(ConfigError, match="unknown key 'k0'"):
        load_config(PreprocessConfig, tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("".join([*lines, lines[7]]))
    with pytest.raises(ConfigError, match="found duplicate key k7"):
        load_config(PreprocessConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_drawing_scenes_reads_no_odd_class_list(tmp_path: Path, kind: str) -> None:
    make, what = ODD[kind]
    make(tmp_path / "classes.txt")
    with pytest.raises(StorageError, match=rf"classes\.txt {what}"):
        write_scenes(tmp_path, {"train": 1}, seed=0)


def test_a_whole_file_has_a_limit(tmp_path: Path) -> None:
    make_sparse(tmp_path / "photo.jpg")
    with pytest.raises(StorageError, match=rf"photo\.jpg has {60 << 30} bytes, legal: at most 9 "):
        read_plain(tmp_path / "photo.jpg", 9)


def test_verify_holds_a_piece_and_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = jpeg(64, 64) + bytes(2 * MEGABYTE)  # decoders stop at the image's end
    write_set(tmp_path, [[padded] * 32])
    monkeypatch.setattr(sys.modules["shards.verify"], "_PIECE", 4 * MEGABYTE)  # `shards.verify` is the function
    asked: list[int] = []

    class Watched(LocalStorage):
        def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            if name.endswith(".tar"):
                assert length is not None
                asked.append(length)
            return super().read(name, offset, length)

    tracemalloc.start()
    try:
        assert verify(Watched(tmp_path)) == []
        assert tracemalloc.get_traced_memory()[1] < 16 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert max(asked) == 4 * MEGABYTE and sum(asked) == (tmp_path / "train-000000.tar").stat().st_size > 64 * MEGABYTE


@pytest.mark.parametrize(("shift", "message"), [
    (512, "the index has a gap or an overlap at byte"),
    (-512, "the index has a gap or an overlap at byte"),
])
def test_verify_in_one_pass_finds_holes_and_overlaps(tmp_path: Path, shift: int, message: str) -> None:
    write_set(tmp_path, [[jpeg(64, 64)] * 3])
    index = np.fromfile(tmp_path / "train.index", INDEX_DTYPE)
    index["offset"][1] = int(index["offset"][1]) + shift
    write_manifest(tmp_path, shards_of(tmp_path), index.tobytes(), 3, (64, 64))
    problems = verify(tmp_path)
    assert "sample 1 (offset" in problems[0] and message in problems[0]
    assert not any("sample 0" in problem or "its sha256" in problem for problem in problems)


def test_samples_beyond_four_gigabytes_are_read(tmp_path: Path) -> None:
    write_set(tmp_path, [[jpeg(64, 64)] * 2])
    path = tmp_path / "train-000000.tar"
    (shard,), index = shards_of(tmp_path), np.fromfile(tmp_path / "train.index", INDEX_DTYPE)
    content, far = path.read_bytes(), 5 << 30
    with path.open("r+b") as file:  # sparse
        file.truncate(far)
        file.seek(far)
        file.write(content)
    index["offset"] += far
    write_manifest(tmp_path, [replace(shard, bytes=far + len(content))], index.tobytes(), 2, (64, 64))
    reader = ShardReader(tmp_path, "train")
    assert [reader.read(number).key for number in (1, 0)] == ["0-1", "0-0"]
    assert reader.place(1).offset > 2**32
    reader.close()


def test_an_index_with_a_sample_that_nothing_can_hold_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, [[jpeg(64, 64)] * 2])
    path = tmp_path / "train-000000.tar"
    os.truncate(path, 60 << 30)
    index = np.fromfile(tmp_path / "train.index", INDEX_DTYPE)
    index["length"][1] = 3 << 30
    shard = replace(shards_of(tmp_path)[0], bytes=60 << 30)
    write_manifest(tmp_path, [shard], index.tobytes(), 2, (64, 64))
    with pytest.raises(CorruptShardError, match=rf"train\.index: sample 1 has length {3 << 30}, legal: at most"):
        ShardReader(tmp_path, "train")


def test_tar_sizes_that_our_writer_never_makes_are_refused(tmp_path: Path) -> None:
    """Other writers use base-256 sizes from 8 GiB on; no sample is that large."""
    from shards.reader import parse_span

    write_set(tmp_path, [[jpeg(64, 64)]])
    span = bytearray((tmp_path / "train-000000.tar").read_bytes()[:-1024])
    for size in (b"\x80" + (9 << 30).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0", b"-0000000001\0"):
        span[124:136] = size
        with pytest.raises(CorruptShardError, match=r"bad tar header|is truncated"):
            parse_span(bytes(span), "here")


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("x", b"old")
    assert storage.read("x", 0, 3) == b"old"
    storage.write("x", b"new")
    assert storage.read("x", 0, 3) == b"new"
    storage.close()


def test_a_pipe_in_the_place_of_a_run_s_files_hangs_nobody(tmp_path: Path) -> None:
    from trainer.reporting.state import read_state
    from trainer.run.folder import is_used

    for name in ("state.json", ".lock"):
        os.mkfifo(tmp_path / name)
    assert is_used(tmp_path) is None
    with pytest.raises(StorageError, match=r"state\.json is a named pipe, legal: a regular file"):
        read_state(tmp_path)


# -- what the manifest says of its splits ----------------------------------------------------------------------------


def change(root: Path, split: str, crops: dict[str, Any] | None = None, **fields: Any) -> None:
    """Change fields of a split, and settings of the crops, so that the manifest is valid."""
    manifest = load_manifest(root)
    settings = {**manifest.crops, **(crops or {})}
    changed = replace(manifest, splits={**manifest.splits, split: replace(manifest.splits[split], **fields)},
                      crops=settings, config={**manifest.config, "crops": settings})
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(changed))


CROPS = "but 24 samples and crops.per_image 2 need images x per_image = samples [+] skipped_crops"
IMAGES = "but 5 samples of kind images are one per image, and none is a crop"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "images of crops": ("train", {"images": 13}, f"images is 13 and skipped_crops are 0, {CROPS}"),
    "skipped crops": ("train", {"skipped_crops": {"a": 1, "b": 2}}, f"images is 12 and skipped_crops are 3, {CROPS}"),
    "images": ("val", {"images": 6}, f"images is 6 and skipped_crops are 0, {IMAGES}"),
    "skipped crops of images": ("val", {"skipped_crops": {"a": 1}}, f"images is 5 and skipped_crops are 1, {IMAGES}"),
    "kind of crops": ("train", {"kind": "images"}, r"kind is images, but crops\.splits is \['train'\]"),
    "kind of images": ("val", {"kind": "crops"}, r"kind is crops, but crops\.splits is \['train'\]"),
    "ignored pixels": ("val", {"ignored_pixels": 7}, "ignored_pixels is 7, the samples have 0"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_total_of_a_split_is_compared(damaged: Path, name: str, workers: int) -> None:
    split, fields, message = WRONG[name]
    change(damaged, split, **fields)
    found = verify(damaged, workers=workers)
    assert any(re.search(rf"manifest\.json, split '{split}': {message}", problem) for problem in found), found
    if name != "ignored pixels":  # what needs no sample is compared without them too
        assert any(re.search(message, problem) for problem in verify(damaged, deep=False))


@pytest.mark.parametrize("field", ["class_pixels", "class_samples"])
def test_counts_of_classes_name_the_class(damaged: Path, field: str) -> None:
    counts = list(getattr(load_manifest(damaged).splits["val"], field))
    change(damaged, "val", classes=None, **{field: [counts[0], counts[1] - 1, counts[2] - 1, *counts[3:]]})
    (problem,) = verify(damaged)
    assert problem.endswith(f"split 'val': {field} of class 1 is {counts[1] - 1}, the samples have {counts[1]}, and 1 "
                            "more class counts differ")


def test_samples_show_what_kind_and_crops_are(damaged: Path) -> None:
    """Also where the manifest agrees with itself; one line for each shard, not for each sample."""
    whole = (damaged / MANIFEST_NAME).read_bytes()
    for split, crops, fields, message, shards in (
            ("train", {"splits": []}, {"kind": "images", "images": 24}, "a crop, by its meta, but .* kind images", 4),
            ("train", {"size": 65}, {}, "it is 64x64, but the manifest says crops of 65x65", 4),
            ("train", {"size": 32, "stored_size": 65}, {}, "it is 64x64, but the manifest says crops of 65x65", 4),
            ("train", {"per_image": 4}, {"skipped_crops": {"x": 24}},
             "its key is 'scene_train_00006-00[01]', but with crops.per_image 4 this shard has crop [23] of each", 2),
            ("val", {"splits": ["val"], "size": 16384}, {"kind": "crops", "images": 3, "skipped_crops": {"x": 1}},
             "it is a whole image, by its meta, but the manifest says kind crops", 1)):
        change(damaged, split, crops, **fields)
        found = [problem for problem in verify(damaged) if "sample 0 (offset 0)" in problem]
        assert sum(bool(re.search(message, problem)) for problem in found) == shards, (message, verify(damaged))
        (damaged / MANIFEST_NAME).write_bytes(whole)
    assert verify(damaged) == []


def test_crops_are_of_no_more_images_than_the_manifest_says(tmp_path: Path) -> None:
    """Of two images, each with one of two crops, a manifest makes one image, with both."""
    record, infos, index = encode_rle(np.zeros((64, 64), np.uint8)), [], b""
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for key in ("a-000", "b-000"):
            writer.write(key, jpeg(64, 64), "jpg", encode_sample(key, record, {}))
    infos.append(writer.info)
    index += writer.index.tobytes()
    write_manifest(tmp_path, infos, index, 2, (64, 64))
    change(tmp_path, "train", {"per_image": 2}, images=2, skipped_crops={"x": 2})
    assert verify(tmp_path) == []
    change(tmp_path, "train", images=1, skipped_crops={})
    (problem,) = verify(tmp_path)
    assert problem.endswith("split 'train': images is 1, the samples are of 2")


@pytest.mark.parametrize("version", [1, 2])
def test_blocks_and_numbers_of_shards_follow_from_the_images(damaged: Path, version: int) -> None:
    root = as_version_1(damaged) if version == 1 else damaged
    manifest = load_manifest(root)
    for most, message in ((100, "sources are of 2 blocks, but 12 images and 0 skipped ones, 100 to a block, are 1"),
                          (4, "sources are of 2 blocks, but 12 images and 0 skipped ones, 4 to a block, are 3")):
        changed = replace(manifest, config={**manifest.config, "images_per_shard": most})
        (root / MANIFEST_NAME).write_bytes(manifest_bytes(changed))
        assert any(message in problem for problem in verify(root))
    skipped = [{"image": f"{number}.jpg", "reason": "x"} for number in range(4)]
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    change(root, "train", skipped_images=skipped)  # unpaired, or in a block: nobody can tell
    assert verify(root) == []


def test_a_shard_beyond_the_last_block_is_named(damaged: Path) -> None:
    def renumber(records: np.ndarray) -> None:
        records["number"][-1] = 9

    (damaged / "train-000003.tar").rename(damaged / "train-000009.tar")
    edit_table(damaged, "train", renumber)
    assert any(problem.endswith("split 'train': there is a shard train-000009.tar, but 2 blocks of 2 shards are "
                                "numbered 0..3") for problem in verify(damaged))


def test_settings_of_crops_are_the_same_twice(damaged: Path) -> None:
    manifest = load_manifest(damaged)
    (damaged / MANIFEST_NAME).write_bytes(manifest_bytes(replace(manifest, crops={**manifest.crops, "tries": 11})))
    assert verify(damaged) == [f"{damaged / MANIFEST_NAME}: crops differs from config.crops"]


# -- several processes ------------------------------------------------------------------------------------------------


def test_several_processes_find_what_one_finds(scene_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    assert verify(root, workers=2) == []
    for name, place in (("train-000001.tar", 3000), ("train-000003.tar", 700)):
        data = bytearray((root / name).read_bytes())
        data[place] ^= 1
        (root / name).write_bytes(data)
    (root / ".train-000009.tar.4711.tmp").touch()
    seen: list[str] = []
    assert sorted(verify(root, seen.append, workers=2)) == sorted(verify(root)) != []
    assert sorted(seen) == [*[f"train-{number:06d}.tar" for number in range(4)], "val-000000.tar"]


def test_hashes_alone_find_every_changed_byte(scene_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    assert verify(root, deep=False) == []
    data = bytearray((root / "val-000000.tar").read_bytes())
    data[-1] ^= 1  # in the end-of-archive blocks
    (root / "val-000000.tar").write_bytes(data)
    (problem,) = verify(root, deep=False)
    assert problem.endswith("val-000000.tar does not match its sha256 in the manifest")


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, [[jpeg(64, 64)] * 2, [jpeg(64, 64)] * 2])
    with ShardWriter(tmp_path / "train-000001.tar") as writer:
        for key in ("0-1", "1-0"):
            writer.write(key, jpeg(64, 64), "jpg", encode_sample(key, encode_rle(np.zeros((64, 64), np.uint8)), {}))
    index = (tmp_path / "train.index").read_bytes()[:32] + writer.index.tobytes()
    write_manifest(tmp_path, [shards_of(tmp_path)[0], writer.info], index, 4, (64, 64))
    for workers in (1, 2):
        (problem,) = verify(tmp_path, workers=workers)
        assert problem.endswith("the key '0-1' occurs 2 times")


@pytest.mark.parametrize("name", ["train.index", "train.shards"])
def test_a_damaged_index_or_table_makes_no_shard_a_leftover(scene_shards: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    data = bytearray((root / name).read_bytes())
    data[5] ^= 1
    (root / name).write_bytes(data)
    problems = verify(root)
    assert problems and not any("leftover" in problem for problem in problems)


def test_a_killed_process_of_verify_is_one_line(scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    module = importlib.import_module("shards.verify")  # `shards.verify` is the function

    class Dying(module.ProcessPoolExecutor):
        def submit(self, *_: object) -> None:  # type: ignore[override]
            raise BrokenProcessPool("a child died")

    monkeypatch.setattr(module, "ProcessPoolExecutor", Dying)
    with pytest.raises(StorageError, match="a process that checked shards died"):
        verify(scene_shards, workers=2)
