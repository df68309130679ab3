"""Training from object storage gives the same batches as from a folder, bit for bit, whatever the network does."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import signal
import threading
import time
import tracemalloc
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import CorruptShardError, StorageError
from shards.files.storage import open_storage
from shards.plan import MicroBatchNumbers, TrainPlan, validation_groups
from shards.read_ahead import ReadAhead, look_ahead
from shards.reader import ShardReader
from tests.support.object_storage import (
    FaultyProxy,
    cut,
    flip,
    internal_error,
    short,
    stall,
    trickle,
    unavailable,
)
from tests.support.object_storage import (
    s3_server as start_s3_server,
)
from tests.support.training_run import TrainingRun, assert_equal_states
from tests.unit.test_trainer_data_crops import equal
from trainer.data.batch import Batch
from trainer.data.crops import TrainCrops, TrainSource, open_reader
from trainer.data.loader import train_loader, validation_loader
from trainer.data.whole_images import WholeImages
from trainer.data_config import DataConfig
from trainer.reporting.state import read_state
from trainer.run.checkpoint import load_latest

CPU = torch.device("cpu")


def crops(root: str | Path, batch: int = 2, **changed: Any) -> TrainCrops:
    settings = {"workers": 0, "lanes": 8, "span_samples": 3, "tries": 8, "timeout": 1.0} | changed
    config = DataConfig(root=str(root), **settings)
    reader = open_reader(config, "train")
    plan = TrainPlan(reader.table.samples, batch, 5, config.lanes, config.span_samples)
    return TrainCrops([TrainSource(reader, plan)], config)


def batches(root: str | Path, numbers: range = range(18), **changed: Any) -> list[Batch]:
    return list(train_loader(crops(root, **changed), numbers, CPU))


def largest_span(dataset: TrainCrops) -> int:
    return max(dataset.sources[0].reader.bytes_of(range(first, first + 3)) for first in range(0, 24, 3))


@pytest.fixture(scope="session")
def expected(scene_shards: Path) -> list[Batch]:
    """36 samples of a set of 24: one and a half epochs, from the folder."""
    return batches(scene_shards)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    assert all(map(equal, found, expected))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_equal_those_from_the_folder(s3_shards: str, expected: list[Batch], workers: int) -> None:
    assert_same(batches(s3_shards, workers=workers), expected)
    assert_same(batches(s3_shards, range(7, 18), workers=workers), expected[7:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_of_local_and_remote_sets_gives_the_batches_of_local_ones(
    s3: FaultyProxy, s3_shards: str, scene_shards: Path, renamed_shards: Path, workers: int
) -> None:
    from tests.unit.test_trainer_data_sources import MERGED, mixed

    local = {"root": renamed_shards, "weight": 0.3, "classes": MERGED}
    settings = ("data.lanes=8", "data.span_samples=3", "data.read_ahead_mb=1", f"data.workers={workers}")
    first, second = (mixed(scene_shards, {"root": root, "weight": 0.7}, local, {"root": root, "weight": 0.5}, batch=2,
                           settings=settings) for root in (scene_shards, s3_shards))
    s3.faults = [cut, flip, unavailable]
    assert_same(list(train_loader(second, range(18), CPU)), [first[number] for number in range(18)])


def test_batches_are_equal_under_a_storm(
    s3: FaultyProxy, s3_shards: str, expected: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = crops(s3_shards)
    s3.faults = [cut, flip, short, unavailable, stall, internal_error, cut, trickle, flip, unavailable]
    with caplog.at_level(logging.WARNING):
        assert_same(list(train_loader(dataset, range(18), CPU)), expected)
    assert not s3.faults
    assert len(caplog.records) >= 8  # a bit may flip in what was read ahead and is used by nobody


@pytest.mark.slow
def test_a_killed_server_that_comes_back_costs_time_only(
    scene_shards: Path, expected: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from shards.mirror import copy_set
    from tests.support.object_storage import KEY, SECRET

    with start_s3_server() as server:
        for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("REGION", "us-east-1"),
                            ("ENDPOINT", server.endpoint)):
            monkeypatch.setenv(f"AWS_{name}", value)
        copy_set(scene_shards, "s3://maskstream/killed")
        dataset = crops("s3://maskstream/killed", tries=12)
        # So little is read ahead that most of the epoch still has to come.
        monkeypatch.setattr("trainer.data.crops.ReadAhead",
                            lambda reader, _: ReadAhead(reader, 2 * largest_span(dataset)))
        stream = train_loader(dataset, range(18), CPU)
        found = [next(stream)]
        server.stop(signal.SIGKILL)
        restart = threading.Timer(2.0, server.start)
        restart.start()
        with caplog.at_level(logging.WARNING):
            found += stream
        restart.join()
        assert "continuing from there" in caplog.text, "it did not notice"
        assert_same(found, expected)


@pytest.mark.slow
def test_shards_that_vanish_end_all_ranks_with_one_error(s3_shards: str, tmp_path: Path) -> None:
    run = TrainingRun(s3_shards, tmp_path / "run", "train.total_steps=400", "data.workers=1", ranks=2)
    run.wait_for_step(3)
    storage = open_storage(s3_shards)
    for name in storage.sizes() or ():
        if name.startswith("train-"):
            storage.delete(name)
    assert run.wait(120) == 1
    run.assert_gone()
    errors = set(re.findall(r"^error: .*", run.text, re.MULTILINE))
    told = rf"error: .*{s3_shards}/train-\d+\.tar \(offset \d+\): the manifest lists this shard, but it does not exist"
    assert any(re.match(told, error) for error in errors), run.text
    state = read_state(tmp_path / "run")
    assert state is not None and state.status == "failed" and state.step < 400


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stays_away_ends_the_run_in_bounded_time(
    s3: FaultyProxy, s3_shards: str, workers: int
) -> None:
    import multiprocessing

    dataset = crops(s3_shards, workers=workers, tries=3, timeout=5.0)
    s3.faults = [unavailable] * 1000
    started = time.monotonic()
    with pytest.raises(StorageError, match=rf"^{s3_shards}/train-00000\d\.tar \(offset \d+\): failed after 3 tries"):
        list(train_loader(dataset, range(18), CPU))
    assert time.monotonic() - started < 60
    gc.collect()  # the error's traceback held the loader
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children(), "no worker outlives the error"


@pytest.mark.parametrize(("ranks", "workers", "accumulation"), [(1, 2, 4), (2, 2, 2), (4, 1, 1)])
def test_each_byte_is_fetched_once_an_epoch_and_ranks_make_up_the_same_batches(
    s3: FaultyProxy, s3_shards: str, ranks: int, workers: int, accumulation: int
) -> None:
    """Two epochs of 24 samples in 6 steps of 8, as read by each worker of each rank."""
    reader = ShardReader(s3_shards, "train")
    size = reader.info.bytes
    datasets = [[crops(s3_shards) for _ in range(workers)] for _ in range(ranks)]
    s3.bytes = 0
    found: dict[int, Batch] = {}
    for rank, of_rank in enumerate(datasets):
        numbers = list(MicroBatchNumbers(first_step=0, last_step=6, rank=rank, world_size=ranks,
                                         accumulation=accumulation))
        for worker, dataset in enumerate(of_rank):
            dataset.numbers = numbers[worker::workers]
            found |= {batch.number: batch for batch in dataset}
    fetched = s3.bytes
    assert sorted(found) == list(range(24))
    assert_same([found[number] for number in range(18)], batches(s3_shards))
    headers = 700 * (2 * 24)
    assert 0.9 * size < fetched / 2 <= 1.02 * size + headers


def test_memory_is_bounded_and_too_little_of_it_costs_requests_only(
    s3_shards: str, expected: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    begin = ReadAhead._begin

    def watched(self: ReadAhead, *arguments: Any) -> None:
        nonlocal most
        begin(self, *arguments)
        most = max(most, self._total)

    monkeypatch.setattr(ReadAhead, "_begin", watched)
    dataset = crops(s3_shards)
    largest = largest_span(dataset)
    for budget in (1, 2 * largest, 1 << 30):
        monkeypatch.setattr("trainer.data.crops.ReadAhead", lambda reader, _, budget=budget: ReadAhead(reader, budget))
        most = 0
        assert_same(list(train_loader(dataset, range(18), CPU)), expected)
        assert most <= max(budget, 1.3 * largest)


class SlowReader:
    """Samples of half a megabyte whose bytes arrive before their request is finished."""

    def fetch(self, numbers: Sequence[int]) -> list[bytes]:
        data = [bytes(1 << 19) for _ in numbers]
        time.sleep(0.02 if max(numbers) < 100 else 0.3)
        return data

    def bytes_of(self, numbers: Sequence[int]) -> int:
        return len(numbers) << 19


@pytest.mark.parametrize(("budget", "least", "most"), [(6, 5, 7.5), (60, 30, 62)])
def test_what_is_read_ahead_takes_no_more_memory_than_allowed(budget: int, least: float, most: float) -> None:
    """Peak memory in MiB, with 40 spans of two samples (1 MiB): with a small budget each is evicted half used."""
    ahead = ReadAhead(SlowReader(), budget << 20)  # type: ignore[arg-type]
    order = [(span, 2 * span + turn) for turn in range(2) for span in range(40)]

    def samples(span: int) -> list[int]:
        return [2 * span, 2 * span + 1]

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for span, sample in look_ahead(order, 35, lambda item: ahead.ask(item[0], partial(samples, item[0]))):
        assert len(ahead.take(span, partial(samples, span), sample)) == 1 << 19
    peak = (tracemalloc.get_traced_memory()[1] - before) / (1 << 20)
    tracemalloc.stop()
    ahead.close()
    assert least < peak < most


def test_requests_that_nobody_waits_for_any_more_count_until_they_are_over() -> None:
    ahead = ReadAhead(SlowReader(), 1 << 20)  # type: ignore[arg-type]
    tracemalloc.start()
    for span in range(8):
        ahead.ask(100 + span, partial(list, [100 + span]))
        time.sleep(0.02)  # it is under way
        ahead.take(span, partial(list, [span, 50 + span]), span)  # makes room
        ahead.take(span, partial(list, [span, 50 + span]), 50 + span)
    peak = tracemalloc.get_traced_memory()[1] / (1 << 20)
    tracemalloc.stop()
    ahead.close()
    assert peak < 2


def test_the_first_batch_costs_no_more_late_in_a_run(s3: FaultyProxy, s3_shards: str) -> None:
    """A million epochs in, nothing that came before is read or counted through."""
    asked = []
    for first in (0, 12 * 10**6):
        dataset = crops(s3_shards)
        dataset.numbers = range(first, first + 10**9)
        s3.requests = s3.bytes = 0
        stream = iter(dataset)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        asked.append((s3.requests, s3.bytes))
    (early, few), (late, more) = asked
    assert late <= early + 4 and more <= 2 * few  # how much was read ahead when the stream was closed varies


def test_the_cache_gives_the_same_batches(
    s3: FaultyProxy, s3_shards: str, expected: list[Batch], tmp_path: Path
) -> None:
    for turn in range(2):
        dataset = crops(s3_shards, cache_dir=str(tmp_path / "cache"))
        s3.bytes = 0
        assert_same(list(train_loader(dataset, range(18), CPU)), expected)
        assert (s3.bytes > 0) == (turn == 0)


def test_a_run_whose_checkpoints_are_in_object_storage_goes_on_bit_for_bit(
    s3_root: str, tmp_path: Path, scene_shards: Path
) -> None:
    from tests.runs.test_end_to_end import losses, tiny
    from trainer.distributed import distributed
    from trainer.loop import train

    config = tiny(scene_shards, tmp_path / "run", f"train.checkpoint_dir={s3_root}")
    ends = []
    for _ in range(2):
        with distributed("cpu") as context:
            train(config, context)
        checkpoint = load_latest(s3_root)
        assert checkpoint is not None and checkpoint.step == 4
        ends.append((losses(tmp_path / "run"), checkpoint))
        open_storage(s3_root).delete("step-00000004.pt")  # as if killed before it was written: there is that of step 2
    (whole, first), (again, second) = ends
    assert again == whole and [record["step"] for record in whole] == [1, 2, 3, 4]
    assert_equal_states(first.model, second.model)
    assert_equal_states(first.optimizer, second.optimizer)
    assert not list((tmp_path / "run").rglob("*.pt"))


def damaged(shards: Path, folder: Path, samples: list[int]) -> Path:
    """A copy of a set with some damaged training samples."""
    copied = Path(shutil.copytree(shards, folder))
    reader = ShardReader(shards, "train")
    for number in samples:
        shard, offset, _ = reader.place(number)
        path = copied / reader.table.name(shard)
        data = bytearray(path.read_bytes())
        data[offset + 600] ^= 1
        path.write_bytes(data)
    return copied


def test_skipped_samples_are_named_counted_and_replaced(
    scene_shards: Path, tmp_path: Path, expected: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [3, 11]
    root = damaged(scene_shards, tmp_path / "set", bad)
    with pytest.raises(CorruptShardError, match="CRC-32 differs"):
        batches(root)
    with caplog.at_level(logging.WARNING):
        found = batches(root, on_corrupt="skip")
    plan = crops(root).sources[0].plan
    for number, (ours, whole) in enumerate(zip(found, expected, strict=True)):
        hit = [draw for draw in plan.micro_batch(number) if draw.sample in bad]
        assert len(ours.keys) == len(whole.keys) and len(ours.skipped) == len(hit)
        assert set(ours.keys) <= set(whole.keys) and (ours.keys == whole.keys) == (not hit)
    skipped = sum(len(batch.skipped) for batch in found)
    assert 2 <= skipped <= 4 and caplog.text.count("skipped a training sample") == skipped
    assert_same(batches(root, on_corrupt="skip", workers=2), found)
    with pytest.raises(CorruptShardError, match=r"2 training samples were skipped, but data\.corrupt_budget is 1"):
        batches(root, on_corrupt="skip", corrupt_budget=1)


def test_a_run_records_the_samples_it_left_out(scene_shards: Path, tmp_path: Path) -> None:
    from tests.runs.test_end_to_end import tiny
    from trainer.distributed import distributed
    from trainer.loop import train
    from trainer.reporting.run_logger import SKIPPED_NAME, read_metrics
    from trainer.run.run import open_crops

    root = damaged(scene_shards, tmp_path / "set", [3, 11])
    config = tiny(root, tmp_path / "run", f"data.root={root}", "data.on_corrupt=skip", "train.total_steps=6")
    with distributed("cpu") as context:
        train(config, context)
    reader = ShardReader(scene_shards, "train")
    plan = open_crops(config, reader.manifest).sources[0].plan
    expected = [(position // 4 + 1, reader._where(plan.sample_at(position).sample).partition("/train-")[2])
                for position in range(24) if plan.sample_at(position).sample in (3, 11)]
    lines = [json.loads(line) for line in (tmp_path / "run" / SKIPPED_NAME).read_text().splitlines()]
    assert len(lines) == 2
    for (step, where), line in zip(expected, lines, strict=True):
        assert (line["step"], line["rank"]) == (step, 0) and where in line["sample"] and "CRC-32" in line["sample"]
    assert sum("skipped a corrupt sample" in record.get("what", "") for record in read_metrics(tmp_path / "run")) == 2


def test_without_any_good_sample_there_is_an_error(scene_shards: Path, tmp_path: Path) -> None:
    root = damaged(scene_shards, tmp_path / "set", list(range(24)))
    with pytest.raises(CorruptShardError, match=r"all samples of global batch 0 are corrupt: .*CRC-32"):
        batches(root, on_corrupt="skip")


def samples_of(batches: list[Batch]) -> list[tuple[str, bytes, bytes]]:
    """Each sample separately: key, pixels, segment map."""
    return [(key, image.numpy().tobytes(), segments.numpy().tobytes()) for batch in batches
            for key, image, segments in zip(batch.keys, batch.images, batch.segment_maps, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_damaged_sample_gives_way_to_the_next_of_its_global_batch(scene_shards: Path, tmp_path: Path, batch: int,
                                                                    workers: int) -> None:
    """For any micro-batch size, including 1; and for any number of ranks, which all take micro-batches of this
    sequence."""
    whole = samples_of(batches(scene_shards, range(24), crop_size=48))  # 48 samples, in places
    plan = crops(scene_shards, 1).sources[0].plan
    bad = [plan.sample_at(place).sample for place in (2, 3, 11, 12)]  # neighbours; a last and a first of a global batch
    root = damaged(scene_shards, tmp_path / "set", bad)
    is_bad = [plan.sample_at(place).sample in bad for place in range(48)]
    expected = []
    for place in range(48):
        first = place - place % 6
        order = [first + (place - first + turn) % 6 for turn in range(6)]
        expected.append(whole[next(other for other in order if not is_bad[other])])
    dataset = crops(root, batch, crop_size=48, on_corrupt="skip", corrupt_budget=9, workers=workers)
    dataset.global_batch_size = 6
    found = list(train_loader(dataset, range(48 // batch), CPU))
    assert samples_of(found) == expected
    assert [len(one.skipped) for one in found] == [sum(is_bad[one * batch : (one + 1) * batch])
                                                   for one in range(48 // batch)], "each is told of once, in its turn"


def test_substitutes_come_from_object_storage_too(s3: FaultyProxy, s3_root: str, scene_shards: Path,
                                                  tmp_path: Path) -> None:
    root = damaged(scene_shards, tmp_path / "set", [3, 11])
    for path in root.iterdir():
        open_storage(s3_root).upload(path.name, path)
    found = []
    for place in (root, s3_root):
        dataset = crops(place, 1, on_corrupt="skip")
        dataset.global_batch_size = 4
        found.append(samples_of(list(train_loader(dataset, range(24), CPU))))
    assert found[0] == found[1] and len(found[0]) == 24


def test_a_run_of_single_samples_skips_too(scene_shards: Path, tmp_path: Path) -> None:
    from tests.runs.test_end_to_end import losses, tiny
    from trainer.distributed import distributed
    from trainer.loop import train

    root = damaged(scene_shards, tmp_path / "set", [3, 11])
    for micro in (1, 2):
        config = tiny(root, tmp_path / str(micro), f"data.root={root}", "data.on_corrupt=skip", "train.total_steps=6",
                      f"train.micro_batch_size={micro}")
        with distributed("cpu") as context:
            train(config, context)
    assert [line["step"] for line in losses(tmp_path / "1")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_sees_each_image_once_over_all_ranks(s3_shards: str, ranks: int) -> None:
    config = DataConfig(root=s3_shards, workers=2)
    reader = open_reader(config, "val")
    keys = [[item.key for item in validation_loader(
        WholeImages(reader, config), chain(*validation_groups(5, 2)[rank::ranks]), CPU)] for rank in range(ranks)]
    assert sorted(chain(*keys)) == sorted(reader.read(number).key for number in range(5))


def test_a_run_trains_and_evaluates_from_object_storage(s3_shards: str, tmp_path: Path, scene_shards: Path) -> None:
    from tests.runs.test_end_to_end import losses, tiny
    from trainer.distributed import distributed
    from trainer.loop import train

    metrics = []
    for name, root in (("remote", s3_shards), ("local", scene_shards)):
        with distributed("cpu") as context:
            metrics.append(train(tiny(Path(root), tmp_path / name, f"data.root={root}"), context).metrics)
    without_times = [[{key: value for key, value in line.items() if "loss" in key or key == "grad_norm"}
                      for line in losses(tmp_path / name)] for name in ("remote", "local")]
    assert without_times[0] == without_times[1] and metrics[0]["mIoU"] == metrics[1]["mIoU"]


def test_the_manifest_is_read_by_the_runs_own_retry_policy(tmp_path: Path) -> None:
    """Not by the default of eight tries: nobody listens at that address."""
    from tests.runs.test_end_to_end import ALONE, tiny
    from tests.support.object_storage import free_ports
    from trainer.run.run import build_run, run_places

    url = f"http://127.0.0.1:{free_ports(1)[0]}/set"
    config = tiny(Path(url), tmp_path / "run", f"data.root={url}", "data.tries=1")
    with pytest.raises(StorageError, match=r"after 1 (try|tries)"):
        build_run(config, ALONE, run_places(config))
