"""The mask codec: exact bytes, round trips, malformed records, COCO exchange."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shards import rle as codec
from shards.coco import compress_counts, expand_counts, from_coco_rle, to_coco_rle
from shards.errors import CorruptShardError
from shards.rle import (
    MAX_SIDE,
    decode_header,
    decode_masks,
    decode_segment_map,
    encode_rle,
    label_map_from_segments,
)


def label_maps(max_label: int = 65534) -> st.SearchStrategy[np.ndarray]:
    """Maps with few values (long runs) or many (short runs), including ignored pixels."""
    shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))
    values = st.sampled_from([0, 1, 2, 200, 255, 256, 300, 65534, 65535])
    allowed = values.filter(lambda value: value <= max_label or value == 65535)
    return arrays.arrays(np.uint16, shapes, elements=allowed)


@given(label_maps())
@settings(max_examples=300, deadline=None)
def test_decoding_returns_what_was_encoded(label_map: np.ndarray) -> None:
    record = encode_rle(label_map, 65535)
    segment_map, labels = decode_segment_map(record)
    assert np.array_equal(label_map_from_segments(segment_map, labels, 65535), label_map)
    assert labels.tolist() == sorted(set(label_map[label_map != 65535].tolist()))


@given(label_maps())
@settings(max_examples=100, deadline=None)
def test_dense_masks_equal_comparing_the_label_map(label_map: np.ndarray) -> None:
    masks, labels = decode_masks(encode_rle(label_map, 65535))
    assert masks.dtype == bool and masks.shape == (labels.size, *label_map.shape)
    assert np.array_equal(masks, label_map[None] == labels[:, None, None])


@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_any_number_of_classes_in_one_crop(num_labels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label_map = rng.choice(65535, num_labels, replace=False)[rng.integers(0, num_labels, (40, 40))]
    segment_map, labels = decode_segment_map(encode_rle(label_map, 65535))
    assert segment_map.dtype == (np.uint8 if labels.size <= 255 else np.uint16)
    assert np.array_equal(labels[segment_map], label_map)


def test_the_record_is_what_the_docstring_draws() -> None:
    label_map = np.array([[7, 7, 255, 3], [3, 7, 7, 7]], np.uint8)
    record = encode_rle(label_map, 255)
    assert {name: record[name] for name in record if name != "data"} == {
        "height": 2, "width": 4, "labels": [3, 7], "runs": [1, 2], "gap_bytes": 1, "length_bytes": 1,
    }
    # class 3: pixels 3..4; class 7: pixels 0..1, then 5..7. Gaps 3 | 0 3, lengths 2 | 2 3.
    assert zlib.decompress(record["data"]) == bytes([3, 0, 3, 2, 2, 3])
    assert list(record)[-1] == "data"


def test_an_empty_map_has_no_labels_and_no_data() -> None:
    record = encode_rle(np.full((3, 5), 255, np.uint8), 255)
    assert record["labels"] == [] and record["data"] == b""
    segment_map, labels = decode_segment_map(record)
    assert (segment_map == 255).all() and labels.size == 0


def test_the_largest_crop_round_trips() -> None:
    label_map = np.zeros((MAX_SIDE, MAX_SIDE), np.uint8)
    label_map[-1, -1] = 9
    segment_map, labels = decode_segment_map(encode_rle(label_map, 255))
    assert labels.tolist() == [0, 9] and segment_map[-1, -1] == 1 and int((segment_map != 0).sum()) == 1


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (np.zeros((2, 2, 2), np.uint8), "integer array"),
        (np.zeros((2, 2), np.float32), "integer array"),
        (np.zeros((0, 2), np.uint8), "legal: 1 to 16384"),
        (np.full((2, 2), 65535, np.uint16), "legal: 0..65534"),
        (np.full((2, 2), -1, np.int64), "legal: 0..65534"),
    ],
)
def test_maps_that_cannot_be_encoded_are_refused(label_map: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_rle(label_map, 255)


def sound_record() -> dict[str, Any]:
    return encode_rle(np.array([[1, 1, 2, 2], [255, 2, 1, 1]], np.uint8), 255)


def with_runs(gaps: list[int], lengths: list[int], **fields: Any) -> dict[str, Any]:
    return sound_record() | {"data": zlib.compress(bytes(gaps + lengths))} | fields


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"height": 0}, "'height'"),
        ({"height": 10**9}, "'height'"),
        ({"width": "4"}, "'width'"),
        ({"width": True}, "'width'"),
        ({"labels": [2, 1]}, "ascending"),
        ({"labels": [1, 1]}, "ascending"),
        ({"labels": [1]}, "1 labels but 2 run counts"),
        ({"labels": [1, 65535]}, "'labels'"),
        ({"labels": None}, "'labels'"),
        ({"labels": "ab"}, "'labels'"),
        ({"runs": [2, 0]}, "'runs'"),
        ({"runs": [2.0, 2]}, "'runs'"),
        ({"runs": [8, 8]}, "16 runs for 8 pixels"),
        ({"gap_bytes": 5}, "'gap_bytes'"),
        ({"length_bytes": 0}, "'length_bytes'"),
        ({"data": b"not zlib"}, "cannot be inflated"),
        ({"data": "text"}, "expected bytes"),
        ({"data": b""}, "does not inflate to exactly"),
        ({"data": zlib.compress(bytes(7))}, "exactly 8 bytes"),
        ({"data": zlib.compress(bytes(10**7))}, "exactly 8 bytes"),  # a bomb: stopped after 9 bytes
        ({"data": zlib.compress(bytes(8)) + b"x"}, "exactly 8 bytes"),
        ({"data": zlib.compress(bytes(8))[:-2]}, "exactly 8 bytes"),
        (with_runs([0, 4, 2, 1], [2, 2, 2, 0]), "empty run"),
        (with_runs([0, 0, 2, 1], [2, 2, 2, 1]), "touch"),
        (with_runs([0, 4, 2, 1], [2, 3, 2, 1]), "ends at pixel 9 of 8"),
        (with_runs([0, 4, 1, 1], [2, 2, 2, 1]), "overlapping"),
        ({"labels": [], "runs": []}, "no runs but carries data"),
    ],
)
def test_every_malformed_record_raises_the_documented_error(damage: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptShardError, match=message):
        decode_segment_map(sound_record() | damage)


def test_the_parametrised_damage_starts_from_a_sound_record() -> None:
    assert np.array_equal(decode_segment_map(with_runs([0, 4, 2, 1], [2, 2, 2, 1]))[0],
                          decode_segment_map(sound_record())[0])


@given(st.dictionaries(st.sampled_from(["height", "width", "labels", "runs", "gap_bytes", "length_bytes", "data"]),
                       st.one_of(st.none(), st.integers(), st.text(max_size=3), st.binary(max_size=40),
                                 st.lists(st.integers(-2, 70000), max_size=4), st.floats(), st.booleans())))
@settings(max_examples=500, deadline=None)
def test_arbitrary_fields_never_raise_anything_else(damage: dict[str, Any]) -> None:
    record = sound_record() | damage
    try:
        segment_map, labels = decode_segment_map(record)
    except CorruptShardError:
        return
    assert segment_map.shape == (record["height"], record["width"]) and labels.tolist() == record["labels"]


@given(st.binary(max_size=64), st.integers(0, 63))
@settings(max_examples=300, deadline=None)
def test_flipped_data_bytes_never_raise_anything_else(noise: bytes, position: int) -> None:
    record = sound_record()
    data = bytearray(record["data"])
    data[position % len(data) : position % len(data) + len(noise)] = noise
    with contextlib.suppress(CorruptShardError):
        decode_segment_map(record | {"data": bytes(data)})


def test_the_header_needs_no_runs() -> None:
    record = sound_record()
    del record["data"]
    header = decode_header(record)
    assert header.labels.tolist() == [1, 2] and header.run_counts.tolist() == [2, 2]


def test_an_ignore_index_that_is_a_class_is_refused() -> None:
    segment_map, labels = decode_segment_map(sound_record())
    with pytest.raises(ValueError, match="ignore_index 2 is a class"):
        label_map_from_segments(segment_map, labels, 2)


@given(label_maps())
@settings(max_examples=100, deadline=None)
def test_coco_strings_equal_those_of_pycocotools(label_map: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    record = encode_rle(label_map, 65535)
    for rle in to_coco_rle(record):
        mask = np.asfortranarray(label_map == rle["category_id"], np.uint8)
        assert rle["counts"] == coco.encode(mask)["counts"] and rle["size"] == list(label_map.shape)
    assert from_coco_rle(to_coco_rle(record), label_map.shape) == record


def test_coco_import_takes_uncompressed_counts_and_text() -> None:
    as_list = [{"category_id": 4, "size": [2, 3], "counts": [1, 2, 3]}]
    as_text = [as_list[0] | {"counts": compress_counts([1, 2, 3]).decode()}]
    assert from_coco_rle(as_list) == from_coco_rle(as_text)
    label_map = label_map_from_segments(*decode_segment_map(from_coco_rle(as_list)), 255)
    assert label_map.tolist() == [[255, 4, 255], [4, 255, 255]]  # pixels 1 and 2 down the columns


@given(st.lists(st.integers(0, 2**28), max_size=30))
def test_coco_count_strings_round_trip(counts: list[int]) -> None:
    assert expand_counts(compress_counts(counts)) == counts


@pytest.mark.parametrize(
    ("rles", "message"),
    [
        ([], "no COCO mask"),
        ([{"category_id": 1, "size": [2, 2], "counts": [0, 3, 3]}], "do not fit"),
        ([{"category_id": 1, "size": [2, 2], "counts": [0, 2]}, {"category_id": 2, "size": [2, 2], "counts": [1, 2]}],
         "overlaps"),
        ([{"category_id": 1, "size": [2, 2], "counts": [0, 2]}] * 2, "same category_id"),
        ([{"category_id": 1, "size": [2, 2], "counts": "\x01"}], "illegal byte"),
        ([{"category_id": 1, "size": [2, 2], "counts": "P"}], "inside a number"),
        ([{"category_id": 1, "size": [0, 2], "counts": [0]}], "legal: .height, width., 1 to"),
        ([{"category_id": 1, "size": [2], "counts": [0]}], "legal: .height, width., 1 to"),
        ([{"category_id": 1, "size": [2, 2], "counts": [0, 2**62, 2**62, 2**62, 2**62]}], "integers from 0 to 4"),
        ([{"category_id": 1, "size": [2, 2], "counts": ["a"]}], "integers from 0 to 4"),
        ([{"category_id": 1, "size": [2, 2]}], "integers from 0 to 4"),
        ([{"category_id": 65535, "size": [2, 2], "counts": [4]}], "category_id values are .65535., legal"),
        ([{"size": [2, 2], "counts": [4]}], "category_id values are .None., legal"),
    ],
)
def test_bad_coco_masks_are_refused(rles: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CorruptShardError, match=message):
        from_coco_rle(rles)


@given(arrays.arrays(np.uint16, (7, 11), elements=st.integers(0, 300)), st.integers(0, 400))
@settings(max_examples=50, deadline=None)
def test_values_counted_in_pieces_are_those_counted_at_once(label_map: np.ndarray, least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_PIECE", 10)
        found = codec.count_values(label_map, least)
    assert found.tolist() == np.bincount(label_map.reshape(-1), minlength=least).tolist()
