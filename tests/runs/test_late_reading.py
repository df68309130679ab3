"""A fused AdamW guards its updates on the device, and the host reads losses a step late: nothing else changes.

A fused AdamW also runs on the CPU, so these runs take the path of CUDA, where it is always used.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.runs.test_survival import ALONE, with_bad_image
from tests.support.training_run import TINY, assert_equal_states, assert_same_end, final_state
from tests.unit.test_trainer_models_precision import NoWaiting
from trainer.config import load_run_config
from trainer.loop import train, train_step
from trainer.loss import cpu_kernels
from trainer.loss.matcher import HungarianMatcher
from trainer.optimizer import build_optimizer, load_optimizer
from trainer.reporting.run_logger import read_metrics
from trainer.run.non_finite import TrainingDiverged
from trainer.run.run import Run, build_run, run_places
from trainer.run.step_result import HostNumbers
from trainer.stopping import RunStopped

LINEAR = ("decoder_head.type=linear",)  # with batch norm, and quick
HEADS = {"m2f": (), "linear": LINEAR, "pmt": ("decoder_head.type=pmt", "decoder_head.block_ffn=128"),
         "eomt": ("decoder_head.type=eomt", "decoder_head.num_blocks=2", "backbone.trainable=true")}
AT_ONCE, LATE = ("train.log_every=1",), ("train.log_every=100",)


@pytest.fixture(autouse=True)
def as_on_cuda() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.optimizer.FUSED_ON", ("cuda", "cpu"))
        for name in ("draw_curves", "write_report"):
            patch.setattr(f"trainer.run.reporter.{name}", lambda *_: None)
        yield


def trained(root: Path, folder: Path, *settings: str) -> Run:
    return train(load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", "train.total_steps=6",
                                        "train.checkpoint_every=3", "eval.max_images=1", "eval.panels=0",
                                        *settings]), ALONE)


def set_up(root: Path, folder: Path, *settings: str) -> tuple[Run, list[Any]]:
    config = load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", *settings])
    run = build_run(config, ALONE, run_places(config))
    return run, [run.crops[0], run.crops[1]]


# -- one step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_step_waits_for_its_matches_alone_until_its_losses_are_read(scene_shards: Path, tmp_path: Path, head: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each micro-batch, with all predictions."""
    assignments, assign = 0, HungarianMatcher.assign

    def counted(self: HungarianMatcher, *given: Any, **more: Any) -> torch.Tensor:
        nonlocal assignments
        assignments += 1
        with _disable_current_modes():
            return assign(self, *given, **more)

    monkeypatch.setattr(HungarianMatcher, "assign", counted)
    monkeypatch.setattr(cpu_kernels, "serve", lambda values: False)  # as on CUDA
    run, batches = set_up(scene_shards, tmp_path, *HEADS[head])
    train_step(run, batches)  # the optimiser's moments are made
    assignments = 0
    with NoWaiting():
        result = train_step(run, batches)
    assert assignments == (0 if head == "linear" else 2)
    assert result.non_finite is None and result.losses["loss"] > 0


def test_a_bad_step_and_those_after_it_move_nothing_before_anybody_reads(scene_shards: Path, tmp_path: Path) -> None:
    run, batches = set_up(scene_shards, tmp_path, *LINEAR)
    train_step(run, batches)

    def state() -> Any:
        weights = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        return weights, {number: {name: value.clone() for name, value in moments.items()}
                         for number, moments in run.optimizer.state_dict()["state"].items()}

    before, weight = state(), run.model.head.conv.weight
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    bad = train_step(run, batches)
    handle.remove()
    good = train_step(run, batches)
    assert_equal_states(list(before), list(state()))
    assert bad.non_finite is not None and bad.non_finite.reason.startswith("grad_norm is") and good.non_finite is None
    run.update_guard.forget()
    train_step(run, batches)
    assert not torch.equal(before[0]["segmentation_model.1.conv.weight"], weight)


def test_moments_continue_under_the_other_kernel(scene_shards: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint from a GPU on a CPU, and the reverse: only where the step is counted differs."""
    run, batches = set_up(scene_shards, tmp_path, *LINEAR)
    train_step(run, batches)
    monkeypatch.setattr("trainer.optimizer.FUSED_ON", ())
    plain = build_optimizer(run.model, run.config.optimizer)
    load_optimizer(plain, copy.deepcopy(run.optimizer.state_dict()))
    assert {group["fused"] for group in plain.param_groups} == {None}
    load_optimizer(run.optimizer, copy.deepcopy(plain.state_dict()))
    assert {group["fused"] for group in run.optimizer.param_groups} == {True}
    for optimizer in (plain, run.optimizer):
        optimizer.step()
    for mine, other in zip(run.optimizer.state.values(), plain.state.values(), strict=True):
        assert mine["step"] == other["step"] == 2
        torch.testing.assert_close(mine["exp_avg"], other["exp_avg"])


# -- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["m2f", "linear"])
def test_late_and_at_once_come_to_the_same(scene_shards: Path, tmp_path: Path, head: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("__init__", "read"):
        real = getattr(HostNumbers, name)
        monkeypatch.setattr(HostNumbers, name, lambda self, *given, real=real, name=name: (
            order.append(name), real(self, *given))[1])
    runs = {}
    for name, settings in (("late", LATE), ("once", AT_ONCE)):
        order.clear()
        trained(scene_shards, tmp_path / name, *HEADS[head], *settings)
        runs[name] = "".join("c" if what == "__init__" else "r" for what in order)
    assert runs == {"once": "cr" * 6, "late": 2 * ("c" + "cr" + "crr")}  # steps 3 and 6 are saved
    assert_same_end(tmp_path / "late", tmp_path / "once")


@pytest.mark.parametrize(("policy", "head"), [("skip", "m2f"), ("rollback", "linear")])
def test_a_bad_step_found_late_is_left_out_as_if_found_at_once(scene_shards: Path, tmp_path: Path, policy: str,
                                                               head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 7)  # of step 4; it is found while step 5 is computed
    for name, settings in (("late", LATE), ("once", AT_ONCE)):
        trained(scene_shards, tmp_path / name, *HEADS[head], *settings, f"train.on_non_finite={policy}")
        assert final_state(tmp_path / name).skipped_steps == [4]
    assert_same_end(tmp_path / "late", tmp_path / "once")
    record, events = zip(*(outputs(tmp_path / name, 4) for name in ("late", "once")), strict=True)
    assert record[0] == record[1] and record[0]["gradient_norms"]
    assert events[0] == events[1] != []


def outputs(folder: Path, step: int) -> tuple[Any, list[Any]]:
    record = json.loads((folder / f"non-finite/step-{step:08d}-rank-0.json").read_text())
    return record, [[entry["step"], entry["what"]] for entry in read_metrics(folder) if entry["kind"] == "event"]


def test_a_bad_step_found_late_stops_the_run_by_its_own_name(scene_shards: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 7)
    message = r"step 4, rank 0: loss.* is nan; samples: scene_.*\. The weights were not updated"
    with pytest.raises(TrainingDiverged, match=message):
        trained(scene_shards, tmp_path / "run", *LINEAR, *LATE)
    assert final_state(tmp_path / "run").step == 3
    monkeypatch.undo()
    monkeypatch.setattr("trainer.optimizer.FUSED_ON", ("cpu",))
    trained(scene_shards, tmp_path / "run", *LINEAR, *LATE)
    trained(scene_shards, tmp_path / "whole", *LINEAR, *LATE)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_bad_steps_in_a_row_are_each_found(scene_shards: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (3, 5, 8, 11):  # of steps 2, 3 (which is saved), 5, 6
        with_bad_image(monkeypatch, number)
    for name, settings in (("late", LATE), ("once", AT_ONCE)):
        trained(scene_shards, tmp_path / name, *LINEAR, *settings, "train.on_non_finite=skip",
                "train.non_finite_budget=4")
        assert final_state(tmp_path / name).skipped_steps == [2, 3, 5, 6]
    assert_same_end(tmp_path / "late", tmp_path / "once")


def test_a_request_to_stop_takes_effect_a_step_later_and_resumes(scene_shards: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.train_step", stopping_in(1))
        with pytest.raises(RunStopped, match="SIGTERM: stopped after step 2 of 6"):
            trained(scene_shards, tmp_path / "stopped", *LINEAR, *LATE)
    assert final_state(tmp_path / "stopped").step == 2
    for name in ("stopped", "whole"):
        trained(scene_shards, tmp_path / name, *LINEAR, *LATE)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def stopping_in(step: int) -> Any:
    def step_that_is_stopped(run: Run, batches: Any) -> Any:
        if run.step + 1 == step:
            run.stop.signal_name = "SIGTERM"
        return train_step(run, batches)

    return step_that_is_stopped


@pytest.mark.parametrize("setting", ["train.ema_decay=0.9", "train.precision=fp16"])
def test_averages_and_loss_scales_read_at_once(scene_shards: Path, tmp_path: Path, setting: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 7)
    for name, settings in (("late", LATE), ("once", AT_ONCE)):
        run = trained(scene_shards, tmp_path / name, *LINEAR, *settings, setting, "train.on_non_finite=skip")
        assert run.update_guard.is_active and not run.reads_late
    assert_same_end(tmp_path / "late", tmp_path / "once")
