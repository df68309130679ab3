"""A reader passed to new processes: they share its arrays and do not receive the manifest."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import shard_table
from shards.errors import CorruptShardError, ShardError
from shards.files.storage import LocalStorage
from shards.manifest import INDEX_DTYPE, MANIFEST_NAME, load_manifest, manifest_bytes, parse_manifest
from shards.mirror import copy_set
from shards.reader import ShardReader, iter_samples
from shards.verify import verify
from tests.conftest import make_shards
from tests.support.hand_made import as_version_1, edit_table, jpeg, shards_of, write_manifest, write_set

_reader: ShardReader


def start(reader: ShardReader) -> None:
    global _reader
    _reader = reader


def look(number: int) -> dict[str, Any]:
    """What a process sees of the reader it was started with."""
    had_manifest = _reader._manifest is not None
    place, sample = _reader.place(number), _reader.read(number)
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else "maskstream-shards"
    return {"key": sample.key, "place": tuple(place), "classes": (_reader.num_classes, _reader.ignore_index),
            "bytes": _reader.bytes_of([number, 0]), "length": len(_reader), "had_manifest": had_manifest,
            "still_none": _reader._manifest is None, "shared": "maskstream-shards" in maps, "info": _reader.info}


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_new_process_shares_the_arrays_and_reads_the_same(scene_shards: Path, method: str) -> None:
    reader = ShardReader(scene_shards, "train")
    with ProcessPoolExecutor(1, multiprocessing.get_context(method), start, (reader,)) as pool:
        seen = pool.submit(look, 13).result(60)
    assert seen["shared"] and not seen["had_manifest"] and seen["still_none"], "reading takes no manifest"
    assert seen["key"] == reader.read(13).key and seen["place"] == tuple(reader.place(13))
    assert seen["bytes"] == reader.bytes_of([13, 0]) and seen["length"] == 24
    assert seen["classes"] == (reader.manifest.num_classes, 255)
    assert seen["info"] == reader.info, "who asks for it gets it"
    reader.close()


@contextmanager
def spawning() -> Iterator[list[int]]:
    """Pickle as if starting a process; collects the descriptors that it would receive."""
    given: list[int] = []

    class Popen:
        def duplicate_for_child(self, descriptor: int) -> int:
            given.append(descriptor)
            return descriptor

        def DupFd(self, descriptor: int) -> int:
            given.append(descriptor)
            return descriptor

    context.set_spawning_popen(Popen())  # type: ignore[arg-type]
    try:
        yield given
    finally:
        context.set_spawning_popen(None)


def test_what_a_new_process_is_sent_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 2000):
        root = write_set(tmp_path / str(count), [[jpeg(64, 64)]])
        (shard,) = shards_of(root)
        shards = [replace(shard, name=f"train-{number:06d}.tar") for number in range(count)]
        for other in shards[1:]:
            (root / other.name).symlink_to(shard.name)
        write_manifest(root, shards, (root / "train.index").read_bytes() * count, count, (64, 64))
        reader = ShardReader(root, "train")
        with spawning() as given:
            sizes += [len(ForkingPickler.dumps(reader)) for _ in range(2)]
        assert len(set(given)) == 1, "one file, made once"
        assert os.fstat(given[0]).st_size > 68 * count
        assert reader.read(count - 1).key == "0-0", "the parent reads from it too"
        assert len(ForkingPickler.dumps(reader)) > 68 * count, "elsewhere a pickle is whole"
        reader.close()
    assert max(sizes) < 3000


def test_where_no_file_can_be_shared_the_arrays_are_sent(scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no such thing here")

    reader = ShardReader(scene_shards, "train")
    monkeypatch.setattr(os, "memfd_create", refuse)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, (reader,)) as pool:
        seen = pool.submit(look, 13).result(60)
    assert seen["key"] == reader.read(13).key and not seen["shared"] and not seen["had_manifest"]
    reader.close()


# -- tables that cannot be trusted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "value", "message"), [
    ("number", 0, "numbers of shards are not ascending"),
    ("samples", 7, r"the shards hold 25 samples, the manifest says 24"),
    ("samples", 2**32 - 1, "fewer than 2048 bytes per sample"),
    ("bytes", 2**63, "their bytes do not add up"),
    ("bytes", 1000, "fewer than 2048 bytes per sample"),
])
def test_a_table_that_contradicts_itself_or_the_manifest(scene_shards: Path, tmp_path: Path, column: str, value: int,
                                                         message: str) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))

    def change(records: np.ndarray) -> None:
        records[column][1] = value

    edit_table(root, "train", change)
    with pytest.raises(CorruptShardError, match=message):
        ShardReader(root, "train")
    assert any(re.search(message, problem) for problem in verify(root))


def test_verify_compares_the_index_with_the_table(scene_shards: Path, tmp_path: Path) -> None:
    """Readers do so only where the index is large."""
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))

    def change(records: np.ndarray) -> None:
        records["index_crc32"][2] ^= 1

    edit_table(root, "train", change)
    (problem,) = verify(root)
    assert "train-000002.tar: its part of the index does not match its CRC-32" in problem


def test_a_table_of_another_set_is_refused(scene_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))

    def change(records: np.ndarray) -> None:
        records["sha256"] = records["sha256"][::-1].copy()

    edit_table(root, "train", change, fix=False)
    with pytest.raises(CorruptShardError, match=r"train\.shards: the table of shards does not match its size or"):
        ShardReader(root, "train")


# -- indexes in parts -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every index were large."""
    monkeypatch.setattr(shard_table, "WHOLE_INDEX", 0)
    monkeypatch.setattr(shard_table, "_PARTS_KEPT", 2)


@pytest.mark.usefixtures("in_parts")
def test_an_index_read_in_parts_gives_the_same_samples(scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(scene_shards, "train")
    assert reader.table.index is None
    whole = np.fromfile(scene_shards / "train.index", INDEX_DTYPE)
    for number in np.random.default_rng(0).permutation(24).tolist():
        assert reader.place(number)[1:] == (whole["offset"][number], whole["length"][number])
    numbers = [3, 4, 5, 6, 7, 20]
    assert reader.bytes_of(numbers) == whole["length"][numbers].sum()
    keys = [reader.read(number).key for number in range(24)]
    monkeypatch.undo()
    assert keys == [sample.key for sample in iter_samples(scene_shards, "train")]
    reader.close()


@pytest.mark.usefixtures("in_parts")
def test_a_part_of_the_index_is_checked_when_it_is_read(scene_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    index = bytearray((root / "train.index").read_bytes())
    index[16 * 13 + 3] ^= 1  # of the third shard
    (root / "train.index").write_bytes(index)
    reader = ShardReader(root, "train")
    assert reader.read(0).key and reader.read(23).key
    with pytest.raises(CorruptShardError, match=r"train\.index, part of train-000002\.tar: the index does not match"):
        reader.read(13)
    reader.close()
    assert any("train.index does not match its size or sha256" in problem for problem in verify(root))


@pytest.mark.usefixtures("in_parts")
def test_only_the_parts_in_use_are_read(scene_shards: Path) -> None:
    asked: list[tuple[int, int | None]] = []

    class Watched(LocalStorage):
        def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            if name == "train.index":
                asked.append((offset, length))
            return super().read(name, offset, length)

    reader = ShardReader(Watched(scene_shards), "train")
    for number in (13, 14, 13, 15):
        reader.read(number)
    assert asked == [(16 * 12, 16 * 6)]
    reader.close()


# -- version 1 --------------------------------------------------------------------------------------------------------


def test_a_set_of_version_1_is_read_verified_and_copied_as_it_is(scene_shards: Path, tmp_path: Path) -> None:
    old = as_version_1(Path(shutil.copytree(scene_shards, tmp_path / "old")))
    assert load_manifest(old).format_version == 1 and not (old / "train.shards").exists()
    for split in ("train", "val"):
        for one, other in zip(iter_samples(old, split), iter_samples(scene_shards, split), strict=True):
            assert one.key == other.key and one.image_bytes == other.image_bytes and one.payload == other.payload
    assert verify(old) == [] and verify(old, workers=2) == []
    copy_set(old, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == {
        path.name: path.read_bytes() for path in old.iterdir()}
    (old / "train-000001.tar").write_bytes(b"")
    assert any("train-000001.tar has 0 bytes, the manifest says" in problem for problem in verify(old))


def test_the_hash_of_a_version_1_manifest_is_what_it_was() -> None:
    """It is the identity of the data in checkpoints; recorded from the last release that wrote version 1."""
    text = (Path(__file__).parent.parent / "support" / "version_1_manifest.json").read_bytes()
    manifest = parse_manifest(text, "manifest.json")
    assert manifest_bytes(manifest) == text
    assert manifest.sha256 == json.loads(text)["manifest_sha256"]
    assert manifest.splits["train"].shards == len(json.loads(text)["splits"]["train"]["shards"])


def test_the_same_command_accepts_the_set_that_an_older_release_made(scenes: Path, tmp_path: Path) -> None:
    from preprocess.config import PreprocessConfig
    from preprocess.pairs import open_dataset
    from preprocess.pipeline import _planned, write_shards
    from shards.cli.config_file import load_config

    root = as_version_1(make_shards(tmp_path / "set", scenes))
    settings = ["dataset.kind=folder", f"dataset.root={scenes}", f"output={root}", "crops.size=64", "crops.per_image=2",
                "images_per_shard=6", "workers=0"]
    config = load_config(PreprocessConfig, None, settings)
    dataset = open_dataset(config.dataset, "fail")
    old = replace(load_manifest(root), config_hash=_planned(config, dataset, 1).set_hash)
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(old))
    assert write_shards(config, dataset) == (old, False)


def test_another_set_in_the_same_place_is_noticed_by_who_asks_late(scene_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    reader = ShardReader(root, "train")
    manifest = load_manifest(root)
    split = replace(manifest.splits["train"], index=replace(manifest.splits["train"].index, sha256="0" * 64))
    reader._manifest = None
    assert reader.info == manifest.splits["train"]
    reader._manifest = None
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(replace(manifest, splits={**manifest.splits, "train": split})))
    with pytest.raises(ShardError, match="has been replaced by another shard set since it was opened"):
        _ = reader.info
    reader.close()
