"""Runs that start from a trained head, and evaluation and prediction with heads saved by other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shards.errors import ConfigError
from tests.conftest import RENAMED
from tests.runs.test_end_to_end import ALONE, TINY, one_line_error, run_program, tiny
from tests.support.hand_made import rename_classes
from trainer.build import build_model
from trainer.loop import train
from trainer.run.checkpoint import load_latest
from trainer.run.run import Run, run_places
from trainer.run.start import start_run


def started(root: Path, folder: Path, *overrides: str) -> Run:
    """A run as set up by `train`, before its first step."""
    config = tiny(root, folder, *overrides)
    return start_run(config, ALONE, run_places(config))


@pytest.fixture(scope="module")
def pretrained(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, from whose checkpoint the others start."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(tiny(scene_shards, folder, "train.total_steps=2"), ALONE)
    return folder


@pytest.fixture(scope="module")
def full_model(scene_shards: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as one file in Meta's layout, as another program would save it."""
    path = tmp_path_factory.mktemp("foreign") / "model_final.pth"
    checkpoint = load_latest(pretrained / "checkpoints")
    assert checkpoint is not None
    model = build_model(tiny(scene_shards, pretrained), len(checkpoint.classes))
    model.load_trainable_state_dict(checkpoint.model)
    torch.save({"model": model.meta_state_dict(), "optimizer": {}}, path)
    return path


def test_a_new_run_starts_from_the_weights_and_a_continued_one_does_not(
    scene_shards: Path, pretrained: Path, full_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_latest(pretrained / "checkpoints")
    assert checkpoint is not None
    for source in (pretrained / "checkpoints/best.pt", full_model):
        run = started(scene_shards, tmp_path / "new", f"load.weights={source}")
        assert run.step == 0 and not run.optimizer.state
        state = run.model.trainable_state_dict()
        assert all(torch.equal(state[key], value) for key, value in checkpoint.model.items())
        assert f"{source}: loaded {len(state)} tensors of adapter and head\n" in capsys.readouterr().out
    run = started(scene_shards, pretrained, "load.weights=/nowhere.pth")  # it has a checkpoint: nothing else is read
    assert run.step == 2


def test_ignored_weights_are_announced_and_random(
    scene_shards: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (f"load.weights={pretrained / 'checkpoints/best.pt'}", "load.ignore=['*.class_embed.*']")
    state = started(scene_shards, tmp_path, *weights).model.trainable_state_dict()
    printed = capsys.readouterr().out
    fresh = started(scene_shards, tmp_path).model.trainable_state_dict()
    key = "segmentation_model.1.predictor.class_embed.weight"
    assert f"randomly initialised because of load.ignore: {key.replace('weight', 'bias')}, {key}" in printed
    assert torch.equal(state[key], fresh[key])
    loaded = key.replace("class_embed", "query_feat")
    assert not torch.equal(state[loaded], fresh[loaded])


def test_a_head_of_other_classes_is_the_start_of_the_next_stage(
    scene_shards: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the classifier is loaded, and what is new is said; names tell whether equally many are the same."""
    checkpoint = load_latest(pretrained / "checkpoints")
    assert checkpoint is not None
    weights = f"load.weights={pretrained / 'checkpoints/best.pt'}"
    nine = rename_classes(scene_shards, tmp_path / "nine", [*RENAMED, "ninth"])
    with pytest.raises(ConfigError, match=r"another shape: .*class_embed.*other classes, name the classifier in load"):
        started(nine, tmp_path / "run", weights)
    run = train(tiny(nine, tmp_path / "run", weights, "load.ignore=['*class_embed*']", "train.total_steps=1",
                     "optimizer.lr=0"), ALONE)
    keys = [f"segmentation_model.1.predictor.class_embed.{name}" for name in ("bias", "weight")]
    printed = capsys.readouterr().out
    assert f"randomly initialised because of load.ignore: {', '.join(keys)}" in printed
    state = run.model.trainable_state_dict()
    assert state[keys[0]].shape == (10,) and checkpoint.model[keys[0]].shape == (9,)  # and "no object"
    assert all(torch.equal(state[key], value) for key, value in checkpoint.model.items()
               if key not in keys and "running" not in key and "num_batches" not in key)
    other_names = "its classes have other names than those of data.root, or another order"
    assert other_names not in printed
    started(rename_classes(scene_shards, tmp_path / "renamed", RENAMED), tmp_path / "again", weights)
    assert other_names in capsys.readouterr().out
    started(scene_shards, tmp_path / "same", weights)
    assert other_names not in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "message"), [
    (["load.weights=/nowhere.pth"], r"nowhere\.pth does not exist"),
    (["load.ignore=['*']"], r"load\.weights is not set"),
    (["load.weights={}", "load.ignore=['*classembed*']"], "matches no key"),
    (["load.weights={}", "decoder_head.num_queries=9"], r"of another shape: .*query_embed\.weight \(8, 32\) instead"),
    (["load.weights={}", "backbone.random.seed=1"], "trained on another ViT"),
    (["load.weights={}", "decoder_head.type=linear"], "missing: .*unexpected: "),
])
def test_weights_that_do_not_fit_stop_the_run(
    scene_shards: Path, pretrained: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    best = pretrained / "checkpoints/best.pt"
    with pytest.raises(ConfigError, match=message):
        started(scene_shards, tmp_path, *(override.format(best) for override in overrides))


@pytest.mark.slow
def test_evaluate_and_predict_with_a_head_of_another_program(
    scenes: Path, scene_shards: Path, pretrained: Path, full_model: Path, tmp_path: Path
) -> None:
    found: list[dict[str, Any]] = []
    for name, checkpoint in (("ours", pretrained / "checkpoints/best.pt"), ("theirs", full_model)):
        result = run_program("trainer/eval.py", "--config", TINY, "--checkpoint", checkpoint, "--output",
                             tmp_path / name, f"data.root={scene_shards}")
        assert result.returncode == 0, result.stderr
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert found[0]["per_class_iou"] == found[1]["per_class_iou"] and found[1]["step"] is None

    image = sorted((scenes / "images/val").iterdir())[0]
    foreign = ("--checkpoint", full_model, "--output", tmp_path / "theirs", image)
    result = run_program("trainer/predict.py", *foreign, "--config", TINY, "--classes", scenes / "classes.txt")
    assert result.returncode == 0, result.stderr
    result = run_program("trainer/predict.py", "--checkpoint", pretrained / "checkpoints/best.pt", "--output",
                         tmp_path / "ours", image)
    assert result.returncode == 0, result.stderr
    for name in (f"{image.stem}.png", f"{image.stem}-overlay.png"):
        with Image.open(tmp_path / "ours" / name) as ours, Image.open(tmp_path / "theirs" / name) as theirs:
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    ours, theirs = (json.loads((tmp_path / name / "predicted-with.json").read_text()) for name in ("ours", "theirs"))
    assert ours["classes"] == theirs["classes"]
    assert "contains only weights; also give --config" in one_line_error(run_program("trainer/predict.py", *foreign))


@pytest.mark.slow
def test_settings_of_a_foreign_head_are_refused_for_ours(pretrained: Path, tmp_path: Path) -> None:
    result = run_program("trainer/predict.py", "--checkpoint", pretrained / "checkpoints/best.pt", "--output", tmp_path,
                         "--config", TINY, TINY)
    assert "contains its own settings and classes; leave out --config" in one_line_error(result)
