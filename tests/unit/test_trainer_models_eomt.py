"""EoMT: the same numbers as transformers' class, and what training needs besides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.models import Segmenter
from trainer.models.eomt import EomtHead, masking_shares
from trainer.models.weights import read_weights
from trainer.optimizer import learning_rate, param_groups

CLASSES, QUERIES = 5, 7
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48,
         "num_register_tokens": 3, "num_blocks": 2, "num_queries": QUERIES, "image_size": 64}


def published(folder: Path, gated: bool = False, seed: int = 0, **changes: Any) -> EomtDinov3ForUniversalSegmentation:
    """A random model of transformers' class in eval mode, saved to `folder`; every weight far from its default."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SIZES, "num_labels": CLASSES, "use_gated_mlp": gated,
                             "hidden_act": "silu" if gated else "gelu", "pos_embed_rescale": None, **changes}
    model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def settings(folder: Path | None, *overrides: str) -> RunConfig:
    source = f"backbone.source={folder}" if folder else "backbone.random.hidden_size=32"
    return load_run_config(None, [
        source, "decoder_head.type=eomt", f"decoder_head.num_queries={QUERIES}", "decoder_head.num_blocks=2",
        "backbone.trainable=true", "loss.matched_gradients=false", *overrides])


def ours(folder: Path, *overrides: str) -> Segmenter:
    model = build_model(settings(folder, *overrides), CLASSES)
    model.load_weights(read_weights(folder))
    return model.eval()


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def set_masking(theirs: EomtDinov3ForUniversalSegmentation, folder: Path, shares: list[float]) -> None:
    theirs.attn_mask_probs.copy_(torch.tensor(shares))
    theirs.save_pretrained(folder)


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("shares", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], ids=str)
def test_outputs_equal_those_of_transformers(gated: bool, shares: list[float], tmp_path: Path) -> None:
    theirs = published(tmp_path, gated)
    set_masking(theirs, tmp_path, shares)
    model = ours(tmp_path)
    with torch.no_grad():
        expected, outputs = theirs(images()), model(images())
    torch.testing.assert_close(outputs["pred_logits"], expected.class_queries_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    assert "aux_outputs" not in outputs


def test_training_masks_the_share_that_transformers_masks_and_evaluation_draws_nothing(tmp_path: Path) -> None:
    theirs = published(tmp_path)
    set_masking(theirs, tmp_path, [0.4, 0.4])
    model = ours(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(images())["pred_masks"], model(images())["pred_masks"])
        torch.manual_seed(3)
        expected = theirs.train()(images()).masks_queries_logits
        torch.manual_seed(3)
        torch.testing.assert_close(model.train()(images())["pred_masks"], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(images())["pred_masks"], expected, rtol=1e-2), "another draw"


def test_masking_and_epsilon_matter(tmp_path: Path) -> None:
    """The comparison above notices a missing mask, or a different layer norm epsilon."""
    theirs = published(tmp_path / "a", layer_norm_eps=1e-2)
    model = ours(tmp_path / "a")
    expected = theirs(images()).masks_queries_logits
    assert model.backbone.layer_norm_eps == 1e-2
    torch.testing.assert_close(model(images())["pred_masks"], expected, rtol=1e-4, atol=1e-4)
    model.head.set_progress(1.0, 1)
    assert not torch.allclose(model(images())["pred_masks"], expected, rtol=1e-2)
    published(tmp_path / "b")
    assert ours(tmp_path / "a").backbone.weights_sha256() != ours(tmp_path / "b").backbone.weights_sha256()


def test_sizes_that_are_not_square(tmp_path: Path) -> None:
    """transformers' class supports one square grid; with the other grid set by hand, it agrees with ours."""
    theirs = published(tmp_path)
    theirs.grid_size = (3, 5)
    model = ours(tmp_path)
    with torch.no_grad():
        expected, outputs = theirs(images(48, 80)), model(images(48, 80))
    assert outputs["pred_masks"].shape == (2, QUERIES, 12, 20)
    torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="multiples of 16"):
        model(images(40, 64))


def test_losses_and_gradients_equal_those_of_transformers(tmp_path: Path) -> None:
    """All predictions (final and auxiliary), through a loss that needs no random points."""
    theirs, model = published(tmp_path), ours(tmp_path)
    theirs.train()
    model.train()
    outputs = model(images())
    predictions = [outputs, *outputs["aux_outputs"]]
    assert len(predictions) == 3
    sum(item["pred_masks"].square().mean() + item["pred_logits"].square().mean() for item in predictions).backward()
    collected: list[Tensor] = []
    predict = theirs.predict
    theirs.predict = lambda tokens: collected.extend(predict(tokens)) or tuple(collected[-2:])
    theirs(images())
    sum((item.square().mean() for item in collected), torch.zeros(())).backward()
    assert len(collected) == 6
    for name, parameter in model.head.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
    mlp = model.backbone.vit.model.layer[0].mlp.up_proj.weight
    torch.testing.assert_close(mlp.grad, theirs.layers[0].mlp.up_proj.weight.grad, rtol=1e-3, atol=1e-4)


def test_a_frozen_vit_still_trains_the_queries_in_front(tmp_path: Path) -> None:
    model = build_model(settings(None, "backbone.trainable=false"), CLASSES).train()
    outputs = model(images())
    sum(item["pred_masks"].mean() + item["pred_logits"].mean()
        for item in (outputs, *outputs["aux_outputs"])).backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert model.head.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("head", ["eomt", "m2f", "linear"])
def test_a_trainable_vit_gets_all_its_gradients_and_stays_in_evaluation_mode(head: str) -> None:
    """Every trainable parameter must get a gradient, or DDP would wait for it."""
    of_head = {"m2f": ("decoder_head.hidden_dim=32", "decoder_head.enc_layers=1", "decoder_head.dec_layers=1"),
               "linear": ("decoder_head.use_cls_token=true",), "eomt": ()}
    config = settings(None, f"decoder_head.type={head}", *of_head[head], "adapter.deform_num_heads=4",
                      "adapter.drop_path=0")
    model = build_model(config, CLASSES).train()
    assert not model.backbone.vit.training
    outputs = model(images(64, 96))
    predictions = [outputs, *outputs.get("aux_outputs", ())]
    sum(value.square().mean() for item in predictions for name, value in item.items()
        if name != "aux_outputs").backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not {name for name, parameter in trainable.items() if parameter.grad is None}
    assert not model.backbone.vit.embeddings.mask_token.requires_grad


def test_annealing_follows_the_published_spacing() -> None:
    """EoMT's ADE20K recipe: blocks fade from step 3317, 8292, 13268, 18243 to 6634, 11609, 16585, 21560 of 26535."""
    total, window = 26535, (0.125, 0.8125)
    for block, (start, end) in enumerate([(3317, 6634), (8292, 11609), (13268, 16585), (18243, 21560)]):
        assert masking_shares((start - 2) / total, 4, window)[block] == 1.0
        assert masking_shares((end + 2) / total, 4, window)[block] == 0.0
        middle = masking_shares((start + end) / 2 / total, 4, window)[block]
        assert middle == pytest.approx(0.5**0.9, abs=1e-3)
    assert masking_shares(0.0, 1, window) == [1.0] and masking_shares(1.0, 1, window) == [0.0]
    shares = [masking_shares(step / 100, 3, window) for step in range(101)]
    assert all(first <= second <= third for first, second, third in shares), "first blocks fade first"


def test_blocks_fade_between_steps_of_their_own() -> None:
    """The recipe that tue-mps/eomt publishes for ADE20K, with shares by hand: (1 - t)^0.9 inside of each interval."""
    config = load_run_config(REPOSITORY / "configs" / "config-ade20k-eomt-training.yaml", []).decoder_head
    head = build_model(settings(None, "decoder_head.num_blocks=4",
                                f"decoder_head.mask_annealing_starts={list(config.mask_annealing_starts)}",
                                f"decoder_head.mask_annealing_ends={list(config.mask_annealing_ends)}"), CLASSES).head
    assert isinstance(head, EomtHead)
    table = {0: (1, 1, 1, 1), 1: ((2999 / 3000) ** 0.9, 1, 1, 1), 1500: (0.5**0.9, 1, 1, 1), 3000: (0, 1, 1, 1),
             6520: (0, 1, 1, 1), 8150: (0, 0.5**0.9, 1, 1), 9780: (0, 0, 1, 1), 12225: (0, 0, 0.25**0.9, 1),
             13040: (0, 0, 0, 1), 16299: (0, 0, 0, (1 / 3260) ** 0.9), 16300: (0, 0, 0, 0), 20207: (0, 0, 0, 0)}
    for step, shares in table.items():
        for total in (20208, 30000):  # the length of the run does not matter
            head.set_progress(step, total)
            assert head.attn_mask_probs.tolist() == pytest.approx(list(shares), rel=1e-6), step
            assert head._masked_in_training == [share > 0 for share in shares]


@pytest.mark.parametrize(("starts", "ends"), [([0], [5, 6]), ([0, 1], []), ([], [3, 4]), ([0, 4], [3, 4])])
def test_intervals_that_do_not_fit_the_blocks_are_refused(starts: list[int], ends: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"mask_annealing_starts is \[.*2 steps each, one per block .num_bl"):
        settings(None, f"decoder_head.mask_annealing_starts={starts}", f"decoder_head.mask_annealing_ends={ends}")


def test_masking_shares_travel_with_the_weights(tmp_path: Path) -> None:
    model = build_model(settings(None), CLASSES)
    model.head.set_progress(0.7, 1)
    state = model.trainable_state_dict()
    other = build_model(settings(None, "backbone.random.seed=1"), CLASSES)
    other.load_trainable_state_dict(state)
    assert isinstance(other.head, EomtHead) and isinstance(model.head, EomtHead)
    assert other.head._masked_in_training == model.head._masked_in_training == [False, True]
    assert torch.equal(other.head.attn_mask_probs, model.head.attn_mask_probs)
    assert other.backbone.weights_sha256() == model.backbone.weights_sha256(), "a trained ViT is part of the state"


def test_published_weights_are_refused_key_by_key(tmp_path: Path) -> None:
    published(tmp_path)
    weights = read_weights(tmp_path)
    with pytest.raises(ConfigError, match=r"of another shape: segmentation_model\.1\.query\.weight \(7, 32\) instead"):
        build_model(settings(tmp_path, "decoder_head.num_queries=9"), CLASSES).load_weights(weights)
    with pytest.raises(ConfigError, match=r"missing: segmentation_model\.1\.upscale_block\.block\.2"):
        build_model(settings(tmp_path, "decoder_head.num_upscale_blocks=3"), CLASSES).load_weights(weights)
    with pytest.raises(ConfigError, match="num_blocks is 5, legal: at most the 4 blocks"):
        build_model(settings(tmp_path, "decoder_head.num_blocks=5"), CLASSES)
    other = build_model(settings(None, "backbone.trainable=false"), CLASSES)
    with pytest.raises(ConfigError, match=r"the layer_norm_eps of the ViT in .* is 1e-06, of the configured"):
        other.load_weights(weights)
    model = build_model(settings(tmp_path), CLASSES + 1)
    kept = model.load_weights(weights, ignore=["*class_predictor.*"])
    assert kept == ["segmentation_model.1.class_predictor.bias", "segmentation_model.1.class_predictor.weight"]


@pytest.mark.parametrize(("change", "message"), [
    ('"patch_size": 14', "patch_size is 14, legal: 16"),
    ('"hidden_act": "relu"', "hidden_act is 'relu', legal: 'gelu'"),
    ('"model_type": "eomt_x"', "a model of type 'eomt_x', legal: eomt_dinov3, eomt, maskstream"),
    ('"num_attention_heads": "two"', "config.json is not a valid configuration"),
])
def test_other_settings_than_dinov3s_are_refused(change: str, message: str, tmp_path: Path) -> None:
    published(tmp_path)
    config = tmp_path / "config.json"
    name = change.split(":")[0]
    lines = [f"  {change}," if line.strip().startswith(name) else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path)


def test_layer_decay_and_the_vits_own_warmup() -> None:
    config = settings(None, "optimizer.layer_decay=0.5", "optimizer.warmup_steps=10",
                      "optimizer.backbone_warmup_steps=10", "optimizer.lr=1", "optimizer.power=0").optimizer
    model = build_model(settings(None), CLASSES)
    names = {id(parameter): name for name, parameter in model.backbone.vit.named_parameters()}
    scales = {names.get(id(parameter), "head"): group["lr_scale"]
              for group in param_groups(model, config) for parameter in group["params"]}
    assert scales["head"] == scales["norm.weight"] == 1.0
    assert [scales[f"model.layer.{block}.mlp.up_proj.weight"] for block in range(4)] == [0.125, 0.25, 0.5, 1.0]
    assert scales["embeddings.cls_token"] == scales["embeddings.patch_embeddings.weight"] == 0.0625
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in param_groups(model, config)) == trainable
    assert [learning_rate(step, config, 100) for step in (0, 9, 30)] == pytest.approx([0.1, 1.0, 1.0])
    assert [learning_rate(step, config, 100, is_vit=True) for step in (9, 10, 19, 30)] == pytest.approx([0, 0.1, 1, 1])
    together = replace(config, backbone_warmup_steps=0)
    assert learning_rate(4, together, 100, is_vit=True) == learning_rate(4, together, 100)


def test_settings_of_a_trainable_vit_are_refused_for_a_frozen_one() -> None:
    with pytest.raises(ConfigError, match=r"layer_decay is 0\.8 but the backbone is frozen; set backbone\.trainable"):
        settings(None, "backbone.trainable=false", "optimizer.layer_decay=0.8")
    with pytest.raises(ConfigError, match=r"backbone_warmup_steps is 5, legal with schedule one_cycle: 0"):
        settings(None, "optimizer.backbone_warmup_steps=5", "optimizer.schedule=one_cycle")
    with pytest.raises(ConfigError, match=r"mask_annealing is .*the first below the second"):
        settings(None, "decoder_head.mask_annealing=[0.5,0.5]")
