"""A reader passed to new processes: they share its arrays and do not receive the manifest."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ShardError
from shards.manifest import MANIFEST_NAME, load_manifest, manifest_bytes
from shards.reader import ShardReader
from tests.support.hand_made import jpeg, write_manifest, write_set

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
        (shard,) = load_manifest(root).splits["train"].shards
        shards = [replace(shard, name=f"train-{number:06d}.tar") for number in range(count)]
        for other in shards[1:]:
            (root / other.name).symlink_to(shard.name)
        write_manifest(root, shards, (root / "train.index").read_bytes() * count, count, (64, 64))
        reader = ShardReader(root, "train")
        with spawning() as given:
            sizes += [len(ForkingPickler.dumps(reader)) for _ in range(2)]
        assert len(set(given)) == 1, "one file, made once"
        assert os.fstat(given[0]).st_size > 100 * count
        assert reader.read(count - 1).key == "0-0", "the parent reads from it too"
        assert len(ForkingPickler.dumps(reader)) > 100 * count, "elsewhere a pickle is whole"
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
