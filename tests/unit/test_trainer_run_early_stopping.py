"""Early stopping counts evaluations without a rise, and stopping after a time counts from the process's start."""

from __future__ import annotations

import time

import pytest

from trainer import stopping
from trainer.config import STOPPING_METRICS, TrainConfig
from trainer.evaluation.counts import Counts
from trainer.run.early_stopping import EarlyStopping
from trainer.stopping import StopRequest, process_seconds

NAN = float("nan")


@pytest.mark.parametrize(("values", "patience", "min_delta", "ends_after"), [
    ([0.1, 0.2, 0.3, 0.4], 1, 0.0, None),
    ([0.1, 0.1], 1, 0.0, 2),  # no rise
    ([0.3, 0.2, 0.25, 0.31, 0.2, 0.1, 0.3], 3, 0.0, 7),  # a rise starts the count again
    ([0.3, 0.31, 0.32, 0.33], 3, 0.05, 4),  # too small, each of them and all together
    ([0.3, 0.32, 0.34, 0.36], 3, 0.05, None),  # slow, but above the best by more than that
    ([NAN, NAN, 0.1, NAN], 2, 0.0, 2), ([NAN, 0.1, NAN, 0.2], 2, 0.0, None),
])
def test_the_run_ends_after_evaluations_without_a_rise(values: list[float], patience: int, min_delta: float,
                                                      ends_after: int | None) -> None:
    stopping = EarlyStopping("mIoU", patience, min_delta)
    ended = None
    for number, value in enumerate(values, 1):
        stopping.record(number, {"mIoU": value})
        resumed = EarlyStopping("mIoU", patience, min_delta)
        resumed.restore(stopping.state())
        assert resumed == stopping
        stopping = resumed
        ended = ended or (number if stopping.is_over else None)
    assert ended == ends_after


def test_another_metric_starts_the_count_again_and_none_never_stops() -> None:
    stopping = EarlyStopping("mIoU", 1)
    stopping.record(5, {"mIoU": 0.5})
    stopping.record(6, {"mIoU": 0.5})
    assert stopping.is_over
    assert stopping.reason() == "mIoU has not risen above 0.5000 (step 5) for 1 evaluations (train.patience)"
    other, off, more = EarlyStopping("mAcc", 1), EarlyStopping.of(TrainConfig()), EarlyStopping("mIoU", 2)
    for one in (other, off, more):
        one.restore(stopping.state())
        assert not one.is_over
    assert (other.best, more.misses) == (None, 1)
    off.record(7, {})
    assert off.state() is None


def test_every_metric_to_stop_by_exists() -> None:
    import torch

    assert set(STOPPING_METRICS) < Counts(3, 255, torch.device("cpu")).summary().keys()


def test_a_time_limit_is_a_reason_to_stop_like_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("trainer.stopping.time.monotonic", lambda: now)
    request = StopRequest()
    request.limit(None, 10**9)
    assert not request.requested
    request.limit(0.5, seconds_gone=600)
    now += 1199.9
    assert not request.requested
    now += 0.1
    assert request.reason == "time is up (train.max_hours=0.5)"
    request.signal_name = "SIGTERM"
    assert request.reason == "SIGTERM"


def test_time_counts_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = process_seconds()
    time.sleep(0.05)
    assert 0.04 < process_seconds() - first < 30
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert process_seconds() >= first, "torchrun, its parent, is older"
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    imported = time.monotonic() - stopping._IMPORTED
    for wrong in (boot - 1e6, boot + 1e6):  # /proc of another container or clock
        monkeypatch.setattr("trainer.stopping.time.clock_gettime", lambda _, wrong=wrong: wrong)
        assert process_seconds() == pytest.approx(imported, abs=10)
