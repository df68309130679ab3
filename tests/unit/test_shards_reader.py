"""Samples, tar writer, manifest, reader, verify: what was written is read back, or an error says where it is
damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards.errors import CorruptShardError, FormatVersionError, ShardError
from shards.files.atomic import write_atomically
from shards.manifest import INDEX_DTYPE, MANIFEST_NAME, hash_of, load_manifest, manifest_bytes
from shards.reader import ShardReader, iter_samples
from shards.rle import encode_rle
from shards.sample import decode_sample, encode_sample, member_stem, read_header
from shards.verify import verify
from shards.writer import ShardWriter


def payload(key: str = "a") -> bytes:
    return encode_sample(key, encode_rle(np.array([[0, 1], [1, 255]], np.uint8)), {"source": "a.jpg"})


@pytest.fixture
def damaged(scene_shards: Path, tmp_path: Path) -> Path:
    """A copy of the scene set that the test may damage."""
    return Path(shutil.copytree(scene_shards, tmp_path / "set"))


# -- samples ------------------------------------------------------------------------------------------------


def test_sample_payload_round_trips_and_its_header_reads_alone() -> None:
    record, own = decode_sample(payload("näme.with.dots"))
    assert own.labels.tolist() == [0, 1] and record["key"] == "näme.with.dots" and record["meta"] == {"source": "a.jpg"}
    key, header = read_header(payload("k"))
    assert key == "k" and header.labels.tolist() == [0, 1]
    cut = payload("k")[: payload("k").index(b"data") + 4]  # nothing of the runs is there
    assert read_header(cut)[1].run_counts.tolist() == header.run_counts.tolist()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": 2}, FormatVersionError),
        ({"format": "1"}, CorruptShardError),
        ({"key": ""}, CorruptShardError),
        ({"key": 3}, CorruptShardError),
        ({"meta": None}, CorruptShardError),
        ({"height": -1}, CorruptShardError),
    ],
)
def test_bad_sample_fields_are_refused(change: dict[str, Any], error: type[Exception]) -> None:
    record = msgpack.packb(msgpack.unpackb(payload()) | change)
    with pytest.raises(error):
        decode_sample(record)
    with pytest.raises(error):
        read_header(record)


@given(st.binary(max_size=80), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_damaged_payloads_raise_only_the_documented_error(noise: bytes, position: int) -> None:
    data = bytearray(payload())
    data[position % len(data) : position % len(data) + len(noise)] = noise
    for decode in (decode_sample, read_header):
        with contextlib.suppress(ShardError):
            decode(bytes(data))


@given(st.lists(st.text(min_size=1, max_size=200), min_size=2, max_size=2, unique=True))
def test_member_names_are_one_to_one_plain_and_short(keys: list[str]) -> None:
    try:
        stems = [member_stem(key) for key in keys]
    except UnicodeEncodeError:  # lone surrogates are no file names
        return
    assert stems[0] != stems[1]
    for stem in stems:
        assert len(stem) <= 90 and stem.isascii() and "." not in stem and "/" not in stem


# -- writer -------------------------------------------------------------------------------------------------


def write_two(path: Path) -> ShardWriter:
    with ShardWriter(path) as writer:
        writer.write("a.v1", b"jpeg bytes", "jpg", payload("a.v1"))
        writer.write("b", b"png", "png", payload("b"))
    return writer


def test_shard_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    first, second = write_two(tmp_path / "x.tar"), write_two(tmp_path / "y.tar")
    assert first.info.sha256 == second.info.sha256
    data = (tmp_path / "x.tar").read_bytes()
    assert hashlib.sha256(data).hexdigest() == first.info.sha256 and len(data) == first.info.bytes
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == ["a%2Ev1.jpg", "a%2Ev1.mp", "b.png", "b.mp"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    for offset, length, _ in first.index.tolist():
        assert tarfile.TarInfo.frombuf(data[offset : offset + 512], "ascii", "strict").isreg() and length % 512 == 0


def test_an_exception_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x.tar") as writer:
        writer.write("a", b"", "jpg", payload())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_repeated_keys_and_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    for bad, message in ((("a", b"", "jpg", payload()), "twice"), (("c", b"", "gif", payload()), "suffix")):
        with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "x.tar") as writer:
            writer.write("a", b"", "jpg", payload())
            writer.write(*bad)


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# -- reader -------------------------------------------------------------------------------------------------


def test_iter_samples_yields_verified_samples_in_storage_order(scene_shards: Path) -> None:
    samples = list(iter_samples(scene_shards, "val"))
    assert [sample.key for sample in samples] == [f"scene_val_{i:05d}" for i in range(5)]
    for sample in samples:
        assert sample.image.dtype == np.uint8 and sample.image.shape[2] == 3
        assert sample.segment_map.shape == sample.image.shape[:2] == sample.label_map().shape
        assert set(np.unique(sample.label_map())) - {255} == set(sample.labels.tolist())
        assert np.array_equal(sample.masks().argmax(0)[sample.segment_map != 255],
                              sample.segment_map[sample.segment_map != 255])


def test_samples_can_be_read_in_any_order_by_number(scene_shards: Path) -> None:
    in_order = [sample.key for sample in iter_samples(scene_shards, "train")]
    reader = pickle.loads(pickle.dumps(ShardReader(scene_shards, "train")))  # noqa: S301 - as for spawned workers
    assert len(reader) == len(in_order) == 24
    for number in np.random.default_rng(0).permutation(24).tolist():
        assert reader.read(number).key == in_order[number]
    with pytest.raises(IndexError, match=r"0\.\.23"):
        reader.read(24)


def test_whole_images_keep_their_original_bytes(scenes: Path, scene_shards: Path) -> None:
    for sample in iter_samples(scene_shards, "val"):
        assert sample.image_bytes == (scenes / "images" / "val" / f"{sample.key}.jpg").read_bytes()


def test_stock_webdataset_reads_our_shards(scene_shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    reader = ShardReader(scene_shards, "train")
    urls = [str(scene_shards / shard.name) for shard in reader.table]
    with warnings.catch_warnings():  # webdataset leaves shard files for the garbage collector to close
        warnings.simplefilter("ignore", ResourceWarning)
        found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(found) == len(reader)
    for number, item in enumerate(found):
        ours = reader.read(number)
        assert item["__key__"] == member_stem(ours.key)
        assert np.array_equal(np.asarray(item["jpg"]), ours.image)
        assert item["mp"]["labels"] == ours.labels.tolist() and item["mp"]["key"] == ours.key


# -- damage -------------------------------------------------------------------------------------------------


def test_verify_finds_a_sound_set_sound(scene_shards: Path) -> None:
    seen: list[str] = []
    assert verify(scene_shards, seen.append) == []
    assert len(seen) == 5


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_verify_finds_any_flipped_bit_in_any_file(scene_shards: Path, data: st.DataObject) -> None:
    files = sorted(path for path in scene_shards.iterdir())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    flipped = bytearray(original)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(flipped)
        assert verify(scene_shards), f"{path.name}, byte {position}"
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("keep", [0, 100, 512, 4096, -1024, -512, -1])
def test_a_cut_shard_is_found_by_verify_and_refused_by_the_reader(damaged: Path, keep: int) -> None:
    path = damaged / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    assert any("train-000001.tar" in problem for problem in verify(damaged))
    with pytest.raises(CorruptShardError, match=r"train-000001\.tar has \d+ bytes, the manifest says"):
        ShardReader(damaged, "train")


def test_a_missing_and_an_extra_shard_are_found(damaged: Path) -> None:
    (damaged / "val-000000.tar").rename(damaged / "val-000009.tar")
    problems = "\n".join(verify(damaged))
    assert "val-000000.tar cannot be read" in problems and "val-000009.tar is not in the manifest" in problems
    with pytest.raises(ShardError, match=r"val-000000\.tar is missing, but the manifest lists it"):
        ShardReader(damaged, "val")


def test_the_reader_refuses_a_damaged_sample_and_serves_the_others(damaged: Path) -> None:
    reader = ShardReader(damaged, "train")
    path = damaged / reader.table.name(0)
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar, sample 0 \(offset 0\): CRC-32"):
        reader.read(0)
    assert reader.read(1).key


def edit_manifest(root: Path, **changes: Any) -> None:
    content = json.loads((root / MANIFEST_NAME).read_bytes()) | changes
    content.pop("manifest_sha256")
    (root / MANIFEST_NAME).write_text(json.dumps(content | {"manifest_sha256": hash_of(content)}))


def test_manifests_that_cannot_be_trusted_are_refused(damaged: Path) -> None:
    path = damaged / MANIFEST_NAME
    original = path.read_bytes()
    manifest = load_manifest(damaged)
    assert manifest_bytes(manifest) == original
    splits = json.loads(original)["splits"]
    wrong_count = {**splits, "val": splits["val"] | {"samples": 6}}
    escaping = json.loads(original.replace(b'"val.shards"', b'"../val.shards"'))["splits"]
    for changes, error, message in (
        ({"format_version": 4}, FormatVersionError, "format_version 4, this code knows 1, 2 and 3"),
        ({"splits": wrong_count}, CorruptShardError, "the index has 80 bytes for 6 samples"),
        ({"splits": escaping}, CorruptShardError, "not a plain file name"),
        ({"classes": 3}, CorruptShardError, "has a missing or malformed field"),
        ({"splits": [1]}, CorruptShardError, "has a missing or malformed field"),
        ({"splits": {**splits, "val": splits["val"] | {"samples": "5"}}}, CorruptShardError,
             "splits.val.samples is '5', legal: a whole number"),
        ({"ignore_index": -1}, CorruptShardError, "ignore_index is -1, legal: a whole number from 0"),
            ({"ignore_index": 254}, CorruptShardError, "ignore_index 254 does not match the number"),
        ({"classes": [{"name": "a", "color": [300, 0, 0]}]}, CorruptShardError, "legal: three integers"),
    ):
        path.write_bytes(original)
        edit_manifest(damaged, **changes)
        with pytest.raises(error, match=message):
            load_manifest(damaged)
    for odd in (b'{"format_version": 1, "x": NaN}', b'{"format_version": 1, "x": "\\ud800"}', b"[]", b"{", b""):
        path.write_bytes(odd)
        with pytest.raises(CorruptShardError, match=r"manifest\.json"):
            load_manifest(damaged)
    path.write_bytes(original.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(CorruptShardError, match="manifest_sha256"):
        load_manifest(damaged)
    path.unlink()
    with pytest.raises(ShardError, match="not a shard set, or was not finished"):
        load_manifest(damaged)


def test_creating_refuses_a_name_that_is_taken_with_links_and_without(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linked", "renamed"):
        write_atomically(tmp_path / name, b"1", create=True)
        with pytest.raises(FileExistsError):
            write_atomically(tmp_path / name, b"2", create=True)
        assert (tmp_path / name).read_bytes() == b"1"

        def refuse(*_: object) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "renamed"]


@pytest.mark.parametrize(("offset", "length"), [(2**63 + 5, 100), (2**64 - 1, 2), (0, 2**32 - 1), (10**9, 1)])
def test_an_index_that_points_out_of_its_shard_is_refused(damaged: Path, offset: int, length: int) -> None:
    path, splits = damaged / "val.index", json.loads((damaged / MANIFEST_NAME).read_bytes())["splits"]
    index = np.frombuffer(path.read_bytes(), INDEX_DTYPE).copy()
    index[2]["offset"], index[2]["length"] = offset, length
    path.write_bytes(index.tobytes())
    splits["val"]["index"]["sha256"] = hashlib.sha256(index.tobytes()).hexdigest()
    edit_manifest(damaged, splits=splits)
    with pytest.raises(CorruptShardError, match=rf"val\.index: sample 2 has offset {offset} and length {length}"):
        ShardReader(damaged, "val")


def test_a_wrong_count_of_classes_is_found(damaged: Path) -> None:
    splits = json.loads((damaged / MANIFEST_NAME).read_bytes())["splits"]
    splits["val"]["class_pixels"][0] += 1
    edit_manifest(damaged, splits=splits)
    assert any("class_pixels of class 0 is" in problem for problem in verify(damaged))


def test_an_unknown_split_names_those_there_are(scene_shards: Path) -> None:
    with pytest.raises(ShardError, match="no split 'test', it has: train, val"):
        ShardReader(scene_shards, "test")


def test_public_names_are_complete() -> None:
    public = {name for name in vars(shards) if not name.startswith("_")} - {
        name for name, value in vars(shards).items() if type(value).__name__ == "module"
    }
    assert sorted(public) == sorted(set(shards.__all__))
