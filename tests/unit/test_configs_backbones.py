"""Head sizes for the published ViTs: configs/backbones/*.yaml applied on top of the recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DINOv3ViTModel

from preprocess.config import PreprocessConfig
from shards.cli.config_file import load_config
from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.model_config import BackboneConfig
from trainer.models import Segmenter
from trainer.models.backbones.dinov2_keys import RELEASED_DINOV2, build_dinov2
from trainer.models.backbones.dinov3_keys import RELEASED_VITS

CONFIGS = REPOSITORY / "configs"
PRESETS = sorted((CONFIGS / "backbones").glob("*.yaml"))


def on_meta(monkeypatch: pytest.MonkeyPatch, recipe: str, preset: Path, *overrides: str) -> Segmenter:
    """The configured model for 150 classes, without memory or downloading the preset's ViT."""
    def vit(config: BackboneConfig) -> tuple[Any, dict[str, torch.Tensor]]:
        assert config.source is not None
        if preset.stem.startswith("dinov2-"):
            size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[preset.stem[-3]]
            assert config.source == f"facebook/dinov2-{size}"
            return build_dinov2(RELEASED_DINOV2[preset.stem.removeprefix("dinov2-")].config()), {}
        assert preset.stem in config.source
        return DINOv3ViTModel(RELEASED_VITS[preset.stem].config()), {}

    monkeypatch.setattr("trainer.models.backbones.sources.load_vit", vit)
    config = load_run_config([CONFIGS / f"config-ade20k-{recipe}-training.yaml", preset], list(overrides))
    with torch.device("meta"):
        return build_model(config, 150)


def trainable(model: Segmenter) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_every_published_vit_has_a_preset() -> None:
    dinov2 = {f"dinov2-{name}" for name in RELEASED_DINOV2 if not name.endswith("_reg4")}  # the same heads
    assert {preset.stem for preset in PRESETS} == RELEASED_VITS.keys() | dinov2


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_parameters_they_claim(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = re.search(r"([\d.]+) M trainable", preset.read_text())
    assert claimed is not None
    model = on_meta(monkeypatch, "m2f", preset)
    assert trainable(model) / 1e6 == pytest.approx(float(claimed[1]), abs=0.05)
    if preset.stem in ("vits16", "dinov2-vits14"):
        assert trainable(model) < 20e6
    depth = model.backbone.depth
    first = 4 if depth == 24 else depth // 4 - 1
    assert model.backbone.layers == [first, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_no_recipe_claims_a_number_that_was_not_made_with_it(path: Path) -> None:
    """Configurations quote nobody's mIoU, as recipes differ; ADE20K recipes say how they differ."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"mIoU\D{0,40}\d\d\.\d|\d\d\.\d\s*(?:/ [\d.]+ )?mIoU", text)
    if path.name.startswith("config-ade20k"):
        assert re.search("[Dd]ifference|publishes no training recipe", text)


def test_the_eomt_recipe_says_what_is_published() -> None:
    """The facts of tue-mps/eomt's ADE20K recipe (DINOv3-L, 512), setting by setting."""
    config = load_run_config(CONFIGS / "config-ade20k-eomt-training.yaml", [])
    optimizer, head = config.optimizer, config.decoder_head
    assert (optimizer.schedule, optimizer.lr, optimizer.power) == ("poly_after_warmup", 2e-4, 0.9)
    assert (optimizer.warmup_steps, optimizer.backbone_warmup_steps) == (2000, 3000)
    assert (optimizer.weight_decay, optimizer.decay_all, optimizer.layer_decay) == (0.05, True, 1.0)
    assert list(head.mask_annealing_starts) == [0, 6520, 9780, 13040]
    assert list(head.mask_annealing_ends) == [3000, 9780, 13040, 16300]
    assert config.data.hue_degrees == 18 and config.train.total_steps == 16 * (20210 // 16)
    crops = load_config(PreprocessConfig, CONFIGS / "ade20k-eomt-shards.yaml").crops
    assert (crops.scaled_side, crops.cat_max_ratio, crops.min_scale, crops.max_scale) == ("long", None, 0.5, 2.0)


def test_the_pmt_recipe_says_what_is_published() -> None:
    """The facts of tue-mps/pmt's ADE20K recipe (DINOv3-L, 512), setting by setting."""
    config = load_run_config(CONFIGS / "config-ade20k-pmt-training.yaml", [])
    head, optimizer = config.decoder_head, config.optimizer
    assert not config.backbone.trainable and config.backbone.rope_rescale is None
    assert (head.dec_layers, head.block_ffn, head.num_upscale_blocks, head.num_queries) == (6, 1024, 2, 100)
    assert list(head.mask_annealing_starts) == [0, 5384, 7403, 9422, 11442, 13461]
    assert list(head.mask_annealing_ends) == [3000, 8749, 10769, 12788, 14807, 16826]
    assert (optimizer.schedule, optimizer.lr, optimizer.warmup_steps) == ("poly_after_warmup", 2e-4, 6000)
    assert config.train.total_steps == 16 * (20210 // 16) and config.train.global_batch_size == 16


def test_the_eomt_recipe_on_dinov2_says_what_is_published() -> None:
    """The facts of tue-mps/eomt's ADE20K recipe (DINOv2-L with registers, 512), setting by setting."""
    config = load_run_config(CONFIGS / "config-ade20k-eomt-dinov2-training.yaml", [])
    optimizer, head = config.optimizer, config.decoder_head
    assert (optimizer.lr, optimizer.layer_decay, optimizer.warmup_steps, optimizer.backbone_warmup_steps) == (
        1e-4, 0.8, 500, 1000)
    assert list(head.mask_annealing_starts) == [6520, 13040, 19560, 26080]
    assert list(head.mask_annealing_ends) == [13040, 19560, 26080, 32600]
    assert config.train.total_steps == 31 * (20210 // 16) and config.backbone.trainable


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_go_with_every_recipe(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = on_meta(monkeypatch, "linear", preset)
    dim = linear.backbone.embed_dim
    assert trainable(linear) == 2 * dim + 150 * (dim + 1)  # batch norm and one convolution
    eomt = on_meta(monkeypatch, "eomt", preset)
    assert trainable(eomt) > sum(parameter.numel() for parameter in eomt.backbone.parameters()) - dim - 1
    assert eomt.segmentation_model[0].num_blocks == {12: 3, 24: 4, 32: 4, 40: 5}[eomt.backbone.depth]
    pmt = on_meta(monkeypatch, "pmt", preset)
    depth = pmt.backbone.depth
    assert pmt.backbone.layers == [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]
    assert len(pmt.head.blocks) == 6 and pmt.head.blocks[0].mlp.up_proj.out_features == 1024
    assert trainable(pmt) == sum(parameter.numel() for parameter in pmt.head.parameters())


def test_layer_choices_of_the_linear_head(monkeypatch: pytest.MonkeyPatch) -> None:
    for layers, taps in (("LAST", 1), ("FOUR_LAST", 4), ("FOUR_EVEN_INTERVALS", 4)):
        model = on_meta(monkeypatch, "linear", PRESETS[0], f"backbone.layers={layers}")
        assert len(model.backbone.layers) == taps
        assert trainable(model) == taps * (2 + 150) * model.backbone.embed_dim + 150
    with pytest.raises(ConfigError, match="needs features of four layers"):
        on_meta(monkeypatch, "m2f", PRESETS[0], "backbone.layers=LAST")
