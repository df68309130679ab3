"""The networks alone: shapes, freezing, gradients, errors. Needs no recorded data except the key lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.build import build_model
from trainer.config import LossConfig, RunConfig
from trainer.model_config import AdapterConfig, BackboneConfig, DecoderHeadConfig, RandomBackboneConfig
from trainer.models import Segmenter
from trainer.models.adapter import DINOv3Adapter, DropPath
from trainer.models.backbones.base import tapped_layers
from trainer.models.backbones.dinov3 import DINOv3Backbone
from trainer.models.backbones.sources import build_backbone
from trainer.models.deform_attn import MSDeformAttn, deformable_sampling, pixel_centers
from trainer.models.heads import LinearHead
from trainer.models.mask_decoder import MultiheadAttention, allowed_positions, blocked_positions
from trainer.models.pixel_decoder import sine_position_code

CLASSES = 5
QUERIES = 6
DEC_LAYERS = 3
RANDOM_VIT = RandomBackboneConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
ADAPTER = AdapterConfig(conv_inplane=8, drop_path=0.0)
M2F = DecoderHeadConfig(hidden_dim=32, num_queries=QUERIES, nheads=4, enc_layers=1, enc_ffn=32, dec_layers=DEC_LAYERS,
                        dec_ffn=32)
LINEAR = DecoderHeadConfig(type="linear", dropout=0.0)


def make_model(head: DecoderHeadConfig = M2F, layers: str = "FOUR_EVEN_INTERVALS", seed: int = 0) -> Segmenter:
    """A tiny model; the same seed gives the same weights."""
    torch.manual_seed(seed)
    backbone = BackboneConfig(random=RANDOM_VIT, layers=layers)
    loss = LossConfig(matched_gradients=False)  # masks in the graph, to be differentiated here
    return build_model(RunConfig(backbone=backbone, adapter=ADAPTER, decoder_head=head, loss=loss), CLASSES)


def make_images(batch: int = 2, height: int = 64, width: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def all_predictions_loss(outputs: dict[str, Any]) -> Tensor:
    """A smooth loss that depends on every prediction, averaged over the batch."""
    if "logits" in outputs:
        return (outputs["logits"] ** 3).mean()
    return torch.stack([(prediction[name] ** 2).mean() for prediction in [outputs, *outputs["aux_outputs"]]
                        for name in ("pred_logits", "pred_masks")]).sum()


# --------------------------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize(("depth", "choice", "expected"), [
    (12, "FOUR_EVEN_INTERVALS", [2, 5, 8, 11]),
    (24, "FOUR_EVEN_INTERVALS", [4, 11, 17, 23]),
    (32, "FOUR_EVEN_INTERVALS", [7, 15, 23, 31]),
    (40, "FOUR_EVEN_INTERVALS", [9, 19, 29, 39]),
    (4, "FOUR_EVEN_INTERVALS", [0, 1, 2, 3]),
    (24, "FOUR_LAST", [20, 21, 22, 23]),
    (2, "LAST", [1]),
])
def test_tapped_layers(depth: int, choice: str, expected: list[int]) -> None:
    assert tapped_layers(depth, choice) == expected


def test_four_layers_of_a_shallow_vit_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 blocks, the backbone has 3"):
        tapped_layers(3, "FOUR_LAST")


def test_random_backbone_is_deterministic_and_leaves_the_global_rng_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build_backbone(BackboneConfig(random=RANDOM_VIT))
    assert torch.equal(torch.rand(3), expected)
    assert build_backbone(BackboneConfig(random=RANDOM_VIT)).weights_sha256() == first.weights_sha256()


def test_weights_sha256_sees_one_changed_weight() -> None:
    backbone = build_backbone(BackboneConfig(random=RANDOM_VIT))
    before = backbone.weights_sha256()
    backbone(make_images())
    assert backbone.weights_sha256() == before
    with torch.no_grad():
        backbone.vit.norm.bias[0] += 1e-6
    assert backbone.weights_sha256() != before


def test_backbone_from_a_directory_equals_the_saved_one(tmp_path: Path) -> None:
    backbone = build_backbone(BackboneConfig(random=RANDOM_VIT))
    backbone.vit.save_pretrained(tmp_path)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    loaded = build_backbone(BackboneConfig(source=str(tmp_path)))
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.weights_sha256() == backbone.weights_sha256()
    images = make_images()
    for tokens, other_tokens in zip(backbone(images).layers, loaded(images).layers, strict=True):
        assert torch.equal(tokens, other_tokens)


def test_backbone_without_weights_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither backbone\.source nor .* accept the licence"):
        build_backbone(BackboneConfig())
    with pytest.raises(ConfigError, match=r"not a directory or file.*hf auth login"):
        build_backbone(BackboneConfig(source=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match=r"is a folder without config\.json"):
        build_backbone(BackboneConfig(source=str(tmp_path)))


def test_backbone_directory_of_another_model_or_with_missing_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build_backbone(BackboneConfig(random=RANDOM_VIT)).vit.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "norm.bias"}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"do not fit this model; missing: norm\.bias"):
        build_backbone(BackboneConfig(source=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="a model of type 'vit', legal: dinov3_vit, dinov2, dinov2_with_registers"):
        build_backbone(BackboneConfig(source=str(tmp_path)))


def test_backbone_taps_are_the_normed_block_outputs_and_work_on_odd_grids() -> None:
    backbone = build_backbone(BackboneConfig(random=RANDOM_VIT, layers="LAST"))
    images = make_images(height=48, width=80)
    features = backbone(images)
    expected = backbone.vit(images).last_hidden_state
    torch.testing.assert_close(features.layers, [expected])
    assert torch.equal(features.patch_tokens[0], features.layers[0][:, -15:]) and features.grid == (3, 5)
    assert torch.equal(features.cls_tokens[0], features.layers[0][:, 0])
    assert torch.equal(features.patch_maps[0][:, :, 1, 2], features.patch_tokens[0][:, 7])
    with pytest.raises(ValueError, match="50x80, legal: height and width multiples of 16"):
        backbone(make_images(height=50, width=80))


def test_every_tap_equals_transformers_hidden_states_with_or_without_the_norm() -> None:
    config = BackboneConfig(random=RANDOM_VIT, layers="FOUR_LAST")
    normed, raw = build_backbone(config), build_backbone(config, use_norm=False)
    images = make_images()
    states = normed.vit(images, output_hidden_states=True).hidden_states[1:]
    for tokens, raw_tokens, state in zip(normed(images).layers, raw(images).layers, states, strict=True):
        torch.testing.assert_close(tokens, normed.vit.norm(state))
        torch.testing.assert_close(raw_tokens, state)
    trainable = build_backbone(replace(config, trainable=True), use_norm=False)
    assert not trainable.vit.norm.weight.requires_grad, "nothing reads it: DDP would wait for its gradient"


@pytest.mark.parametrize("head", [M2F, LINEAR], ids=["m2f", "linear"])
def test_backbone_stays_frozen_and_in_eval_mode(head: DecoderHeadConfig) -> None:
    model = make_model(head).train()
    assert model.training and not any(module.training for module in model.backbone.modules())
    images = make_images()
    before = model.backbone.weights_sha256()
    all_predictions_loss(model(images)).backward()
    assert all(not p.requires_grad and p.grad is None for p in model.backbone.parameters())
    assert model.backbone.weights_sha256() == before
    first, second = model.backbone(images), model.backbone(images)
    assert torch.equal(first.layers[0], second.layers[0])


# --------------------------------------------------------------------------------------------- deformable attention


def slow_deformable_sampling(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition, one neighbour at a time."""
    batch, _, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, width)
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                start = 0
                for level in range(levels):
                    rows, columns = shapes[level]
                    for p in range(points):
                        x = float(locations[b, q, h, level, p, 0]) * columns - 0.5
                        y = float(locations[b, q, h, level, p, 1]) * rows - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < rows and 0 <= column < columns:
                                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                                    token = value[b, start + row * columns + column, h]
                                    out[b, q, h] += weights[b, q, h, level, p] * share * token
                    start += rows * columns
    return out.flatten(2)


def make_sampling_case() -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 3), (4, 5)]
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(2, tokens, 2, 3, generator=generator, dtype=torch.float64)
    locations = 1.4 * torch.rand(2, 4, 2, 2, 2, 2, generator=generator, dtype=torch.float64) - 0.2  # some outside
    weights = torch.rand(2, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    return value, shapes, locations, weights


def test_deformable_sampling_equals_the_definition() -> None:
    value, shapes, locations, weights = make_sampling_case()
    torch.testing.assert_close(deformable_sampling(value, shapes, locations, weights),
                               slow_deformable_sampling(value, shapes, locations, weights))


def test_deformable_sampling_gradient_equals_finite_differences() -> None:
    value, shapes, locations, weights = make_sampling_case()

    def sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_sampling(value, shapes, locations, weights)

    assert torch.autograd.gradcheck(sample, [tensor[:1].requires_grad_() for tensor in (value, locations, weights)])


def test_deformable_attention_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(32, n_levels=1, n_heads=4, n_points=2, ratio=0.5)
    query, tokens = torch.randn(1, 12, 32), torch.randn(1, 12, 32)
    points = pixel_centers([(3, 4)], query.device)[None, :, None]
    expected = module(query, points, tokens, [(3, 4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(query, points, tokens, [(3, 4)])
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_deformable_attention_refuses_heads_that_do_not_divide_the_values() -> None:
    with pytest.raises(ConfigError, match=r"value width 24 .* cannot be split into 16 heads"):
        MSDeformAttn(48, n_levels=1, n_heads=16, n_points=4, ratio=0.5)


# ---------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize(("height", "width"), [(64, 80), (48, 64), (33, 64)])
def test_adapter_refuses_sizes_that_are_no_multiples_of_32(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"image is {height}x{width}, legal: height and width multiples of 32"):
        make_model()(make_images(height=height, width=width))


def test_adapter_pyramid_strides_on_a_non_square_image() -> None:
    features = make_model().segmentation_model[0](make_images(height=32, width=160))
    assert {name: tuple(level.shape) for name, level in features.items()} == {
        "1": (2, 32, 8, 40), "2": (2, 32, 4, 20), "3": (2, 32, 2, 10), "4": (2, 32, 1, 5)}


def test_adapter_needs_four_layers() -> None:
    with pytest.raises(ConfigError, match=r"set backbone\.layers to FOUR_EVEN_INTERVALS"):
        DINOv3Adapter(build_backbone(BackboneConfig(random=RANDOM_VIT, layers="LAST")), ADAPTER)
    with pytest.raises(ConfigError, match=r"backbone\.layers is LAST; set it to FOUR_EVEN_INTERVALS"):
        make_model(layers="LAST")


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop_path = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop_path(x)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(dim=1), per_sample.amax(dim=1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(out.mean()) == pytest.approx(1, abs=0.05)
    assert drop_path.eval()(x) is x


# ------------------------------------------------------------------------------------------------------------ heads


def test_sine_position_code_by_hand() -> None:
    code = sine_position_code(2, 3, 8, torch.device("cpu")).unflatten(0, (2, 3))  # [2, 3, 8]
    for row in range(2):
        for column in range(3):
            expected = []
            for position, length in ((row, 2), (column, 3)):
                angle = (position + 1) / (length + 1e-6) * 2 * math.pi
                expected += [math.sin(angle), math.cos(angle), math.sin(angle / 100), math.cos(angle / 100)]
            assert code[row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_attention_equals_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    blocked = torch.rand(2, 5, 7) < 0.5
    blocked[:, 0] = False
    expected, _ = theirs(query, key, value, attn_mask=blocked.repeat_interleave(4, dim=0), need_weights=False)
    torch.testing.assert_close(ours(query, key, value, ~blocked[:, None]), expected)


def test_fully_blocked_queries_attend_everywhere() -> None:
    masks = torch.tensor([[[[-1.0, -1.0], [-1.0, -1.0]], [[-1.0, 1.0], [0.0, -1.0]]]])  # [1, 2, 2, 2]
    blocked = blocked_positions(masks, (2, 2))
    assert blocked.tolist() == [[[True, True, True, True], [True, False, False, True]]]
    assert allowed_positions(blocked).tolist() == [[[[True, True, True, True], [False, True, True, False]]]]


def test_m2f_outputs_in_training_and_evaluation() -> None:
    model = make_model()
    images = make_images()
    outputs = model.train()(images)
    assert outputs["pred_logits"].shape == (2, QUERIES, CLASSES + 1)
    assert outputs["pred_masks"].shape == (2, QUERIES, 16, 24)
    assert len(outputs["aux_outputs"]) == DEC_LAYERS
    for prediction in outputs["aux_outputs"]:
        assert {name: value.shape for name, value in prediction.items()} == {
            name: outputs[name].shape for name in ("pred_logits", "pred_masks")}
    with torch.no_grad():
        model.eval()
        outputs = model(images)
        features = model.segmentation_model[0](images)
        complete = model.segmentation_model[1](features, with_aux=True)
    assert "aux_outputs" not in outputs and len(complete["aux_outputs"]) == DEC_LAYERS
    assert torch.equal(outputs["pred_masks"], complete["pred_masks"])


@pytest.mark.parametrize("head", [M2F, LINEAR], ids=["m2f", "linear"])
def test_a_batch_of_two_equals_two_single_images(head: DecoderHeadConfig) -> None:
    model = make_model(head).eval()
    images = make_images()
    with torch.no_grad():
        both = model.semantic_logits(model(images), (30, 50))
        singles = torch.cat([model.semantic_logits(model(image[None]), (30, 50)) for image in images])
    assert both.shape == (2, CLASSES, 30, 50) and both.dtype == torch.float32
    torch.testing.assert_close(both, singles, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [M2F, LINEAR], ids=["m2f", "linear"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradients_of_one_image_equal_those_of_the_image_twice(
    head: DecoderHeadConfig, memory_format: torch.memory_format
) -> None:
    """Batch norm sees the same statistics in both, so the averaged loss has the same gradients.

    Batch size 1 is where a transposed view makes batch norm's gradients wrong without any error, see
    `DINOv3Adapter._pyramid`; the probe's gradient is rows-first in memory, which is what it takes.
    """
    image = make_images(batch=1)
    gradients = []
    for images in (image.contiguous(memory_format=memory_format), image.repeat(2, 1, 1, 1)):
        model = make_model(head).train()
        features = model.segmentation_model[0](images)
        outputs = model.head(features)
        maps = [*features.values(), outputs["pred_masks"]] if head.type == "m2f" else [outputs["logits"]]
        probes = [make_images(1, *level.shape[2:])[:, :1].expand_as(level).contiguous() for level in maps]
        torch.stack([(level * probe).mean() for level, probe in zip(maps, probes, strict=True)]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        floor = max(1e-3 * float(gradients[1][name].abs().max()), 1e-6)
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=floor,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("head", [
    M2F,
    LINEAR,
    DecoderHeadConfig(type="linear", use_batchnorm=False, use_cls_token=True),
], ids=["m2f", "linear", "linear_cls"])
def test_every_trainable_parameter_gets_a_gradient(head: DecoderHeadConfig) -> None:
    """DDP fails at the second step for a trainable parameter that took no part in the first."""
    model = make_model(head).train()
    all_predictions_loss(model(make_images())).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == model.trainable_state_dict().keys() - dict(model.named_buffers()).keys()
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()] == []


def test_m2f_trains_under_bfloat16_autocast() -> None:
    model = make_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(make_images())
    assert model.semantic_logits(outputs, (64, 96)).dtype == torch.float32
    all_predictions_loss(outputs).float().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_semantic_logits_ignores_an_outer_autocast() -> None:
    model = make_model().eval()
    with torch.no_grad():
        outputs = model(make_images())
        expected = model.semantic_logits(outputs, (64, 96))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.semantic_logits(outputs, (64, 96)), expected)


@pytest.mark.parametrize(("layers", "taps"), [("LAST", 1), ("FOUR_LAST", 4), ("FOUR_EVEN_INTERVALS", 4)])
@pytest.mark.parametrize("use_cls_token", [False, True])
def test_linear_model_with_any_layers(layers: str, taps: int, use_cls_token: bool) -> None:
    head = DecoderHeadConfig(type="linear", use_cls_token=use_cls_token)
    model = make_model(head, layers=layers).eval()
    outputs = model(make_images(height=48, width=80))  # the ViT alone needs multiples of 16 only
    assert outputs["logits"].shape == (2, CLASSES, 3, 5)
    linear = model.head
    assert isinstance(linear, LinearHead) and linear.conv.in_channels == 32 * taps * (2 if use_cls_token else 1)


def test_every_switch_of_the_linear_head_does_something() -> None:
    images, seen = make_images(), []
    for settings in ({}, {"use_backbone_norm": False}, {"use_batchnorm": False}, {"use_cls_token": True},
                     {"dropout": 0.9}):
        model = make_model(DecoderHeadConfig(type="linear", **settings)).train()
        torch.manual_seed(5)
        seen.append(model(images)["logits"].detach())
    assert all(not torch.allclose(seen[0], other, rtol=1e-3) for other in seen[1:])


def test_linear_head_drops_channels_before_the_norm() -> None:
    torch.manual_seed(0)
    head = LinearHead([4], 3, dropout=0.5, use_batchnorm=True, use_cls_token=False).train()
    seen: list[Tensor] = []
    head.batchnorm_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    head([(torch.ones(8, 4, 2, 2), torch.ones(8, 4))])
    per_channel = seen[0].flatten(2)
    assert torch.equal(per_channel.amin(dim=2), per_channel.amax(dim=2))
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}


# -------------------------------------------------------------------------------------------------------- segmenter


@pytest.mark.parametrize(("head", "vit"), [(M2F, "backbone"), (LINEAR, "feature_model")], ids=["m2f", "linear"])
def test_trainable_state_round_trip(head: DecoderHeadConfig, vit: str) -> None:
    model, other = make_model(head, seed=0), make_model(head, seed=1)
    state = {key: value.clone() for key, value in model.trainable_state_dict().items()}
    frozen = model.state_dict().keys() - state.keys()
    assert frozen == {key for key in model.state_dict() if key.startswith(f"segmentation_model.0.{vit}.")}
    assert len(frozen) == len(model.backbone.state_dict())
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= state.keys()
    other.load_trainable_state_dict(state)
    for key, value in other.trainable_state_dict().items():
        assert torch.equal(value, state[key]), key


def remove_a_key(state: dict[str, Tensor]) -> None:
    del state["segmentation_model.1.predictor.class_embed.bias"]


def add_keys(state: dict[str, Tensor]) -> None:
    state.update({f"segmentation_model.2.extra{number}": torch.zeros(1) for number in range(7)})


def change_a_shape(state: dict[str, Tensor]) -> None:
    state["segmentation_model.1.predictor.class_embed.bias"] = torch.zeros(9)


@pytest.mark.parametrize(("damage", "message"), [
    (remove_a_key, r"missing: segmentation_model\.1\.predictor\.class_embed\.bias\. Check"),
    (add_keys, r"unexpected: segmentation_model\.2\.extra0, .*extra4 and 2 more"),
    (change_a_shape, r"of another shape: .*class_embed\.bias \(9,\) instead of \(6,\)"),
])
def test_trainable_state_that_does_not_fit_is_refused(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = make_model()
    state = {key: value + 1 for key, value in model.trainable_state_dict().items()}
    before = {key: value.clone() for key, value in model.trainable_state_dict().items()}
    damage(state)
    with pytest.raises(ConfigError, match=message):
        model.load_trainable_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.trainable_state_dict().items())


def test_trainable_weights_follow_the_global_seed() -> None:
    states = [make_model(seed=seed).trainable_state_dict() for seed in (3, 3, 4)]
    key = "segmentation_model.1.predictor.query_feat.weight"
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0][key], states[2][key])


@pytest.mark.parametrize("backbone", ["vits16", "vitb16", "vitl16", "vit7b16"])
def test_keys_and_shapes_equal_the_reference(golden: Any, backbone: str) -> None:
    """Every key outside the ViT, for a head of the released size. Depth and MLP width do not matter to these keys."""
    description, _ = golden(f"state_dict_keys_{backbone}")
    expected = {key: tuple(shape) for key, shape in description["keys"].items()
                if not key.startswith("segmentation_model.0.backbone.")}
    hidden_size = expected["segmentation_model.0.level_embed"][1]
    vit = RandomBackboneConfig(hidden_size=hidden_size, num_attention_heads=hidden_size // 64)
    with torch.device("meta"):
        head = DecoderHeadConfig(hidden_dim=description["hidden_dim"])
        model = build_model(RunConfig(backbone=BackboneConfig(random=vit), decoder_head=head),
                            description["num_classes"])
    assert {key: tuple(value.shape) for key, value in model.trainable_state_dict().items()} == expected


def test_backbone_wrapper_accepts_the_vit_it_is_given() -> None:
    backbone = build_backbone(BackboneConfig(random=RANDOM_VIT))
    assert isinstance(backbone, DINOv3Backbone) and backbone.embed_dim == RANDOM_VIT.hidden_size
    backbone.vit.config.patch_size = 14
    with pytest.raises(ConfigError, match="patch size is 14, legal for a DINOv3 ViT: 16"):
        DINOv3Backbone(backbone.vit, [0])
