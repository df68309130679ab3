"""Sampling by class: factors by hand, the plan's copies by a slow reference, the file of classes and its corruption."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError, CorruptShardError, ShardError
from shards.manifest import CLASS_DTYPE, MANIFEST_NAME, SplitInfo, load_manifest, manifest_bytes, parse_manifest
from shards.mirror import copy_set
from shards.plan import REPEAT_BITS, MicroBatchNumbers, PlannedSample, TrainPlan
from shards.read_ahead import ReadAhead
from shards.reader import ShardReader, iter_samples
from shards.sampling import ClassLists, cumulative_repeats, fixed_point
from shards.verify import verify
from tests.conftest import make_shards
from tests.support.hand_made import as_version_1, as_version_2, file_of
from tests.support.training_run import TINY, assert_same_end
from trainer.config import load_run_config
from trainer.data.crops import TrainCrops, TrainSource, train_plan
from trainer.data_config import DataConfig
from trainer.distributed import DistContext
from trainer.loop import train
from trainer.run.checkpoint import load_checkpoint
from trainer.seeding import sample_rng

ONE = 1 << REPEAT_BITS
FACTORS = st.lists(st.one_of(st.just(1.0), st.floats(0, 5)), min_size=1, max_size=30).filter(lambda r: sum(r) > 0.1)


def info_of(lists: ClassLists, classes: int) -> SplitInfo:
    counts = np.bincount(lists.ids, minlength=classes).tolist()
    samples = len(lists.counts)
    return SplitInfo(kind="crops", images=samples, samples=samples, shards=1, bytes=0, index=None,  # type: ignore[arg-type]
                     class_pixels=counts, class_samples=counts, ignored_pixels=0)


def factors_of(lists: ClassLists, classes: int, sampling: str, threshold: float = 0.5) -> list[float]:
    sums = cumulative_repeats(lists, info_of(lists, classes), sampling, threshold)
    assert sums is not None and sums.dtype == np.int64
    return (np.diff(sums, prepend=0) / ONE).tolist()


# -- how often ------------------------------------------------------------------------------------------------------


def test_repeat_factors_by_hand() -> None:
    """Of 8 samples, class 0 is in 8, class 1 in 2, class 2 in 1; t = 0.5: 1, sqrt(2), 2. They are scaled to add up to a
    whole number."""
    lists = ClassLists.of([[0], [0, 1], [0], [0, 1, 2], [0], [0], [0], [0]])
    found = factors_of(lists, 4, "repeat_factor")
    expected = [1, 2**0.5, 1, 2, 1, 1, 1, 1]
    assert sum(found) == 10  # 9.41, rounded up
    assert found == pytest.approx([value * 10 / sum(expected) for value in expected], abs=1e-5)
    assert cumulative_repeats(lists, info_of(lists, 4), "none", 0.5) is None


def test_frequent_classes_alone_repeat_nothing() -> None:
    lists = ClassLists.of([[0], [0], [], [0]])
    assert factors_of(lists, 3, "repeat_factor", 0.001) == [1, 1, 1, 1]


def test_class_balanced_by_hand() -> None:
    """Class 0 is in 3 samples, class 1 in 1: 1/3, 1/3, 1/3 + 1, and 0 for a sample without classes; times 4/2."""
    lists = ClassLists.of([[0], [0], [0, 1], []])
    assert factors_of(lists, 3, "class_balanced") == pytest.approx([2 / 3, 2 / 3, 8 / 3, 0], abs=2e-6)


@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=20).filter(any), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_factors_equal_a_slow_sum(samples: list[set[int]], threshold: float) -> None:
    lists = ClassLists.of([sorted(ids) for ids in samples])
    held = Counter(label for ids in samples for label in ids)
    repeats = [max([1.0, *((threshold * len(samples) / held[label]) ** 0.5 for label in ids)]) for ids in samples]
    found = factors_of(lists, 7, "repeat_factor", threshold)
    assert sum(found) == int(sum(found)) and min(found) >= 1 and sum(found) - sum(repeats) < 1 + 1e-4
    assert found == pytest.approx([value * sum(found) / sum(repeats) for value in repeats], abs=1e-4)
    shares = [sum(1 / held[label] for label in ids) for ids in samples]
    balanced = factors_of(lists, 7, "class_balanced")
    assert sum(balanced) == len(samples)
    assert balanced == pytest.approx([share * len(samples) / len(held) for share in shares], abs=1e-4)


def test_an_endless_epoch_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"an epoch would have 2e\+12 samples"):
        fixed_point(np.array([1e12, 1e12]))


# -- the plan -------------------------------------------------------------------------------------------------------


def plan_of(factors: list[float], shards: int = 3, batch: int = 2, seed: int = 0, lanes: int = 4, span: int = 3
            ) -> TrainPlan:
    sizes = [len(part) for part in np.array_split(np.arange(len(factors)), shards)]
    return TrainPlan(sizes, batch, seed, lanes, span, fixed_point(np.array(factors)))


@given(FACTORS, st.integers(1, 5), st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_each_epoch_repeats_a_sample_floor_or_ceil_of_its_factor(
        factors: list[float], shards: int, seed: int, lanes: int, span: int) -> None:
    """By exact fractions; copies are numbered, epochs equally long, and every position is in its own span."""
    plan = plan_of(factors, shards, seed=seed, lanes=lanes, span=span)
    assert plan.repeats is not None
    exact = [Fraction(int(value), ONE) for value in plan.repeats]
    assert exact[-1] == plan.epoch_size >= sum(factors) - 1e-3
    for epoch in range(3):
        found = [plan.sample_at(position) for position in range(epoch * plan.epoch_size, (epoch + 1) * plan.epoch_size)]
        offset = Fraction(plan._offset(epoch), ONE)
        floors = [0, *(int(value + offset) for value in exact)]
        expected = {PlannedSample(epoch, sample, copy) for sample in range(len(factors))
                    for copy in range(floors[sample + 1] - floors[sample])}
        assert len(found) == len(expected) and set(found) == expected
        for sample, before, after in zip(range(len(factors)), [Fraction(0), *exact[:-1]], exact, strict=True):
            count = floors[sample + 1] - floors[sample]
            assert int(after - before) <= count <= -int(-(after - before) // 1)
        for position in range(epoch * plan.epoch_size, (epoch + 1) * plan.epoch_size):
            assert plan.sample_at(position).sample in plan.samples(plan.span(position))
        spans = {plan.span(position) for position in range(epoch * plan.epoch_size, (epoch + 1) * plan.epoch_size)}
        assert Counter(number for one in spans for number in plan.samples(one).tolist()) == \
            Counter(draw.sample for draw in found)


def test_the_mean_number_of_copies_is_the_factor() -> None:
    factors = [1.0, 2.5, 0.25, 1.0, 3.25]
    plan = plan_of(factors)
    counts = Counter(plan.sample_at(position).sample for position in range(400 * plan.epoch_size))
    assert plan.epoch_size == 8
    assert [counts[number] / 400 for number in range(5)] == pytest.approx(factors, abs=0.08)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_global_batches_do_not_depend_on_the_ranks(world: int, turns: int, size: int, first: int) -> None:
    factors = [1.0, 3.5, 0.5, 2.0, 1.0, 1.0, 0.1]

    def batches(world: int, turns: int, size: int) -> list[list[PlannedSample]]:
        plan = pickle.loads(pickle.dumps(plan_of(factors, batch=size)))  # noqa: S301
        steps = [MicroBatchNumbers(first_step=first, last_step=first + 4, rank=rank, world_size=world,
                                   accumulation=turns) for rank in range(world)]
        by_number = {number: plan.micro_batch(number) for numbers in steps for number in numbers}
        flat = [draw for number in sorted(by_number) for draw in by_number[number]]
        return [flat[start : start + world * turns * size] for start in range(0, len(flat), world * turns * size)]

    assert batches(world, turns, size) == batches(1, 1, world * turns * size)


def test_factors_of_1_are_the_plan_without_sampling_and_wrong_ones_an_error() -> None:
    plain, ones = TrainPlan([4, 6], 4, 7, 2, 3), TrainPlan([4, 6], 4, 7, 2, 3, np.arange(1, 11) * ONE)
    assert [plain.sample_at(position) for position in range(30)] == [ones.sample_at(position) for position in range(30)]
    for wrong in (np.arange(1, 10) * ONE, np.zeros(10, np.int64)):
        with pytest.raises(ConfigError, match="repeats are of"):
            TrainPlan([4, 6], 4, 7, repeats=wrong)


def test_only_repeats_have_other_random_numbers() -> None:
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3, 0).random()
    assert len({sample_rng(1, 2, 3, repeat).random() for repeat in range(4)}) == 4


# -- the file -------------------------------------------------------------------------------------------------------


def test_a_set_lists_the_labels_of_each_sample(scene_shards: Path) -> None:
    for name, info in load_manifest(scene_shards).splits.items():
        lists = ClassLists.load(ShardReader(scene_shards, name).storage, info)
        labels = [sample.labels.tolist() for sample in iter_samples(scene_shards, name)]
        assert lists.tobytes() == ClassLists.of(labels).tobytes() == (scene_shards / f"{name}.classes").read_bytes()
        assert [lists.part(number, number + 1).ids.tolist() for number in range(len(labels))] == labels
    assert verify(scene_shards) == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["workers=2"], ["workers=3", "images_per_shard=6"]], ids=str)
def test_pieces_of_blocks_give_the_same_file(scenes: Path, scene_shards: Path, tmp_path: Path,
                                             settings: list[str]) -> None:
    made = make_shards(tmp_path / "set", scenes, *settings)
    for split in ("train", "val"):
        assert (made / f"{split}.classes").read_bytes() == (scene_shards / f"{split}.classes").read_bytes()
    assert (made / MANIFEST_NAME).read_bytes() == (scene_shards / MANIFEST_NAME).read_bytes()


def test_it_is_copied(scene_shards: Path, tmp_path: Path) -> None:
    copy_set(scene_shards, tmp_path / "copy")
    assert (tmp_path / "copy/val.classes").read_bytes() == (scene_shards / "val.classes").read_bytes()


def changed(root: Path, to: Path, change: Callable[[np.ndarray, int], Any], **fields: Any) -> Path:
    """A copy of a set with another list of the training samples' classes, in agreement with its manifest."""
    shutil.copytree(root, to)
    manifest = load_manifest(to)
    info = manifest.splits["train"]
    numbers = np.fromfile(to / "train.classes", CLASS_DTYPE)
    change(numbers, info.samples)
    info = replace(info, classes=file_of(to, "train.classes", numbers.tobytes()), **fields)
    (to / MANIFEST_NAME).write_bytes(manifest_bytes(replace(manifest, splits={**manifest.splits, "train": info})))
    return to


def first_grows(numbers: np.ndarray, samples: int) -> None:
    numbers[0] += 1


def falls(numbers: np.ndarray, samples: int) -> None:
    start = samples + int(numbers[:samples].argmax() and numbers[: numbers[:samples].argmax()].sum())
    numbers[start], numbers[start + 1] = numbers[start + 1], numbers[start]


def too_high(numbers: np.ndarray, samples: int) -> None:
    numbers[-1] = 60_000


def exchanged(numbers: np.ndarray, samples: int) -> None:
    """Two samples exchange their lists: all counts stay right."""
    counts, lists, start = numbers[:samples].copy(), [], samples
    for count in counts.tolist():
        lists.append(numbers[start : start + count].tolist())
        start += count
    other = next(number for number in range(1, samples) if lists[number] != lists[0])
    lists[0], lists[other] = lists[other], lists[0]
    numbers[:] = np.frombuffer(ClassLists.of(lists).tobytes(), CLASS_DTYPE)


@pytest.mark.parametrize(("change", "message"), [
    (first_grows, "counts do not add up"), (falls, "not ascending"), (too_high, "as often as class_samples"),
])
def test_a_list_that_cannot_be_is_refused(scene_shards: Path, tmp_path: Path, change: Any, message: str) -> None:
    root = changed(scene_shards, tmp_path / "set", change)
    reader = ShardReader(root, "train")
    with pytest.raises(CorruptShardError, match=rf"train.classes: .*{message}"):
        ClassLists.load(reader.storage, reader.info)
    assert any(message in problem for problem in verify(root))


def test_a_list_that_is_not_of_the_samples_is_found(scene_shards: Path, tmp_path: Path) -> None:
    root = changed(scene_shards, tmp_path / "set", exchanged)
    for workers in (1, 2):
        assert any("train.classes: the classes of sample 0 of train-000000.tar are" in problem
                   for problem in verify(root, workers=workers))
    assert verify(root, deep=False) == []


def test_damage_is_found(scene_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    data = bytearray((root / "train.classes").read_bytes())
    data[5] ^= 1
    (root / "train.classes").write_bytes(data)
    assert any("train.classes does not match its size or sha256" in problem for problem in verify(root))
    with pytest.raises(CorruptShardError, match="list of classes does not match its size or sha256"):
        train_plan(ShardReader(root, "train"), DataConfig(sampling="repeat_factor"), 2, 0)
    (root / "train.classes").unlink()
    with pytest.raises(ShardError, match=r"train.classes.*cannot be read"):
        train_plan(ShardReader(root, "train"), DataConfig(sampling="repeat_factor"), 2, 0)


def test_a_manifest_with_a_wrong_size_or_in_an_older_version_is_refused(scene_shards: Path) -> None:
    manifest = load_manifest(scene_shards)
    info = manifest.splits["train"]
    assert info.classes is not None
    wrong = replace(info, classes=replace(info.classes, bytes=info.classes.bytes + 2))
    content = manifest_bytes(replace(manifest, splits={**manifest.splits, "train": wrong}))
    with pytest.raises(CorruptShardError, match="the classes have"):
        parse_manifest(content, MANIFEST_NAME)


@pytest.mark.parametrize("older", [as_version_1, as_version_2], ids=["1", "2"])
def test_older_versions_are_read_but_not_sampled(scene_shards: Path, tmp_path: Path, older: Any) -> None:
    root = older(Path(shutil.copytree(scene_shards, tmp_path / "set")))
    assert verify(root) == []
    reader = ShardReader(root, "train")
    assert parse_manifest((root / MANIFEST_NAME).read_bytes(), "") == reader.manifest
    plan = train_plan(reader, DataConfig(), 2, 0)
    current = train_plan(ShardReader(scene_shards, "train"), DataConfig(), 2, 0)
    assert plan.repeats is None and plan.micro_batch(3) == current.micro_batch(3)
    with pytest.raises(ShardError, match=r"does not list the classes of its samples.*make it again"):
        train_plan(reader, DataConfig(sampling="repeat_factor"), 2, 0)


# -- training -------------------------------------------------------------------------------------------------------


def test_repeats_are_augmented_differently(scene_shards: Path) -> None:
    reader = ShardReader(scene_shards, "train")
    config = DataConfig(sampling="repeat_factor", sampling_threshold=1.0, workers=0)
    plan = train_plan(reader, config, 1, 0)
    assert plan.epoch_size > len(reader)
    crops, seen = TrainCrops([TrainSource(reader, plan)], config), dict[tuple[int, int], Any]()
    for number in range(plan.epoch_size):
        (draw,), batch = plan.micro_batch(number), crops[number]
        assert batch.keys == [reader.read(draw.sample).key]
        seen[draw.sample, draw.repeat] = batch.photometric
    repeated = {sample for sample, repeat in seen if repeat}
    assert repeated
    assert all(not torch.equal(seen[sample, 0], seen[sample, 1]) for sample in repeated)
    plan = train_plan(reader, DataConfig(workers=0), 1, 0)
    plain = TrainCrops([TrainSource(reader, plan)], DataConfig(workers=0))
    of_plain = {plan.sample_at(number).sample: plain[number].photometric for number in range(len(reader))}
    assert all(torch.equal(seen[sample, 0], of_plain[sample]) for sample, _ in seen)


def test_read_ahead_fetches_a_repeated_sample_once(scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, asked = ShardReader(scene_shards, "train"), list[list[int]]()
    fetch = reader.fetch

    def counted(numbers: Any) -> list[bytes]:
        asked.append(list(numbers))
        return fetch(numbers)

    monkeypatch.setattr(reader, "fetch", counted)
    ahead = ReadAhead(reader, 1 << 20)
    ahead.ask("span", lambda: [2, 2, 3])
    found = [ahead.take("span", lambda: [2, 2, 3], number) for number in (2, 3, 2)]
    assert asked == [[2, 3]] and found[0] == found[2] == fetch([2])[0] and not ahead._spans
    ahead.close()


@pytest.mark.slow
def test_a_run_with_sampling_is_continued_bit_for_bit(scene_shards: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_curves", "write_report"):
        monkeypatch.setattr(f"trainer.run.reporter.{name}", lambda *_: None)

    def trained(folder: Path, *overrides: str) -> None:
        settings = [f"data.root={scene_shards}", f"output_dir={folder}", "eval.max_images=1", "eval.panels=0",
                    "decoder_head.type=linear", "train.checkpoint_every=1", "train.total_steps=2", *overrides]
        train(load_run_config(TINY, settings), DistContext(rank=0, world_size=1, device=torch.device("cpu")))

    one, whole, sampled = tmp_path / "one", tmp_path / "whole", "data.sampling=class_balanced"
    trained(whole, sampled)
    shutil.copytree(whole, one)
    for path in (one / "checkpoints").glob("*.pt"):  # as if killed after step 1
        if load_checkpoint(path).step == 2:
            path.unlink()
    trained(one, sampled)
    assert_same_end(one, whole)
    with pytest.raises(ConfigError, match=r"data.sampling was class_balanced and is none"):
        trained(one)
