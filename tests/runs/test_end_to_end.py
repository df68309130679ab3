"""The whole workflow through its entry points: train, resume, two ranks, evaluate, predict, stop on bad numbers."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shards.errors import ConfigError
from shards.looking.image_scores import read_scores
from tests.conftest import REPOSITORY
from tests.support.training_run import TrainingRun
from tests.support.zygote import run_forked
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.distributed import DistContext
from trainer.loop import train, train_step
from trainer.pretrained import restore_model
from trainer.reporting.run_logger import read_metrics
from trainer.run.checkpoint import load_checkpoint, load_latest
from trainer.run.non_finite import NonFiniteGuard, TrainingDiverged
from trainer.run.run import build_run, run_places

TINY = REPOSITORY / "tests" / "support" / "tiny.yaml"
EOMT = ("decoder_head.type=eomt", "decoder_head.num_blocks=2", "backbone.trainable=true", "optimizer.layer_decay=0.8",
        "decoder_head.mask_annealing=[0.1,0.9]")
PMT = ("decoder_head.type=pmt", "decoder_head.block_ffn=32", "decoder_head.mask_annealing=[0.1,0.9]")
ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))


def tiny(root: Path, run: Path, *overrides: str) -> RunConfig:
    return load_run_config(TINY, [f"data.root={root}", f"output_dir={run}", *overrides])


def losses(run: Path) -> list[dict[str, float]]:
    """Every logged step, without timings."""
    timings = ("images_per_second", "data_wait_share", "seconds_per_step", "memory_gb")
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    return [{name: value for name, value in record.items() if name not in timings} for record in records]


def run_program(program: str, *arguments: object, ranks: int = 0,
                limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run an entry point, as so many ranks if given; `limit` is called in its process first."""
    if limit is None:
        return run_forked(REPOSITORY / program, *arguments, ranks=ranks)
    return subprocess.run([sys.executable, str(REPOSITORY / program), *map(str, arguments)], capture_output=True,
                          text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limit)


@pytest.fixture(scope="module")
def finished(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(scene_shards, run), ALONE)
    return run


# -- one process --------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_a_person_needs(finished: Path) -> None:
    assert [record["step"] for record in losses(finished)] == [1, 2, 3, 4]
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints/best.pt", "checkpoints/step-00000004.pt",
            "pictures/first-batch-00000000.png", "pictures/val-panels-00000004.png"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    record = losses(finished)[0]
    for layer in ("", "_0", "_1"):  # dec_layers + 1 predictions, all supervised
        assert {f"loss_mask{layer}", f"loss_dice{layer}", f"loss_cross_entropy{layer}"} <= record.keys()
    total = sum(value * (2 if "cross" in name else 5) for name, value in record.items() if name.startswith("loss_"))
    assert record["loss"] == pytest.approx(total, rel=1e-5)
    (evaluated,) = [record for record in read_metrics(finished) if record["kind"] == "val"]
    assert evaluated["step"] == 4 and 0 <= evaluated["mIoU"] <= 1 and evaluated["baseline_mIoU"] > 0


def test_the_checkpoint_has_no_backbone_and_loads_without_pickle(finished: Path) -> None:
    checkpoint = load_checkpoint(finished / "checkpoints/best.pt")
    assert checkpoint.step == 4 and not [key for key in checkpoint.model if ".backbone." in key]
    assert any(key.startswith("segmentation_model.0.spm.") for key in checkpoint.model)
    assert any(key.endswith("running_mean") for key in checkpoint.model)
    assert len(checkpoint.class_infos) == 8 and checkpoint.run_config.decoder_head.num_queries == 8


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "resumed"
    shutil.copytree(finished, run)
    (run / "checkpoints/step-00000004.pt").unlink()  # as if it had been killed after step 2's checkpoint
    train(tiny(scene_shards, run), ALONE)
    assert losses(run) == losses(finished)  # steps 3 and 4 were logged anew, not twice
    first, second = load_latest(finished / "checkpoints"), load_latest(run / "checkpoints")
    assert first is not None and second is not None and second.step == 4
    assert first.model.keys() == second.model.keys()
    assert all(torch.equal(first.model[key], second.model[key]) for key in first.model)


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(finished, run)
    newest = run / "checkpoints/step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-3000])
    with pytest.warns(UserWarning, match=r"step-00000004\.pt cannot be read.*Falling back"):
        train(tiny(scene_shards, run), ALONE)
    assert losses(run) == losses(finished)


def test_a_complete_run_is_only_evaluated_again(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "again"))
    metrics = train(tiny(scene_shards, run), ALONE).metrics
    assert metrics["mIoU"] >= 0 and losses(run) == losses(finished)
    before, after = ([record for record in read_metrics(path) if record["kind"] == "val"] for path in (finished, run))
    assert len(after) == len(before) == 1, "it says nothing new"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=never"], "resume is 'never'"),
        (["seed=1"], "seed was 0 and is 1"),
        (["train.global_batch_size=6"], "global_batch_size was 4 and is 6"),
        (["backbone.random.seed=1"], "backbone's weights"),
        (["backbone.layers=FOUR_LAST", "backbone.random.num_hidden_layers=4"], "backbone.layers was"),
        (["data.train_split=val", "data.crop_size=64"], "data.train_split was"),
        (["optimizer.decay_all=true"], "decay_all was False"),
        (["decoder_head.num_queries=9"], "decoder_head.num_queries was 8 and is 9"),
        (["backbone.random.num_attention_heads=4"], "num_attention_heads was 2 and is 4"),
        (["backbone.image_mean=[0.1,0.1,0.1]"], "backbone.image_mean was"),
    ],
)
def test_a_run_that_would_not_continue_the_same_run_is_refused(
    scene_shards: Path, finished: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(ConfigError, match=message):
        train(tiny(scene_shards, run, "train.total_steps=6", *overrides), ALONE)


def test_settings_that_may_change_on_resume_do_change(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = tiny(scene_shards, run, "train.total_steps=5", "optimizer.weight_decay=0.5", "optimizer.betas=[0.5,0.6]")
    train(config, ALONE)
    checkpoint = load_latest(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 5
    groups = checkpoint.optimizer["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}


def test_a_run_is_never_started_anew_over_its_remains(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"holds a run with checkpoints in .*/run/checkpoints, but there are none"):
        train(tiny(scene_shards, run, f"train.checkpoint_dir={tmp_path / 'elsewhere'}"), ALONE)
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"junk")
    with pytest.warns(UserWarning, match="Falling back"), pytest.raises(ConfigError, match="none of the 3 checkpoints"):
        train(tiny(scene_shards, run), ALONE)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="resume is 'never'"):
        train(tiny(scene_shards, run, "resume=never"), ALONE)


def test_a_run_of_which_only_the_best_is_left_goes_on_from_it(scene_shards: Path, finished: Path,
                                                              tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in (run / "checkpoints").glob("step-*"):
        path.unlink()
    train(tiny(scene_shards, run, "train.total_steps=5"), ALONE)
    assert losses(run)[:4] == losses(finished) and len(losses(run)) == 5


def test_the_best_so_far_is_known_after_a_resume(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    """A best score that is not reached again is kept, along with its checkpoint."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in (run / "checkpoints").glob("*.pt"):
        content = torch.load(path, weights_only=True) | {"best_miou": 0.99}
        torch.save(content, path)
    for path in (run / "checkpoints").glob("*.sha256"):
        path.unlink()
    before = (run / "checkpoints/best.pt").read_bytes()
    train(tiny(scene_shards, run, "train.total_steps=5"), ALONE)
    assert (run / "checkpoints/best.pt").read_bytes() == before
    checkpoint = load_latest(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 5 and checkpoint.best_miou == 0.99


def test_a_run_that_ends_earlier_than_it_was_to_has_a_best_checkpoint_too(scene_shards: Path, finished: Path,
                                                                          tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("best.pt", "step-00000004.pt"):
        (run / "checkpoints" / name).unlink()
    train(tiny(scene_shards, run, "train.total_steps=2"), ALONE)
    assert load_checkpoint(run / "checkpoints/best.pt").step == 2


@pytest.mark.parametrize("overrides", [["data.crop_size=48"], ["data.train_split=val", "train.micro_batch_size=1"]])
def test_crops_that_do_not_suit_the_head_are_refused(scene_shards: Path, tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"training crops are \d+x\d+ pixels, legal for decoder_head.type m2f: mult"):
        train(tiny(scene_shards, tmp_path / "run", *overrides), ALONE)


def test_crops_are_not_taken_for_whole_images(scene_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scaled_side is short, legal with split 'train', which holds crops: stored"):
        train(tiny(scene_shards, tmp_path / "run", "data.crop_size=32", "data.online.scaled_side=short"), ALONE)


def test_accumulation_and_dense_targets_change_nothing(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    train(tiny(scene_shards, tmp_path / "dense", "data.targets=dense", "train.total_steps=4"), ALONE)
    assert losses(tmp_path / "dense") == losses(finished)


def test_crops_drawn_in_each_epoch_resume_bit_equal_wherever_they_are_resized(whole_shards: Path, tmp_path: Path
                                                                              ) -> None:
    online = ("data.crop_size=64", "data.online.scaled_side=short", "train.total_steps=4")
    train(tiny(whole_shards, tmp_path / "worker", *online), ALONE)
    train(tiny(whole_shards, tmp_path / "device", *online, "data.online.resample_on=device"), ALONE)
    assert losses(tmp_path / "device") == losses(tmp_path / "worker")
    shutil.copytree(tmp_path / "worker", tmp_path / "resumed")
    (tmp_path / "resumed/checkpoints/step-00000004.pt").unlink()
    # The place of resizing may change with the machine; what is drawn may not.
    with pytest.raises(ConfigError, match=r"data.online.max_scale was 2.0 and is 1.5"):
        train(tiny(whole_shards, tmp_path / "resumed", *online, "data.online.max_scale=1.5"), ALONE)
    train(tiny(whole_shards, tmp_path / "resumed", *online, "data.online.resample_on=device"), ALONE)
    first, second = (load_latest(tmp_path / name / "checkpoints") for name in ("worker", "resumed"))
    assert first is not None and second is not None and second.step == 4
    assert all(torch.equal(first.model[key], second.model[key]) for key in first.model)


def test_the_linear_head_trains_and_resumes(scene_shards: Path, tmp_path: Path) -> None:
    linear = ("decoder_head.type=linear", "optimizer.schedule=one_cycle", "optimizer.lr=1e-2")
    train(tiny(scene_shards, tmp_path / "whole", *linear, "train.total_steps=12"), ALONE)
    record = losses(tmp_path / "whole")
    assert record[-1]["loss"] < record[0]["loss"] and "loss_pixel_cross_entropy" in record[0]


@pytest.mark.parametrize("head", [EOMT, PMT], ids=["eomt", "pmt"])
def test_annealed_heads_resume_bit_equal_and_eomt_trains_its_vit_too(scene_shards: Path, tmp_path: Path,
                                                                     head: tuple[str, ...]) -> None:
    train(tiny(scene_shards, tmp_path / "whole", *head), ALONE)
    checkpoint = load_latest(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    probabilities = checkpoint.model["segmentation_model.1.attn_mask_probs"]
    assert probabilities[0] < 1, "masking has begun to fade"
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed/checkpoints/step-00000004.pt").unlink()
    train(tiny(scene_shards, tmp_path / "resumed", *head), ALONE)
    again = load_latest(tmp_path / "resumed" / "checkpoints")
    assert again is not None and again.model.keys() == checkpoint.model.keys()
    assert all(torch.equal(value, again.model[key]) for key, value in checkpoint.model.items())
    fresh = build_model(tiny(scene_shards, tmp_path, *head), len(checkpoint.classes)).meta_state_dict()
    moved = {key for key, value in checkpoint.model.items() if not torch.equal(value, fresh[key])}
    assert ("segmentation_model.0.backbone.blocks.0.attn.qkv.weight" in moved) == (head is EOMT)
    assert "segmentation_model.1.query.weight" in moved
    restored = restore_model(checkpoint, None)
    assert all(torch.equal(value, checkpoint.model[key]) for key, value in restored.trainable_state_dict().items())


def test_recomputing_activations_changes_no_number(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    train(tiny(scene_shards, tmp_path / "m2f", "train.gradient_checkpointing=true", "train.total_steps=4"), ALONE)
    assert losses(tmp_path / "m2f") == losses(finished), "stochastic depth included"
    for name, setting in (("kept", "false"), ("again", "true")):
        train(tiny(scene_shards, tmp_path / name, *EOMT, f"train.gradient_checkpointing={setting}"), ALONE)
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++ is not on the path")
def test_a_compiled_head_trains_alike(scene_shards: Path, tmp_path: Path) -> None:
    for name, setting in (("plain", "false"), ("compiled", "true")):
        train(tiny(scene_shards, tmp_path / name, "decoder_head.type=linear", "decoder_head.dropout=0",
                   f"train.compile={setting}"), ALONE)
    plain, compiled = ([record["loss"] for record in losses(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_training_learns_two_crops_by_heart(scenes: Path, tmp_path: Path) -> None:
    from tests.conftest import make_shards

    root = make_shards(tmp_path / "set", scenes, "dataset.limit=2", "crops.per_image=1")
    config = tiny(root, tmp_path / "run", "train.total_steps=60", "train.global_batch_size=2", "optimizer.lr=4e-3",
                  "data.photometric=false", "data.hflip=0", "adapter.drop_path=0", "train.checkpoint_every=100")
    train(config, ALONE)
    record = losses(tmp_path / "run")
    assert record[-1]["loss"] < 0.5 * record[0]["loss"]


# -- what a step must not do --------------------------------------------------------------------------------


def step_setup(root: Path, folder: Path, *overrides: str) -> tuple[Any, list[Any]]:
    config = tiny(root, folder, *overrides)
    run = build_run(config, ALONE, run_places(config))
    return run, [run.crops[0], run.crops[1]]


def test_a_step_moves_every_trainable_weight_and_no_frozen_one(scene_shards: Path, tmp_path: Path) -> None:
    run, batches = step_setup(scene_shards, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    frozen_hash = run.model.backbone.weights_sha256()
    optimized = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    train_step(run, batches)
    assert run.model.backbone.weights_sha256() == frozen_hash == run.backbone_sha256
    assert run.model.training and not run.model.backbone.training
    moved = [not torch.equal(before[name], parameter) for name, parameter in run.model.named_parameters()
             if parameter.requires_grad]
    assert sum(moved) > 0.9 * len(moved)  # the rest has a gradient of exactly zero, such as biases before a norm
    for name, parameter in run.model.named_parameters():
        assert (id(parameter) in optimized) == parameter.requires_grad == (".backbone." not in name)
        if parameter.requires_grad:
            assert parameter.grad is not None, name


def test_a_whole_run_leaves_the_frozen_vit_alone(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    checkpoint = load_latest(finished / "checkpoints")
    assert checkpoint is not None and not [key for key in checkpoint.model if ".backbone." in key]
    config = tiny(scene_shards, tmp_path)
    run = build_run(config, ALONE, run_places(config))
    before = run.model.backbone.weights_sha256()
    for number in range(3):
        train_step(run, [run.crops[2 * number], run.crops[2 * number + 1]])
        run.model.train()
    assert run.model.backbone.weights_sha256() == before == checkpoint.backbone_sha256


def test_ddp_holds_trainable_weights_only(scene_shards: Path, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        config = tiny(scene_shards, tmp_path)
        run = build_run(config, ALONE, run_places(config))
        trainable = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        reduced = run.wrapped._get_ddp_logging_data()  # type: ignore[operator]
        assert reduced["num_parameter_tensors"] == len(trainable) < len(list(run.model.parameters()))
        assert reduced["total_parameter_size_bytes"] == sum(4 * parameter.numel() for parameter in trainable)
    finally:
        torch.distributed.destroy_process_group()


def test_non_finite_numbers_stop_the_run_before_the_weights_change(scene_shards: Path, tmp_path: Path) -> None:
    run, batches = step_setup(scene_shards, tmp_path, "train.total_steps=9")
    weight = run.model.head.predictor.class_embed.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    before = run.model.trainable_state_dict()["segmentation_model.1.predictor.mask_embed.layers.0.weight"].clone()
    found = train_step(run, batches).non_finite
    assert found is not None and "the final prediction holds NaN" in found.reason
    with pytest.raises(TrainingDiverged, match=r"step 1, rank 0: .*samples: scene_train_\d+-00\d, scene_train"):
        NonFiniteGuard(run).leave_out(found, batches)
    after = run.model.trainable_state_dict()["segmentation_model.1.predictor.mask_embed.layers.0.weight"]
    assert torch.equal(before, after)


def test_an_infinite_gradient_stops_the_run(scene_shards: Path, tmp_path: Path) -> None:
    run, batches = step_setup(scene_shards, tmp_path)
    run.model.head.predictor.query_feat.weight.register_hook(lambda gradient: gradient * float("inf"))
    weights = [parameter.detach().clone() for parameter in run.model.parameters()]
    found = train_step(run, batches).non_finite
    assert found is not None and found.reason.startswith("grad_norm is")
    assert all(torch.equal(before, after) for before, after in zip(weights, run.model.parameters(), strict=True))


# -- several processes and the command line -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", [("decoder_head.type=m2f", "data.workers=1"), ("decoder_head.type=linear",), EOMT,
                                  pytest.param(PMT, marks=pytest.mark.stress)], ids=["m2f", "linear", "eomt", "pmt"])
def test_two_ranks_follow_the_loss_curve_of_one(scene_shards: Path, tmp_path: Path, head: tuple[str, ...]) -> None:
    """Equal global batch, two ranks against one process. (Ranks of torchrun are in test_survival.py.)"""
    common = ["--config", TINY, f"data.root={scene_shards}", "train.total_steps=20", *head]
    for name, ranks in (("one", 0), ("two", 2)):
        result = run_program("trainer/train.py", *common, f"output_dir={tmp_path / name}", ranks=ranks)
        assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 20
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), ours["step"]
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)
    ours, theirs = (next(r for r in read_metrics(tmp_path / name) if r["kind"] == "val") for name in ("one", "two"))
    assert ours["baseline_mIoU"] == theirs["baseline_mIoU"]  # the same two images, whoever looked at them
    run = tmp_path / "two"  # what the ranks found together is what the saved checkpoint gives alone
    result = run_program("trainer/eval.py", "--config", run / "config.yaml", "--checkpoint",
                         run / "checkpoints/step-00000020.pt", "--output", tmp_path / "eval")
    assert result.returncode == 0, result.stderr
    alone = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert {name: alone[name] for name in ("mIoU", "aAcc")} == {name: theirs[name] for name in ("mIoU", "aAcc")}


@pytest.mark.slow
def test_evaluate_and_predict_from_the_command_line(scenes: Path, finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoints/best.pt"
    result = run_program("trainer/eval.py", "--config", finished / "config.yaml", "--checkpoint", checkpoint,
                         "--output", tmp_path / "eval", "eval.max_images=null", "eval.tta_flip=true",
                         "eval.tta_ratios=[0.8,1.0]")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert f"mIoU {metrics['mIoU']:.4f}" in result.stdout and (tmp_path / "eval/panels.png").exists()
    scores = list(read_scores(tmp_path / "eval"))
    assert [(score.split, score.number) for score in scores] == [("val", number) for number in range(5)]
    assert min(score.accuracy for score in scores) <= metrics["aAcc"] <= max(score.accuracy for score in scores)
    images = [*sorted((scenes / "images/val").iterdir())[:2], tmp_path / "...jpg"]  # a name that Pillow cannot place
    shutil.copy(images[0], images[-1])
    result = run_program("trainer/predict.py", "--checkpoint", checkpoint, "--output", tmp_path / "out", *images)
    assert result.returncode == 0, result.stderr
    for image in images:
        with Image.open(image) as source, Image.open(tmp_path / "out" / f"{image.stem}.png") as predicted:
            assert predicted.size == source.size and np.asarray(predicted).max() < 8
        assert (tmp_path / "out" / f"{image.stem}-overlay.png").exists()


def test_an_image_beyond_memory_is_one_line_with_settings(finished: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9000, 9000, 3), np.uint8)).save(tmp_path / "huge.png")
    result = run_program("trainer/predict.py", "--checkpoint", finished / "checkpoints/best.pt", "--output",
                         tmp_path / "out", tmp_path / "huge.png", "--set", "eval.mode=whole",
                         limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30)))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(r"image of 9000x9000 pixels, 8 classes: out of memory .*Lower eval\.memory_gb .*eval\.crop_size",
                     result.stderr), result.stderr


@pytest.mark.slow
def test_a_huge_image_needs_no_more_memory_than_the_budget(finished: Path, tmp_path: Path) -> None:
    """49 megapixels and 8 classes: one map of all scores would be 1.6 GB, and several were needed."""
    Image.fromarray(np.zeros((7000, 7000, 3), np.uint8)).save(tmp_path / "huge.png")
    result = run_program("trainer/predict.py", "--checkpoint", finished / "checkpoints/best.pt", "--output",
                         tmp_path / "out", tmp_path / "huge.png", "--set", "eval.resize_short_side=64", "--set",
                         "eval.memory_gb=0.1",
                         limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_sharded_evaluation_over_ranks_counts_every_image_once(finished: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (0, 2):
        result = run_program("trainer/eval.py", "--config", finished / "config.yaml", "--checkpoint",
                             finished / "checkpoints/best.pt", "--output", tmp_path / str(ranks),
                             "eval.max_images=null", ranks=ranks)
        assert result.returncode == 0, result.stderr
        found.append(json.loads((tmp_path / str(ranks) / "metrics.json").read_text()))
    assert found[0] == found[1]  # 5 images over 2 ranks: uneven, and equal to the last digit


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    return line


@pytest.mark.slow
def test_command_line_mistakes_are_one_line(scene_shards: Path, finished: Path, tmp_path: Path) -> None:
    line = one_line_error(run_program("trainer/train.py"))
    assert "data.root and output_dir not set" in line and "torchrun --standalone" in line
    line = one_line_error(run_program("trainer/train.py", "--config", TINY, f"data.root={tmp_path}",
                                      f"output_dir={tmp_path / 'run'}"))
    assert "not a shard set" in line
    line = one_line_error(run_program("trainer/train.py", "--config", TINY, "train.total_step=3"))
    assert "Did you mean: 'total_steps'" in line
    line = one_line_error(run_program("trainer/predict.py", "--checkpoint", tmp_path / "no.pt", "--output", tmp_path,
                                      REPOSITORY / "README.md"))
    assert "no.pt does not exist" in line
    line = one_line_error(run_program("trainer/predict.py", "--output", tmp_path, "--checkpoint",
                                      finished / "checkpoints/best.pt", "eval.tta_flip=true"))
    assert "--set eval.tta_flip=true" in line
    line = one_line_error(run_program("trainer/eval.py", "--checkpoint", finished / "checkpoints/best.pt"))
    assert "data.root is not set" in line
    missing_backbone = run_program("trainer/train.py", f"data.root={scene_shards}", f"output_dir={tmp_path / 'r'}",
                                   f"backbone.source={tmp_path / 'vit'}")
    assert "vit" in one_line_error(missing_backbone)


@pytest.mark.slow
def test_no_process_outlives_a_killed_trainer(scene_shards: Path, tmp_path: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", "data.workers=2", "train.total_steps=100000")
    run.wait_for_step(1)
    assert len(run.loader_workers()) == 2
    run.process.kill()
    run.process.wait()
    run.assert_gone()


@pytest.mark.slow
def test_help_and_dry_run(scene_shards: Path, tmp_path: Path) -> None:
    text = run_program("trainer/train.py", "--help").stdout
    for name in ("train.global_batch_size = 16", "decoder_head.type = m2f", "eval.tta_flip = false", "--dry-run"):
        assert name in text
    result = run_program("trainer/train.py", "--config", TINY, f"data.root={scene_shards}",
                         f"output_dir={tmp_path / 'run'}", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "24 training samples" in result.stdout and "first sample: scene_train_" in result.stdout
    assert not (tmp_path / "run").exists()


def test_unlicensed_or_missing_backbones_say_what_to_do(scene_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.(source|random)"):
        train(tiny(scene_shards, tmp_path / "run", "backbone.random.hidden_size=null"), ALONE)
