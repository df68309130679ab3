"""Runs with averaged weights, fp16, early stopping and a time limit: they resume bit for bit, and say what they did."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import ConfigError
from shards.manifest import load_manifest
from tests.conftest import REPOSITORY
from tests.runs.test_mixing import mixture
from tests.runs.test_survival import with_bad_image
from tests.support.training_run import TINY, TrainingRun, assert_equal_states, assert_same_end, final_state
from tests.support.zygote import run_forked
from trainer import train as train_program
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loop import train, train_step
from trainer.pretrained import load_pretrained
from trainer.reporting.plots import miou_lines
from trainer.reporting.report import write_report
from trainer.reporting.run_logger import read_evaluation, read_metrics
from trainer.reporting.state import read_state
from trainer.run.checkpoint import load_checkpoint
from trainer.run.loss_scaling import LossScaler
from trainer.run.non_finite import TrainingDiverged
from trainer.run.run import Run, build_run, run_places
from trainer.run.start import start_run
from trainer.stopping import EXIT_TO_BE_CONTINUED, RunStopped

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
EMA, FP16 = "train.ema_decay=0.9", "train.precision=fp16"
SMALL = ("decoder_head.type=linear", "eval.max_images=1", "eval.panels=0")  # with batch norm; 20 ms per step
pytestmark = pytest.mark.usefixtures("no_pictures")
EVERY_STEP = ("train.checkpoint_every=1", "train.keep_checkpoints=20", "train.eval_every=2")


def trained(root: Path, folder: Path, *settings: str) -> Run:
    return train(load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", *SMALL, *settings]), ALONE)


def as_if_killed_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run that was killed after the checkpoint of this step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*.pt"):
        if int(path.stem[5:]) > step:
            path.unlink()
    if load_checkpoint(copy / "checkpoints/best.pt").step > step:
        (copy / "checkpoints/best.pt").unlink()
    return copy


def records(folder: Path, kind: str) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in read_metrics(folder) if record["kind"] == kind}


MODES = (EMA, FP16, "train.total_steps=6", "train.early_stopping=mIoU", "train.patience=9", *EVERY_STEP)


@pytest.fixture(scope="module")
def whole(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything at once, and its checkpoint of every step."""
    folder = tmp_path_factory.mktemp("modes") / "whole"
    trained(scene_shards, folder, *MODES)
    return folder


# -- all at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_run_goes_on_bit_for_bit(scene_shards: Path, whole: Path, tmp_path: Path, step: int) -> None:
    run = as_if_killed_after(whole, step, tmp_path / "run")
    trained(scene_shards, run, *MODES)
    assert_same_end(whole, run)
    for kind in ("val", "val_raw"):
        assert records(run, kind) == records(whole, kind)


@pytest.mark.slow
def test_kill_9_at_any_moment_and_on_again(scene_shards: Path, renamed_shards: Path, tmp_path: Path) -> None:
    """With samples of two sets."""
    settings = (*MODES, mixture(renamed_shards), "train.total_steps=30", "train.checkpoint_every=4",
                "train.eval_every=15")
    trained(scene_shards, tmp_path / "whole", *settings)
    for step in (6, 13):
        run = TrainingRun(scene_shards, tmp_path / "run", *SMALL, *settings)
        run.wait_for_step(step)
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        assert final_state(run.folder).step < 30
    trained(scene_shards, tmp_path / "run", *settings)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_has_the_parts_and_an_older_one_has_none(scene_shards: Path, whole: Path, tmp_path: Path) -> None:
    state = final_state(whole)
    assert state.averaged is not None and state.loss_scale is not None and state.early_stopping is not None
    assert state.averaged["model"].keys() == state.model.keys()
    steps = sum(record["grad_norm"] is not None and record["grad_norm"] < float("inf")
                for record in records(whole, "train").values())
    assert state.averaged["updates"] == steps, "an overflow moves no weight"
    path = tmp_path / "old.pt"
    content = {name: value for name, value in vars(state).items() if name not in ("averaged", "loss_scale",
                                                                                  "early_stopping")}
    torch.save(content, path)
    old = load_checkpoint(path)
    assert (old.averaged, old.loss_scale, old.early_stopping) == (None, None, None)
    assert old.weights("averaged") is old.model
    for part, wrong in (("averaged", {"model": 3, "updates": 1}), ("loss_scale", {"scale": "x"}),
                        ("early_stopping", [1])):
        torch.save({**vars(state), part: wrong}, path)
        with pytest.raises(ConfigError, match=f"field '{part}.* is missing or of the wrong type"):
            load_checkpoint(path)


def test_a_bad_step_leaves_averages_and_scale_as_they_were(scene_shards: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out, or undone with the steps since the last checkpoint: the same, as if it had never been computed."""
    with_bad_image(monkeypatch, 9)  # of step 5; checkpoints are of 2, 4, 6
    for policy in ("skip", "rollback"):
        trained(scene_shards, tmp_path / policy, EMA, FP16, "train.total_steps=6", f"train.on_non_finite={policy}")
        state = final_state(tmp_path / policy)
        assert state.skipped_steps == [5] and state.averaged is not None
        assert all(bool(tensor.isfinite().all()) for tensor in state.averaged["model"].values())
    assert_same_end(tmp_path / "skip", tmp_path / "rollback")


_RANKS = """
import os
import sys
from pathlib import Path
import torch
from trainer import loop
from trainer.run import reporter, start

reporter.write_report = reporter.draw_curves = lambda *_: None
folder = Path(sys.argv.pop())
if sys.argv[-1] == "over":
    sys.argv.pop()
    start.process_seconds = lambda: 2.0 * 3600 * int(os.environ["RANK"])  # one hour, on average
real = loop.train

def train(config, context):
    run = real(config, context)
    torch.save(run.averaged._averages, folder / f"{context.rank}.pt")
    return run

loop.train = train
sys.argv[0] = "trainer/train.py"
from trainer.train import main
from shards.cli.command_line import run_entry_point
run_entry_point(main)
"""


@pytest.mark.slow
def test_ranks_hold_equal_averages_and_stop_together_when_time_is_up(scene_shards: Path, tmp_path: Path) -> None:
    """And bit for bit as two ranks that nobody stopped."""
    program = tmp_path / "ranks.py"
    program.write_text(_RANKS)

    def run(name: str, *more: str) -> Any:
        return run_forked(program, "--config", TINY, f"data.root={scene_shards}", f"output_dir={tmp_path / name}",
                          *SMALL, EMA, FP16, "train.max_hours=1", *more, tmp_path, ranks=2)

    stopped = run("stopped", "over")
    assert stopped.returncode == EXIT_TO_BE_CONTINUED, stopped.stderr
    assert "time is up (train.max_hours=1): stopped after step 1 of 4" in stopped.stderr
    for name in ("stopped", "undisturbed"):
        ended = run(name)
        assert ended.returncode == 0, ended.stderr
        averages = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
        assert_equal_states(averages[0], averages[1])
    assert_same_end(tmp_path / "undisturbed", tmp_path / "stopped")


# -- averaged weights -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any of them."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    trained(scene_shards, folder, *EVERY_STEP)
    return folder


@pytest.fixture(scope="module")
def averaged(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    trained(scene_shards, folder, EMA, *EVERY_STEP)
    return folder


def test_averaging_changes_nothing_in_training(plain: Path, averaged: Path) -> None:
    without, with_it = final_state(plain), final_state(averaged)
    assert_equal_states(without.model, with_it.model)
    assert_equal_states(without.optimizer, with_it.optimizer)
    assert [record["mIoU"] for record in records(plain, "val").values()] == [
        record["mIoU"] for record in records(averaged, "val_raw").values()]


def test_both_are_evaluated_and_the_averaged_ones_count(scene_shards: Path, averaged: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    other = as_if_killed_after(averaged, 3, tmp_path / "raw")
    trained(scene_shards, other, EMA, *EVERY_STEP, "eval.weights=raw")
    printed = capsys.readouterr().out
    assert "step 4: val of the raw weights mIoU" in printed and "step 4: val of the averaged weights mIoU" in printed
    val, val_raw = records(averaged, "val"), records(averaged, "val_raw")
    assert val.keys() == val_raw.keys() == {2, 4}
    assert val[4]["weights"] == "averaged" and val[4]["ECE"] != val_raw[4]["ECE"]
    assert records(other, "val")[4] == {**val_raw[4], "kind": "val", "weights": "raw"}
    assert records(other, "val_averaged")[4]["mIoU"] == val[4]["mIoU"]
    assert final_state(averaged).best_miou == max(record["mIoU"] for record in val.values())
    evaluation = read_evaluation(averaged)
    assert evaluation is not None and (evaluation["weights"], evaluation["mIoU"]) == ("averaged", val[4]["mIoU"])
    write_report(averaged, final_state(averaged).run_config, load_manifest(scene_shards), ALONE)
    assert "split val, averaged weights: mIoU" in (averaged / "report.html").read_text()


def test_curves_follow_each_kind_of_weights_when_what_counts_changes() -> None:
    def record(step: int, kind: str, miou: float, **more: str) -> dict[str, Any]:
        return {"step": step, "kind": kind, "mIoU": miou, "baseline_mIoU": 0.1, **more}

    before = [record(1, "val", 0.2)]
    lines = {line.name: line.points for line in miou_lines(before, "baseline")}
    assert lines == {"model": [(1, 0.2)], "baseline": [(1, 0.1)]}
    lines = {line.name: line.points for line in miou_lines(
        [*before, record(2, "val", 0.4, weights="averaged"), record(2, "val_raw", 0.3),
         record(3, "val", 0.5, weights="raw"), record(3, "val_averaged", 0.6), {"step": 3, "kind": "train"}], "b")}
    assert lines == {"averaged weights": [(2, 0.4), (3, 0.6)], "raw weights": [(1, 0.2), (2, 0.3), (3, 0.5)],
                     "b": [(1, 0.1), (2, 0.1), (3, 0.1)]}


def test_a_checkpoint_is_used_with_its_averaged_weights_unless_told_otherwise(
        scene_shards: Path, averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = averaged / "checkpoints/step-00000004.pt"
    state = load_checkpoint(path)
    assert state.averaged is not None
    for override, kind, expected in (([], "averaged", state.averaged["model"]),
                                     (["eval.weights=raw"], "raw", state.model)):
        model = load_pretrained(path, overrides=override)
        assert model.weights == kind
        assert_equal_states(dict(model.model.trainable_state_dict()), expected)
    config = load_run_config(TINY, [f"data.root={scene_shards}", f"output_dir={tmp_path / 'new'}", *SMALL, EMA,
                                    f"load.weights={path}"])
    new = start_run(config, ALONE, run_places(config))
    assert_equal_states(dict(new.model.trainable_state_dict()), state.averaged["model"])
    assert new.averaged is not None
    assert_equal_states(new.averaged.state(), {"model": state.averaged["model"], "updates": 0})
    assert "tensors of adapter and head, averaged weights\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_programs_say_which_weights_they_use(scene_shards: Path, averaged: Path, tmp_path: Path) -> None:
    checkpoint, image = averaged / "checkpoints/step-00000004.pt", tmp_path / "photo.png"
    done = run_forked(REPOSITORY / "trainer/eval.py", "--config", averaged / "config.yaml", "--checkpoint", checkpoint,
                      "--output", tmp_path / "out", "eval.weights=raw", "eval.panels=0")
    assert done.returncode == 0 and "these are the raw weights of step 4 (eval.weights)" in done.stdout, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["weights"] == "raw" and metrics["mIoU"] == records(averaged, "val_raw")[4]["mIoU"]
    from PIL import Image

    Image.new("RGB", (64, 64)).save(image)
    done = run_forked(REPOSITORY / "trainer/predict.py", "--checkpoint", checkpoint, "--output", tmp_path / "predicted",
                      image)
    assert done.returncode == 0 and f"{checkpoint}: averaged weights of step 4" in done.stdout, done.stderr


def test_averaging_can_begin_and_end_when_a_run_is_resumed(scene_shards: Path, plain: Path, averaged: Path,
                                                           tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = as_if_killed_after(plain, 3, tmp_path / "begun")
    before = final_state(begun)
    run = trained(scene_shards, begun, EMA, *EVERY_STEP)
    assert "averaging starts from the weights of step 3" in capsys.readouterr().out
    after = final_state(begun)
    assert run.averaged is not None and after.averaged is not None and after.averaged["updates"] == 1
    for name, average in after.averaged["model"].items():
        if name in run.model.state_dict() and average.is_floating_point():  # the first decay of the warm-up is 0.1
            torch.testing.assert_close(average, 0.1 * before.model[name] + 0.9 * after.model[name])
    ended = as_if_killed_after(averaged, 3, tmp_path / "ended")
    trained(scene_shards, ended, *EVERY_STEP)
    assert "its averaged weights are dropped" in capsys.readouterr().out
    assert final_state(ended).averaged is None
    assert_equal_states(final_state(ended).model, final_state(plain).model)
    events = [record["what"] for folder in (begun, ended) for record in records(folder, "event").values()]
    assert ["averag" in what for what in events] == [True, True]


# -- fp16 -----------------------------------------------------------------------------------------------------


def test_fp16_is_close_to_float32_and_its_scale_is_logged(scene_shards: Path, plain: Path, whole: Path) -> None:
    exact, half = records(plain, "train"), records(whole, "train")
    assert half[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.01) and half[1]["loss"] != exact[1]["loss"]
    assert half[1]["loss_scale"] >= 1024 and "loss_scale" not in exact[1]
    state = final_state(whole)
    assert all(tensor.dtype == torch.float32 for tensor in state.model.values() if tensor.is_floating_point())


@pytest.mark.parametrize("head", ["m2f", "eomt", "pmt"])
def test_the_other_heads_train_in_fp16(scene_shards: Path, tmp_path: Path, head: str) -> None:
    settings = {"m2f": (), "eomt": ("decoder_head.num_blocks=2", "backbone.trainable=true"),
                "pmt": ("decoder_head.block_ffn=128",)}[head]
    trained(scene_shards, tmp_path, f"decoder_head.type={head}", *settings, FP16, EMA, "train.total_steps=2")
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path, "train").values())
    state = final_state(tmp_path)
    assert state.averaged is not None and state.averaged["model"].keys() == state.model.keys()


def test_scaling_alone_changes_no_bit(scene_shards: Path, tmp_path: Path) -> None:
    """In float32: the mask losses, which make gradients of their own, are scaled as well, and by powers of two."""
    ends = []
    for enabled in (False, True):
        config = load_run_config(TINY, [f"data.root={scene_shards}", f"output_dir={tmp_path}"])
        run = build_run(config, ALONE, run_places(config))
        run.scaler = LossScaler(enabled, ALONE.device)
        result = train_step(run, [run.crops[0], run.crops[1]])
        ends.append({**result.losses, **run.model.trainable_state_dict()})
    assert_equal_states(*ends)


def infinite_gradients(monkeypatch: pytest.MonkeyPatch, overflows: Callable[[int], bool]) -> None:
    """Some steps' gradients overflow, whatever the scale."""
    from trainer import loop

    real, step = loop.clip_gradients, 0

    def clip(parameters: list[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
        nonlocal step
        step += 1
        norm = real(parameters, max_norm)
        return norm * torch.inf if overflows(step) else norm

    monkeypatch.setattr(loop, "clip_gradients", clip)


def test_an_overflow_is_no_bad_step_but_repeated_ones_are(scene_shards: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.loss_scaling.MOST_OVERFLOWS", 2)
    with monkeypatch.context() as patch:
        infinite_gradients(patch, lambda step: step == 4)
        trained(scene_shards, tmp_path / "once", FP16, EMA, "train.total_steps=4", *EVERY_STEP)
    state, before = final_state(tmp_path / "once"), load_checkpoint(tmp_path / "once/checkpoints/step-00000003.pt")
    assert state.skipped_steps == [] and not (tmp_path / "once/non-finite").exists()
    assert state.averaged is not None and before.averaged is not None
    for name, tensor in state.model.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, before.model[name]), "no weight has moved"
    assert state.averaged["updates"] == before.averaged["updates"]
    infinite_gradients(monkeypatch, lambda step: True)
    with pytest.raises(TrainingDiverged, match=r"step 3, .*grad_norm is inf at a loss scale of \d+; .* not updated"):
        trained(scene_shards, tmp_path / "always", FP16, "train.total_steps=5")
    record = json.loads((tmp_path / "always/non-finite/step-00000003-rank-0.json").read_text())
    assert record["loss_scale"] >= 1


# -- early stopping and the time limit ------------------------------------------------------------------------


def test_a_run_that_no_longer_rises_ends_early_and_stays_so(scene_shards: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    settings = ("train.total_steps=9", "train.eval_every=1", "train.early_stopping=aAcc", "train.patience=2",
                "train.min_delta=1", "train.keep_checkpoints=9", *SMALL)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(TINY), f"data.root={scene_shards}",
                                      f"output_dir={folder}", *settings])
    message = "early stopping at step 3 of 9: aAcc has not risen by more than 1 above "
    for _ in range(2):  # a repeated command trains no further
        assert train_program.main() == 0
        assert capsys.readouterr().out.splitlines()[-2].startswith(message)
        state = read_state(folder)
        assert state is not None and (state.status, state.step) == ("finished", 3)
        assert state.message.startswith(message)
        assert list(records(folder, "train")) == [1, 2, 3] and final_state(folder).step == 3
    killed = as_if_killed_after(folder, 2, tmp_path / "killed")
    assert final_state(killed).early_stopping == {**(final_state(folder).early_stopping or {}), "misses": 1}
    trained(scene_shards, killed, *settings)
    assert_same_end(folder, killed)
    run = trained(scene_shards, killed, *settings, "train.patience=3")
    assert run.step == 4 and run.is_finished, "more patience goes on"


def test_a_time_limit_stops_after_a_step_and_counts_anew(scene_shards: Path, plain: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("trainer.run.start.process_seconds", lambda: 3600.0)
        for step in (1, 2):
            with pytest.raises(RunStopped, match=rf"time is up \(train.max_hours=1\): stopped after step {step} of 4; "
                               "its checkpoint was saved, and the same command resumes") as stopped:
                trained(scene_shards, tmp_path, "train.max_hours=1", *EVERY_STEP)
            assert stopped.value.exit_code == EXIT_TO_BE_CONTINUED and final_state(tmp_path).step == step
    state = read_state(tmp_path)
    assert state is not None and state.status == "stopped" and "time is up (train.max_hours=1)" in state.message
    trained(scene_shards, tmp_path, "train.max_hours=1", *EVERY_STEP)
    assert_same_end(plain, tmp_path)


def test_nothing_of_all_this_is_on_by_default(scene_shards: Path, tmp_path: Path) -> None:
    config = load_run_config(TINY, [f"data.root={scene_shards}", f"output_dir={tmp_path}", *SMALL])
    run = build_run(config, ALONE, run_places(config))
    state = run.snapshot()
    assert (state.averaged, state.loss_scale, state.early_stopping) == (None, None, None)
    assert list(run.weights) == ["raw"] and run.scaler.logged() == {}
