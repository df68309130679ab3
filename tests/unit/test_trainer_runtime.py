"""Utilities of a run: device choice, seeds, the record, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shards.errors import ConfigError
from trainer.distributed import distributed
from trainer.reporting.plots import draw_curves
from trainer.reporting.run_logger import METRICS_NAME, RunLogger, read_metrics
from trainer.run.checkpoint import load_checkpoint, load_latest
from trainer.seeding import micro_batch_seed, sample_rng, seed_micro_batch


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed("cpu") as context:
        assert (context.rank, context.world_size, context.is_main) == (0, 1, True)
        assert context.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]
        context.barrier()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_gpu_is_an_error_not_a_fallback() -> None:
    with pytest.raises(ConfigError, match="device is 'cuda' but torch sees no CUDA device"), distributed("cuda"):
        pass


def test_random_streams_depend_on_what_is_computed() -> None:
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random() != sample_rng(1, 3, 2).random()
    assert len({micro_batch_seed(seed, number) for seed in range(20) for number in range(20)}) == 400
    draws = []
    for _ in range(2):
        generator = seed_micro_batch(0, 7, torch.device("cpu"))
        draws.append((torch.rand(3), torch.rand(3, generator=generator)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_the_record_drops_what_a_killed_run_logged_beyond_its_checkpoint(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, 0)
    for step in (1, 2, 3):
        logger.scalars(step, "train", {"loss": float(step), "lr": 0.1})
    logger.close()
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('5\n\ufffd\n{"step": 4, "kind": "tr')  # junk, and killed in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    logger = RunLogger(tmp_path, 2)
    logger.scalars(3, "train", {"loss": 7.0, "lr": 0.1})
    logger.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert draw_curves(tmp_path) == tmp_path / "curves.png" and (tmp_path / "curves.png").stat().st_size > 1000


def test_a_run_without_a_record_has_no_curves(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == [] and draw_curves(tmp_path) is None


class _Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_checkpoints_that_are_not_ours_are_refused_and_never_executed(tmp_path: Path) -> None:
    torch.save(_Payload(tmp_path / "executed"), tmp_path / "evil.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    torch.save({"format": 2, "step": "x"}, tmp_path / "fields.pt")
    torch.save({"format": 1}, tmp_path / "older.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, message in (("evil.pt", "cannot be read"), ("foreign.pt", "not a MaskStream checkpoint"),
                          ("empty.pt", "cannot be read"), ("fields.pt", "field 'step' is missing"),
                          ("older.pt", "but of 1; use the"), ("missing.pt", "does not exist"), ("", "is a folder")):
        with pytest.raises(ConfigError, match=message):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    assert load_latest(tmp_path / "nowhere") is None
