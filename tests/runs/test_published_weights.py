"""Evaluation, prediction, fine-tuning and export of heads as others publish them, through the commands a user types."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EomtConfig, EomtForUniversalSegmentation

from shards.errors import ConfigError
from tests.runs.test_end_to_end import ALONE, PMT, TINY, one_line_error, run_program, tiny
from tests.unit.test_trainer_models_backbones_dinov2 import classes, vit
from tests.unit.test_trainer_models_pmt import published as pmt_file
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.exporting.meta import write_meta_files
from trainer.loop import train
from trainer.pretrained import Pretrained, load_pretrained

CLASSES = 8  # of the scenes
HEAD = ("decoder_head.type=eomt", "decoder_head.num_queries=6", "decoder_head.num_blocks=2", "backbone.trainable=true")


@pytest.fixture(scope="module")
def eomt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like tue-mps/ade20k_semantic_eomt_large_512, small and random."""
    folder = tmp_path_factory.mktemp("eomt")
    torch.manual_seed(0)
    EomtForUniversalSegmentation(EomtConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, num_register_tokens=4, num_blocks=2,
        num_queries=6, image_size=64, patch_size=16, num_labels=CLASSES)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_evaluate_predict_export_and_fine_tune_a_published_eomt(
    scenes: Path, scene_shards: Path, eomt: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join(["backbone:", f"  source: {eomt}", "  trainable: true", "decoder_head:", "  type: eomt",
                                 "  num_queries: 6", "  num_blocks: 2", "eval:", "  reference: eomt",
                                 "  crop_size: 64", "  max_images: 2"]))
    result = run_program("trainer/eval.py", "--config", recipe, "--checkpoint", eomt, "--output", tmp_path / "eval",
                         f"data.root={scene_shards}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert 0 <= metrics["mIoU"] <= 1 and metrics["step"] is None

    image = sorted((scenes / "images/val").iterdir())[0]
    foreign = ("--config", recipe, "--classes", scenes / "classes.txt")
    result = run_program("trainer/export.py", "--checkpoint", eomt, *foreign, "--output", tmp_path / "exported",
                         "--formats", "directory", "meta")
    assert result.returncode == 0, result.stderr
    for name, words in (("published", (eomt, *foreign)), ("exported", (tmp_path / "exported",))):
        result = run_program("trainer/predict.py", "--checkpoint", *words, "--output", tmp_path / name, image)
        assert result.returncode == 0, result.stderr
    one, other = (np.asarray(Image.open(tmp_path / name / f"{image.stem}.png")) for name in ("published", "exported"))
    assert np.array_equal(one, other)

    run = train(tiny(scene_shards, tmp_path / "run", f"backbone.source={eomt}", *HEAD, f"load.weights={eomt}",
                     "backbone.random.hidden_size=null", "train.total_steps=2"), ALONE)
    assert run.step == 2
    again = load_pretrained(tmp_path / "run/checkpoints/best.pt").model.trainable_state_dict()
    assert "segmentation_model.0.backbone.pos_embed" in again, "in the layout of Meta's DINOv2"
    assert all(torch.equal(value, again[key]) for key, value in run.model.trainable_state_dict().items())


@pytest.mark.slow
def test_a_pmt_file_needs_the_vit_it_was_trained_on_and_its_own_sizes(scene_shards: Path, tmp_path: Path) -> None:
    run = train(tiny(scene_shards, tmp_path / "run", *PMT, "train.total_steps=2"), ALONE)
    published = pmt_file(run.model, tmp_path / "pytorch_model.bin")
    words = ("--config", TINY, "--output", tmp_path / "eval", f"data.root={scene_shards}", *PMT)
    found = []
    for checkpoint in (published, tmp_path / "run/checkpoints/best.pt"):
        result = run_program("trainer/eval.py", "--checkpoint", checkpoint, *words)
        assert result.returncode == 0, result.stderr
        found.append(json.loads((tmp_path / "eval/metrics.json").read_text())["per_class_iou"])
    assert found[0] == found[1]
    more = run_program("trainer/eval.py", "--checkpoint", published, *words, "decoder_head.dec_layers=3")
    line = one_line_error(more)
    assert "do not fit this model; missing: segmentation_model.1.blocks.2" in line
    line = one_line_error(run_program("trainer/train.py", "--config", TINY, f"data.root={scene_shards}",
                                      f"output_dir={tmp_path / 'new'}", f"load.weights={published}"))
    assert "do not fit this model" in line


@pytest.mark.slow
def test_a_run_on_a_frozen_dinov2_resumes_and_knows_its_vit(scene_shards: Path, tmp_path: Path) -> None:
    vit(4).save_pretrained(tmp_path / "vit")
    vit(4, seed=1).save_pretrained(tmp_path / "other")
    settings = ("backbone.random.hidden_size=null", *PMT)
    words = ("--config", TINY, f"data.root={scene_shards}", f"output_dir={tmp_path / 'run'}", *settings)
    for total in (2, 4):
        result = run_program("trainer/train.py", *words, f"backbone.source={tmp_path / 'vit'}",
                             f"train.total_steps={total}")
        assert result.returncode == 0, result.stderr
    best = tmp_path / "run/checkpoints/best.pt"
    state = torch.load(best, weights_only=True)["model"]
    assert not any("backbone" in key for key in state), "a frozen ViT is not stored"
    evaluation = ("trainer/eval.py", "--config", tmp_path / "run/config.yaml", "--checkpoint", best, "--output",
                  tmp_path / "eval")
    assert run_program(*evaluation).returncode == 0
    line = one_line_error(run_program(*evaluation, f"backbone.source={tmp_path / 'other'}"))
    assert "but the head was trained on" in line


def test_metas_layout_is_not_written_for_a_vit_that_it_cannot_describe(tmp_path: Path) -> None:
    vit(num_attention_heads=4).save_pretrained(tmp_path / "vit")
    config = load_run_config(None, [f"backbone.source={tmp_path / 'vit'}", "decoder_head.type=linear"])
    pretrained = Pretrained(model=build_model(config, CLASSES), config=config, classes=classes(CLASSES))
    with pytest.raises(ConfigError, match=r"does not contain the number of heads; it is 4, legal at this width: 2"):
        write_meta_files(pretrained, tmp_path)
