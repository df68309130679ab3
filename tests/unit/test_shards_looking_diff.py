"""diff: each kind of difference is found and named, nothing is read without need, and the exit code is diff's."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ShardError
from shards.files.storage import open_storage
from shards.looking.comparison import SampleChanges, SplitComparison, class_changes, digests_of
from shards.manifest import MANIFEST_NAME, ClassInfo, canonical_json, hash_of, load_manifest
from shards.mirror import copy_set
from shards.reader import ShardReader
from shards.sample import encode_sample
from shards.shard_table import SampleIndex
from tests.conftest import make_shards
from tests.support import hand_made
from tests.support.hand_made import Labelled, png, write_labelled
from tests.support.shards_command import Done, shards_command

Command = Callable[..., Done]
NAMES = ["sky", "road", "tree"]


def sample(key: str, grey: int = 0, label: int = 0, size: tuple[int, int] = (8, 9)) -> Labelled:
    label_map = np.zeros(size, np.uint8)
    label_map[0] = label
    return key, png(np.full((*size, 3), grey, np.uint8)), label_map


BASE = [sample(f"k{number}", number, number % 3) for number in range(7)]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "a", {"val": BASE}, NAMES)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return shards_command(monkeypatch, capsys)


def compared(a: Path, b: Path, split: str = "val") -> SampleChanges:
    ours, theirs = ((open_storage(root), load_manifest(root)) for root in (a, b))
    return SplitComparison(ours, theirs, split).compare()


def numbers(found: SampleChanges) -> dict[str, list[int]]:
    return {name: getattr(found, name).tolist() for name in ("only_ours", "only_theirs", "image", "masks", "record")
            if getattr(found, name).size}


def replaced(**changed: Labelled | None) -> list[Labelled]:
    """BASE with samples replaced or left out, and new ones at the end."""
    kept = [changed.pop(item[0], item) for item in BASE]
    return [item for item in [*kept, *changed.values()] if item is not None]


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changed", "expected"), [
    ({}, {}),
    ({"k3": sample("k3", 99, 0)}, {"image": [3]}),
    ({"k3": sample("k3", 3, 2)}, {"masks": [3]}),
    ({"k3": sample("k3", 99, 2), "k5": sample("k5", 98, 2)}, {"image": [3, 5], "masks": [3]}),
    ({"k0": None, "k6": None, "new": sample("new")}, {"only_ours": [0, 6], "only_theirs": [5]}),
    ({"k0": sample("k0", 0, 0, (9, 8))}, {"image": [0], "masks": [0]}),  # one run of 72 pixels, as before
])
def test_samples_that_differ_are_found_by_key(a: Path, tmp_path: Path, changed: dict[str, Labelled | None],
                                              expected: dict[str, list[int]]) -> None:
    b = write_labelled(tmp_path / "b", {"val": replaced(**changed)}, NAMES)
    found = compared(a, b)
    assert numbers(found) == expected and not found.is_reordered
    theirs = compared(b, a)
    assert [theirs.only_ours.size, theirs.only_theirs.size] == [found.only_theirs.size, found.only_ours.size]
    assert theirs.image.size == found.image.size and theirs.masks.size == found.masks.size


def test_only_samples_without_a_counterpart_are_read(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other shards, so that no sha256 is equal; one sample differs.
    b = write_labelled(tmp_path / "b", {"val": replaced(k4=sample("k4", 77))}, NAMES, per_shard=3)
    read: list[tuple[str, int]] = []
    real = ShardReader.fetch
    monkeypatch.setattr(ShardReader, "fetch", lambda self, asked: read.extend(
        (self.storage.root, number) for number in asked) or real(self, asked))
    found = compared(a, b)
    assert read == [(str(a), 4), (str(b), 4)] and (found.skipped, found.read) == (6, 2)
    assert numbers(found) == {"image": [4], "masks": [4]}  # BASE's k4 has label 1


def test_equal_shards_are_not_even_indexed(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = write_labelled(tmp_path / "b", {"val": BASE}, NAMES, seed=1)

    def read(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(SampleIndex, "entries", read)
    monkeypatch.setattr(ShardReader, "fetch", read)
    assert compared(a, b).is_empty


def test_another_order_is_a_difference(a: Path, tmp_path: Path) -> None:
    b = write_labelled(tmp_path / "b", {"val": [BASE[1], BASE[0], *BASE[2:]]}, NAMES)
    assert compared(a, b).is_reordered and numbers(compared(a, b)) == {}
    swapped = write_labelled(tmp_path / "c", {"val": BASE[2:4] + BASE[:2] + BASE[4:]}, NAMES)  # whole shards
    assert compared(a, swapped).is_reordered and compared(a, swapped).read == 0
    changed = [(key, png(np.full((8, 9, 3), 50 + number, np.uint8)), label_map)
               for number, (key, _, label_map) in enumerate(BASE)]  # so that none is equal by checksum
    assert compared(a, write_labelled(tmp_path / "d", {"val": changed[::-1]}, NAMES)).is_reordered
    assert not compared(a, write_labelled(tmp_path / "e", {"val": changed}, NAMES)).is_reordered



def test_digests_see_masks_not_their_encoding(a: Path) -> None:
    reader = ShardReader(a, "val")
    one = reader.read(1)
    record = dict(one.record)
    packed = zlib.compress(zlib.decompress(record["data"]), 0)
    other = dataclasses.replace(one, record={**record, "data": packed})
    assert packed != record["data"] and digests_of(one) == digests_of(other)
    assert digests_of(one)[2] != digests_of(reader.read(2))[2]
    assert all(len(digest) == 16 and not digest.endswith(b"\0") for digest in digests_of(one))


def test_other_provenance_alone_is_told_apart(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_made, "encode_sample",
                        lambda key, record, meta: encode_sample(key, record, {"source": "elsewhere"}))
    found = compared(a, write_labelled(tmp_path / "b", {"val": BASE}, NAMES))
    assert numbers(found) == {"record": list(range(7))} and not found.is_empty


@pytest.mark.parametrize("per_shard", [1, 3, 50])
def test_random_changes_are_found_as_a_slow_comparison_finds_them(tmp_path: Path, per_shard: int) -> None:
    rng = np.random.default_rng(per_shard)
    ours = [sample(f"k{number}", int(rng.integers(3)), int(rng.integers(3))) for number in range(60)]
    theirs = [sample(key, int(rng.integers(3)), int(rng.integers(3))) if rng.random() < 0.4 else (key, image, labels)
              for key, image, labels in ours if rng.random() < 0.9]
    theirs += [sample(f"new{number}") for number in range(3)]
    a = write_labelled(tmp_path / "a", {"val": ours}, NAMES)
    b = write_labelled(tmp_path / "b", {"val": theirs}, NAMES, per_shard)
    other = {key: (image, labels) for key, image, labels in theirs}
    expected = {
        "only_ours": [number for number, item in enumerate(ours) if item[0] not in other],
        "only_theirs": [len(theirs) - 3, len(theirs) - 2, len(theirs) - 1],
        "image": [number for number, item in enumerate(ours) if item[0] in other and other[item[0]][0] != item[1]],
        "masks": [number for number, item in enumerate(ours)
                  if item[0] in other and not np.array_equal(other[item[0]][1], item[2])],
    }
    assert numbers(compared(a, b)) == expected


# -- classes and the command -------------------------------------------------------------------------------------------


def classes(*names: str) -> list[ClassInfo]:
    return [ClassInfo(name=name, color=(len(name), 0, 0)) for name in names]


@pytest.mark.parametrize(("theirs", "expected"), [
    (("sky", "road", "tree"), []),
    (("sky", "street", "tree"), ["class 1 'road' is renamed to 'street'"]),
    (("sky", "road", "tree", "car"), ["class 3 'car' is only in B"]),
    (("sky", "road"), ["class 2 'tree' is only in A"]),
    (("road", "sky", "tree"), ["class 'sky' has id 0 in A, 1 in B", "class 'road' has id 1 in A, 0 in B"]),
    (("car", "sky", "road", "tree"), ["class 'sky' has id 0 in A, 1 in B", "class 'road' has id 1 in A, 2 in B",
                                      "class 'tree' has id 2 in A, 3 in B", "class 0 'car' is only in B"]),
])
def test_classes_are_compared_by_name_and_id(theirs: tuple[str, ...], expected: list[str]) -> None:
    assert list(class_changes(classes(*NAMES), classes(*theirs))) == expected


def test_another_colour_is_a_difference() -> None:
    (line,) = class_changes(classes("sky"), [ClassInfo(name="sky", color=(255, 0, 16))])
    assert line == "class 'sky' has colour #030000 in A, #ff0010 in B"


def test_equal_sets_end_with_0_and_an_error_with_2(a: Path, tmp_path: Path, run: Command) -> None:
    copy = Path(shutil.copytree(a, tmp_path / "copy"))
    done = run("diff", a, copy)
    assert done.code == 0 and "equal" in done.out
    done = run("diff", a, tmp_path / "none")
    assert done.code == 2 and done.err.count("\n") == 1 and "is not a shard set" in done.err
    other = write_labelled(tmp_path / "other", {"val": replaced(k0=sample("k0", 9))}, NAMES)
    shard = other / "val-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"PNG", b"GNP"))
    done = run("diff", a, other)
    assert done.code == 2 and "val-000000.tar, sample 0" in done.err


def test_the_output_is_short_or_complete(a: Path, tmp_path: Path, run: Command) -> None:
    b = write_labelled(tmp_path / "b", {"val": BASE[:1], "extra": BASE}, ["sky", "street", "tree"], seed=5,
                       config={"crops": {"size": 64, "per_image": 2}})
    done = run("diff", a, b)
    assert done.code == 1 and done.out.endswith("different\n")
    for line in ("  seed: 0 in A, 5 in B\n", "  config.crops: nothing in A, ", "class 1 'road' is renamed to 'street'",
                 "split 'extra' is only in B: 7 samples", "  samples only in A: 6\n    'k1'\n", "and 1 more (--all)",
                 "    samples: 7 in A, 1 in B\n", "    road: 18 pixels in 2 samples in A, 0 in 0 in B\n"):
        assert line in done.out, (line, done.out)
    assert "'k6'" not in done.out and "'k6'" in run("diff", a, b, "--all").out
    manifests_only = run("diff", a, b, "--no-samples")
    assert manifests_only.code == 1 and "'k1'" not in manifests_only.out and "samples: 7 in A" in manifests_only.out


def test_keys_cannot_write_to_the_terminal(a: Path, tmp_path: Path, run: Command) -> None:
    b = write_labelled(tmp_path / "b", {"val": [*BASE, sample("k\x1b[2J\u202e")]}, NAMES)
    out = run("diff", a, b).out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[2J" in out


def test_other_shards_with_the_same_samples_are_different(a: Path, tmp_path: Path, run: Command) -> None:
    done = run("diff", a, write_labelled(tmp_path / "b", {"val": BASE}, NAMES, per_shard=3))
    assert done.code == 1 and "the same samples in other shards (4 in A, 3 in B)" in done.out


def test_whatever_differs_is_said(a: Path, tmp_path: Path, run: Command) -> None:
    """Not only what has a line of its own: any field of the manifest."""
    content = json.loads((a / MANIFEST_NAME).read_text())
    b = Path(shutil.copytree(a, tmp_path / "b"))
    val = content["splits"]["val"]
    splits = [{"val": {**val, "skipped_images": [{"image": "x", "reason": "y"}]}},
              {"val": {**val, "sources": {**val["sources"], "sha256": "3" * 64}}}]
    for change in ({"config_hash": "1" * 64}, {"producer": {"zlib": "2"}},
                   *({"splits": split} for split in splits)):
        changed = {**content, **change}
        changed.pop("manifest_sha256")
        changed["manifest_sha256"] = hash_of(changed)
        (b / MANIFEST_NAME).write_text(canonical_json(changed) + "\n")
        done = run("diff", a, b)
        assert done.code == 1 and len(done.out.splitlines()) > 3, done
        assert re.search(r"config_hash|source files|producer\.zlib|skipped|the manifests differ in: splits", done.out)


def test_sets_in_object_storage_compare(a: Path, tmp_path: Path, s3_root: str, run: Command) -> None:
    copy_set(a, s3_root)
    assert run("diff", a, s3_root).code == 0
    b = write_labelled(tmp_path / "b", {"val": replaced(k3=sample("k3", 99))}, NAMES)
    done = run("diff", s3_root, b)
    assert done.code == 1 and "samples with another image: 1\n    'k3'" in done.out


def test_a_sample_with_bad_masks_is_an_error_that_names_it(a: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_made, "encode_sample",
                        lambda key, record, meta: encode_sample(key, {**record, "data": b"x"}, meta))
    b = write_labelled(tmp_path / "b", {"val": BASE[:1]}, NAMES)
    with pytest.raises(ShardError, match=r"b, split 'val', sample 0: mask field 'data' does not inflate"):
        compared(a, b)


def test_real_sets_with_another_seed_differ_in_their_crops_only(scenes: Path, scene_shards: Path, tmp_path: Path,
                                                                run: Command) -> None:
    b = make_shards(tmp_path / "b", scenes, "seed=9")
    done = run("diff", scene_shards, b)
    assert done.code == 1 and "seed: 0 in A, 9 in B" in done.out and "split 'val'" not in done.out
    assert "samples with another image: 24" in done.out
