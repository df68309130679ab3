"""Classes mapped by name: mapping what is decoded equals decoding what is mapped, pixel for pixel."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.crops.drawing import CropRules
from shards.errors import ConfigError
from shards.rle import decode_header, decode_runs, decode_segment_map, encode_rle, ignore_value, segment_map_from_runs
from shards.sample import CropSample
from shards.sampling import ClassLists
from trainer.data.class_mapping import ClassMapping, described, map_classes
from trainer.data.online_crops import draw_labels
from trainer.data_config import SourceConfig

TARGET = ["sky", "grass", "road", "car"]


def mapped(names: list[str], classes: dict[str, str | None] | None = None, unmatched: str = "error",
           target: list[str] = TARGET) -> ClassMapping | None:
    config = SourceConfig(root="shards-b", classes=classes or {}, unmatched=unmatched)
    return map_classes(names, target, config, "data.sources[1]", "data.root (shards-a)")


# -- by name -------------------------------------------------------------------------------------------------


def test_equal_names_need_no_mapping_in_any_order() -> None:
    assert mapped(TARGET) is None and mapped(TARGET[:2]) is None
    for names in (["car", "sky"], TARGET[::-1]):
        found = mapped(names)
        assert found is not None and [TARGET[number] for number in found.targets] == names
    found = mapped(["lawn", "tree", "grass"], {"lawn": "grass", "tree": None})
    assert found is not None and found.targets.tolist() == [1, -1, 1] and found.merges
    found = mapped(["tree", "sky"], unmatched="ignore")
    assert found is not None and found.targets.tolist() == [-1, 0] and not found.merges
    swapped = mapped(["sky", "grass"], {"sky": "grass", "grass": "sky"})
    assert swapped is not None and swapped.targets.tolist() == [1, 0], "classes come before equal names"


@pytest.mark.parametrize(("names", "classes", "unmatched", "message"), [
    (["sky", "gras", "sea"], {}, "error", "2 of 3 classes of data.sources[1] (shards-b) are not among those of "
     "data.root (shards-a): 'gras' (did you mean 'grass'?), 'sea'. List them in data.sources[1].classes as {its name"),
    (["Sky"], {}, "ignore", "no class of data.sources[1] (shards-b) is among those of data.root (shards-a)"),
    (["sky"], {"sky": None}, "error", "so all of its pixels would be ignored; set data.sources[1].classes"),
    (["sky", "lawn"], {"lawn": "gras"}, "ignore",
     "data.sources[1].classes: data.root (shards-a) has no class of this value's name: 'gras' (did you mean 'grass'?)"),
    (["sky", "lawn"], {"law": "grass"}, "ignore",
     "data.sources[1].classes: data.sources[1] (shards-b) has no class of this key's name: 'law' (did you mean 'lawn'"),
    ([f"c{number}" for number in range(30)], {}, "error", "'c11' and 18 more. List them"),
])
def test_names_without_a_counterpart_are_named_with_the_nearest(
    names: list[str], classes: dict[str, str | None], unmatched: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mapped(names, classes, unmatched)


def test_a_mapping_is_described_in_a_line() -> None:
    names = ["sky", "lawn", "tree"]
    assert described(names, TARGET, mapped(names, {"lawn": "grass", "tree": None})) == \
        "3 classes: 1 of the same name, 1 mapped (lawn → grass), 1 ignored (tree)"
    assert described(TARGET, TARGET, None) == "4 classes"


# -- pixels --------------------------------------------------------------------------------------------------


@st.composite
def mappings(draw: st.DrawFn) -> tuple[ClassMapping, npt.NDArray[Any], npt.NDArray[Any]]:
    """(mapping of 3 or 600 classes to 2, 9 or 500, some merged and some ignored, a label map, the mapped label map)"""
    source, target = draw(st.sampled_from([3, 600])), draw(st.sampled_from([2, 9, 500]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    targets = rng.integers(-1, target, source)
    side = draw(st.sampled_from([3, 40]))
    labels = rng.integers(-1, source, (side, side))
    blocks = np.repeat(np.repeat(labels, 2, 0), 3, 1)
    label_map = np.where(blocks < 0, 65535, blocks).astype(np.uint16)
    expected = np.append(np.where(targets < 0, 65535, targets), 65535)[blocks].astype(np.uint16)
    return ClassMapping(targets, target), label_map, expected


def sample_of(label_map: npt.NDArray[Any]) -> CropSample:
    record = {"meta": {}, **encode_rle(label_map, 65535)}
    return CropSample(key="x", image_bytes=b"", image_suffix="png", record=record, header=decode_header(record),
                      payload=b"")


@given(mappings(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_mapping_what_is_decoded_equals_decoding_what_is_mapped(
    case: tuple[ClassMapping, npt.NDArray[Any], npt.NDArray[Any]], seed: int
) -> None:
    """Of stored crops and of crops drawn from whole images, whose 75 % rule counts mapped classes."""
    mapping, label_map, expected = case
    sample, other = sample_of(label_map), sample_of(expected)
    segment_map, labels = decode_segment_map(other.record)
    found, present = mapping.of_segment_map(sample.segment_map, sample.labels)
    assert found.dtype == segment_map.dtype and np.array_equal(found, segment_map) and np.array_equal(present, labels)
    runs, present = mapping.of_runs(decode_runs(sample.record, sample.header), sample.labels)
    again = segment_map_from_runs(*label_map.shape, *runs, ignore_value(present.size))
    assert np.array_equal(again, segment_map) and np.array_equal(present, labels)
    rules = CropRules(window=20, size=20, scaled_side="short", min_scale=0.5, max_scale=2, cat_max_ratio=0.75, tries=3)
    ours = draw_labels(sample, rules, np.random.default_rng(seed), mapping)
    theirs = draw_labels(other, rules, np.random.default_rng(seed))
    assert ours.crop == theirs.crop and np.array_equal(ours.labels, theirs.labels)
    assert ours.segment_map.dtype == theirs.segment_map.dtype and np.array_equal(ours.segment_map, theirs.segment_map)


def test_counts_and_lists_are_of_the_networks_classes() -> None:
    mapping = ClassMapping(np.array([1, -1, 1, 0]), 3)
    assert mapping.of_counts([5, 7, 2, 1]).tolist() == [1, 7, 0]
    lists = mapping.of_lists(ClassLists.of([[0, 1, 2], [1], [], [0, 3], [2]]))
    assert lists.counts.tolist() == [1, 0, 0, 2, 1] and lists.ids.tolist() == [1, 0, 1, 1]
    assert lists.counts.dtype == lists.ids.dtype == np.uint16
