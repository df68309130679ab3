"""Fully sharded training on two ranks: the numbers of DDP, half of the state, and checkpoints that fit everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shards.errors import ConfigError
from tests.runs.test_survival import ALONE, with_bad_image
from tests.runs.test_training_modes import as_if_killed_after
from tests.support.training_run import TINY, assert_same_end, final_state
from tests.support.zygote import call_on_ranks
from trainer.config import load_run_config
from trainer.distributed import distributed
from trainer.loop import train
from trainer.models import fsdp
from trainer.models.fsdp import own_part
from trainer.pretrained import load_pretrained
from trainer.reporting.run_logger import read_evaluation, read_metrics
from trainer.run.checkpoint import load_checkpoint
from trainer.run.run import Run

LINEAR = ("decoder_head.type=linear",)
HEADS = {
    "m2f": ("train.gradient_checkpointing=true",),
    "linear": LINEAR,
    "eomt": ("decoder_head.type=eomt", "decoder_head.num_blocks=2", "optimizer.layer_decay=0.8",
             "decoder_head.num_upscale_blocks=1"),
    "pmt": ("decoder_head.type=pmt", "decoder_head.block_ffn=64", "decoder_head.num_upscale_blocks=1"),
}
PLAIN = (*LINEAR, "decoder_head.use_batchnorm=false")
IN_CI = ("linear", "eomt")
SHARDED = "train.fsdp=true"
pytestmark = pytest.mark.usefixtures("no_pictures")


def settings_of(root: Path, folder: Path, *settings: str) -> list[str]:
    """With accumulation, clipping, averages, and an odd number of images to evaluate."""
    return [f"data.root={root}", f"output_dir={folder}", "backbone.trainable=true", "train.global_batch_size=8",
            "train.ema_decay=0.9", "eval.max_images=3", "eval.panels=0", "optimizer.clip_grad_norm=0.5",
            "train.checkpoint_every=1", "train.keep_checkpoints=9", *settings]


def _on_rank(rank: int, bad: str, *settings: str) -> None:
    """Train, one run after the other: the settings of a run end with "-". RANK in them is this rank."""
    settings = tuple(word.replace("RANK", str(rank)) for word in settings)
    fsdp.SMALLEST_LAYER = 1000  # the tiny model's blocks have more
    with pytest.MonkeyPatch.context() as patch, distributed("cpu") as context:
        for name in ("draw_curves", "write_report"):
            patch.setattr(f"trainer.run.reporter.{name}", lambda *_: None)
        if bad:
            with_bad_image(patch, int(bad))
        ends = [number for number, word in enumerate(settings) if word == "-"]
        for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            run = train(load_run_config(TINY, list(settings[start:end])), context)
            if run.sharded is not None:
                _check_parts(run)


def _check_parts(run: Run) -> None:
    """This rank keeps its share of every trained tensor, but for one row, and so do its moments and averages."""
    ranks = run.context.world_size
    for parameter in run.model.parameters():
        moments = run.optimizer.state.get(parameter)
        for tensor in (parameter, *([moments["exp_avg"], moments["exp_avg_sq"]] if moments else ())):
            row = tensor[0].numel() if tensor.dim() else 1
            assert own_part(tensor).numel() < tensor.numel() / ranks + row
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert run.averaged is not None
    for average, parameter in zip(run.averaged._averages, trained, strict=False):
        assert average.shape == own_part(parameter).shape


def train_on_two(*runs: list[str], bad: str = "", ranks: int = 2) -> None:
    call_on_ranks(_on_rank, bad, *(word for settings in runs for word in (*settings, "-")), ranks=ranks)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: tensor for part, item in items for key, tensor in tensors(item, f"{name}/{part}").items()}


def assert_close(one: Any, other: Any, atol: float = 3e-4) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert type(theirs[name]) is Tensor
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=atol,
                                   msg=lambda text, name=name: f"{name}: {text}")


def assert_close_ends(one: Path, other: Path) -> None:
    for part in ("model", "averaged"):
        assert_close(getattr(final_state(one), part), getattr(final_state(other), part))


@pytest.mark.parametrize("head", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.stress)
                                  for name in HEADS])
def test_sharded_training_equals_ddp(scene_shards: Path, tmp_path: Path, head: str) -> None:
    """AdamW moves a weight as far for the smallest gradient, so only the first step's can be compared closely."""
    runs = [tmp_path / "ddp", tmp_path / "sharded"]
    train_on_two(settings_of(scene_shards, runs[0], *HEADS[head]),
                 settings_of(scene_shards, runs[1], *HEADS[head], SHARDED))
    first = [load_checkpoint(run / "checkpoints/step-00000001.pt").optimizer for run in runs]
    assert_close(*first, atol=1e-7)
    assert_close_ends(*runs)
    losses = [[record["loss"] for record in read_metrics(run) if record["kind"] == "train"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    evaluations = [read_evaluation(run) for run in runs]
    assert evaluations[0] is not None and evaluations[1] is not None
    assert evaluations[1]["mIoU"] == pytest.approx(evaluations[0]["mIoU"], abs=0.01)


def test_a_run_goes_on_sharded_or_not_on_any_number_of_ranks(scene_shards: Path, tmp_path: Path) -> None:
    """Bit for bit, if nothing changes. Without batch norm, whose statistics on a CPU are those of one rank's images."""
    whole = tmp_path / "whole"
    train_on_two(settings_of(scene_shards, whole, *PLAIN, SHARDED))
    names = ("sharded", "ddp", "alone")
    sharded, ddp, alone = (as_if_killed_after(whole, 2, tmp_path / name) for name in names)
    train_on_two(settings_of(scene_shards, sharded, *PLAIN, SHARDED), settings_of(scene_shards, ddp, *PLAIN))
    assert_same_end(whole, sharded)
    evaluation = read_evaluation(sharded)
    (sharded / "evaluation.json").unlink()
    train_on_two(settings_of(scene_shards, sharded, *PLAIN, SHARDED))
    assert read_evaluation(sharded) == evaluation, "a complete run is evaluated again"
    assert_close_ends(whole, ddp)
    run = train(load_run_config(TINY, settings_of(scene_shards, alone, *PLAIN, SHARDED)), ALONE)
    assert run.sharded is None, "there is nothing to share with"
    assert_close_ends(whole, alone)
    from_ddp = as_if_killed_after(ddp, 3, tmp_path / "from-ddp")
    train_on_two(settings_of(scene_shards, from_ddp, *PLAIN, SHARDED))
    assert_close_ends(whole, from_ddp)
    loaded = load_pretrained(from_ddp / "checkpoints/step-00000004.pt")
    state = final_state(from_ddp)
    assert state.averaged is not None
    assert_close(state.averaged["model"], loaded.model.meta_state_dict(), atol=0)


def test_one_rank_alone_is_bit_for_bit_a_process_alone(scene_shards: Path, tmp_path: Path) -> None:
    """In every checkpoint: what is being written is not what the next step changes."""
    runs = [tmp_path / "alone", tmp_path / "sharded"]
    train(load_run_config(TINY, settings_of(scene_shards, runs[0], *LINEAR)), ALONE)
    train_on_two(settings_of(scene_shards, runs[1], *LINEAR, SHARDED), ranks=1)
    for step in (1, 2, 3, 4):
        alone, sharded = (load_checkpoint(run / f"checkpoints/step-{step:08d}.pt") for run in runs)
        for part in ("model", "averaged", "optimizer"):
            assert_close(getattr(alone, part), getattr(sharded, part), atol=1e-7)


def test_ranks_that_found_other_checkpoints_or_weights(scene_shards: Path, tmp_path: Path) -> None:
    """An error where a rank does not see the run's folder; rank 0's weights where they differ."""
    whole = tmp_path / "run-0"
    train_on_two(settings_of(scene_shards, whole, *PLAIN, SHARDED),
                 settings_of(scene_shards, tmp_path / "other", *PLAIN, SHARDED, "backbone.random.seed=RANK"))
    assert_same_end(whole, tmp_path / "other")
    with pytest.raises(AssertionError, match="output_dir must be a folder shared by all nodes"):
        train_on_two(settings_of(scene_shards, tmp_path / "run-RANK", *PLAIN, SHARDED, "train.total_steps=5"))


def test_fine_tuning_starts_from_the_same_weights(scene_shards: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    train(load_run_config(TINY, settings_of(scene_shards, alone, *PLAIN, "train.total_steps=1")), ALONE)
    runs = [tmp_path / "ddp", tmp_path / "sharded"]
    settings = (*PLAIN, f"load.weights={alone}/checkpoints/best.pt", "train.total_steps=1", "seed=1")
    train_on_two(settings_of(scene_shards, runs[0], *settings), settings_of(scene_shards, runs[1], *settings, SHARDED))
    assert_close(*(final_state(run).optimizer for run in runs), atol=1e-7)
    for run in runs:
        assert_close(final_state(run).model, final_state(alone).model, atol=2e-3)  # a step further


def test_a_bad_step_is_left_out_by_all_ranks(scene_shards: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "ddp", tmp_path / "sharded"]
    settings = (*LINEAR, "train.on_non_finite=rollback")
    train_on_two(settings_of(scene_shards, runs[0], *settings), settings_of(scene_shards, runs[1], *settings, SHARDED),
                 bad="9")  # rank 1's, in step 3
    for run in runs:
        assert final_state(run).skipped_steps == [3]
        assert len(list((run / "non-finite").iterdir())) == 2
    assert_close_ends(*runs)


@pytest.mark.parametrize(("setting", "message"), [
    ("backbone.trainable=false", "backbone.trainable is false, legal with train.fsdp: true"),
    ("train.precision=fp16", "train.precision is fp16, legal with train.fsdp: auto, bf16, fp32"),
    ("train.compile=true", "train.compile is true, legal with train.fsdp: false"),
])
def test_what_sharding_does_not_go_with(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load_run_config(TINY, ["backbone.trainable=true", SHARDED, setting])
