"""EoMT files of tue-mps, written here by hand from a model of transformers' classes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import EomtConfig, EomtForUniversalSegmentation
from transformers.models.eomt.image_processing_pil_eomt import EomtImageProcessorPil

from shards.errors import ConfigError
from tests.support.view_scores import view_scores
from tests.unit.test_trainer_models_eomt import CLASSES, QUERIES, images, published, settings
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.evaluation.predictor import Predictor
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD
from trainer.models import Segmenter
from trainer.models.weights import read_weights

State = dict[str, Tensor]
HEAD = {"query.": "q.", "class_predictor.": "class_head.", "mask_head.fc1.": "mask_head.0.",
        "mask_head.fc2.": "mask_head.2.", "mask_head.fc3.": "mask_head.4.", "upscale_block.block.": "upscale.",
        "attn_mask_probs": "attn_mask_probs"}


def head_of(theirs: State) -> State:
    """The head of a model of transformers', in tue-mps' names."""
    return {f"network.{name}{key.removeprefix(prefix)}".replace("layernorm2d", "norm"): tensor.clone()
            for key, tensor in theirs.items() for prefix, name in HEAD.items() if key.startswith(prefix)}


def statistics(value: float = 1.0) -> State:
    return {"network.encoder.pixel_mean": value * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1),
            "network.encoder.pixel_std": value * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1),
            "criterion.empty_weight": torch.ones(CLASSES + 1)}


# -- on a DINOv3 -------------------------------------------------------------------------------------------------------


def dinov3_file(theirs: State) -> State:
    names = {"embeddings.": "patch_embed.", "layers.": "blocks.", "layernorm.": "norm."}
    vit = {f"network.encoder.backbone.{name}{key.removeprefix(prefix)}": tensor.clone()
           for key, tensor in theirs.items() for prefix, name in names.items()
           if key.startswith(prefix) and "mask_token" not in key}
    return vit | head_of(theirs) | statistics()


def test_an_absolute_file_replaces_the_vit(tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs")
    published(tmp_path / "base", seed=5)  # its other values must not matter
    torch.save(dinov3_file(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    model = build_model(settings(tmp_path / "base"), CLASSES)
    model.load_weights(read_weights(tmp_path / "pytorch_model.bin"))
    with torch.no_grad():
        expected, outputs = theirs(images()), model.eval()(images())
    torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)
    frozen = build_model(settings(tmp_path / "base", "backbone.trainable=false"), CLASSES)
    with pytest.raises(ConfigError, match="are not those of the configured backbone"):
        frozen.load_weights(read_weights(tmp_path / "pytorch_model.bin"))
    same = build_model(settings(tmp_path / "theirs", "backbone.trainable=false"), CLASSES)
    same.load_weights(read_weights(tmp_path / "pytorch_model.bin"))


def test_a_head_trained_with_gelu_is_refused_on_a_vit_with_silu(tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs", gated=True)
    torch.save(dinov3_file(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="was trained with gelu, but on this ViT it would run with silu"):
        build_model(settings(tmp_path / "theirs"), CLASSES).load_weights(read_weights(tmp_path / "pytorch_model.bin"))


@pytest.fixture
def delta(tmp_path: Path) -> tuple[Any, State]:
    """A fine-tuned model (its pretrained one is saved in base/), and its file of differences."""
    base = published(tmp_path / "base").state_dict()
    tuned = published(tmp_path / "tuned", seed=5)
    with torch.no_grad():
        for key, tensor in tuned.state_dict().items():
            if key.startswith(("embeddings.", "layers.", "layernorm.")):
                tensor.copy_(base[key] + 0.01 * tensor)
    tuned.save_pretrained(tmp_path / "tuned")
    file = dinov3_file(tuned.state_dict()) | statistics(0.0)
    original = dinov3_file(base)
    for key in file:
        if ".encoder.backbone." in key:
            file[key] = file[key] - original[key]
    file["network.attn_mask_probs"] -= 1
    return tuned, file


def test_differences_are_added_to_the_pretrained_vit(delta: tuple[Any, State], tmp_path: Path) -> None:
    _, file = delta
    torch.save(file, tmp_path / "pytorch_model.bin")
    model = build_model(settings(tmp_path / "base"), CLASSES)
    model.load_weights(read_weights(tmp_path / "pytorch_model.bin"))
    expected = build_model(settings(tmp_path / "tuned"), CLASSES)
    expected.load_weights(read_weights(tmp_path / "tuned"))
    ours, theirs = model.trainable_state_dict(), expected.trainable_state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        if not key.endswith("mask_token"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("change, message", [
    (lambda file: file.pop("network.encoder.pixel_mean"), "does not say whether it holds weights or differences"),
    (lambda file: file.update({"network.encoder.pixel_mean": torch.full((1, 3, 1, 1), 0.5)}),
     r"pixel_mean is \[0\.5, 0\.5, 0\.5\] and pixel_std .*, legal: \[0\.485"),
    (lambda file: file.pop("network.encoder.backbone.blocks.1.norm2.weight"), r"missing: blocks\.1\.norm2\.weight"),
    (lambda file: file.pop("network.encoder.backbone.blocks.1.attention.k_proj.weight"), "missing or malformed key"),
    (lambda file: file.update({"network.encoder.backbone.blocks.1.extra": torch.ones(1)}), "missing or malformed key"),
    (lambda file: file.update({"network.extra": torch.ones(1)}), r"unexpected keys: network\.extra"),
    (lambda file: file.update({"network.q.weight": torch.ones(3, 32)}), r"of another shape: .*query\.weight \(3, 32\)"),
    (lambda file: file.pop("network.class_head.bias"), r"missing: segmentation_model\.1\.class_predictor\.bias"),
])
def test_what_a_file_lacks_or_has_too_much_is_named(change: Any, message: str, delta: tuple[Any, State],
                                                    tmp_path: Path) -> None:
    _, file = delta
    change(file)
    torch.save({"state_dict": file}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=message):
        build_model(settings(tmp_path / "base"), CLASSES).load_weights(read_weights(tmp_path / "pytorch_model.bin"))


def test_weights_marked_as_differences_and_the_reverse_are_refused(delta: tuple[Any, State], tmp_path: Path) -> None:
    tuned, _ = delta
    absolute = dinov3_file(tuned.state_dict()) | statistics(0.0)
    absolute["network.attn_mask_probs"] -= 1
    torch.save(absolute, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="too large to be differences"):
        build_model(settings(tmp_path / "base"), CLASSES).load_weights(read_weights(tmp_path / "pytorch_model.bin"))


def test_a_file_that_is_not_a_complete_vit_is_no_backbone_source(delta: tuple[Any, State], tmp_path: Path) -> None:
    tuned, file = delta
    for content, form in ((file, "differences"), (dinov3_file(tuned.state_dict()), "partial")):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=rf"does not hold a complete ViT \({form}\); set backbone\.source to"):
            build_model(settings(tmp_path / "pytorch_model.bin"), CLASSES)


# -- on a DINOv2 -------------------------------------------------------------------------------------------------------


def published_on_dinov2(folder: Path, *, swiglu: bool = False, registers: int = 3, image_size: int = 64
                        ) -> EomtForUniversalSegmentation:
    """A random model of transformers' class for DINOv2, in eval mode, saved to `folder`."""
    torch.manual_seed(0)
    theirs = EomtForUniversalSegmentation(EomtConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, num_register_tokens=registers,
        num_blocks=2, num_queries=QUERIES, image_size=image_size, patch_size=16, num_labels=CLASSES,
        use_swiglu_ffn=swiglu)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    return theirs


def eomt_settings(source: Path, *overrides: str) -> RunConfig:
    return load_run_config(None, [
        f"backbone.source={source}", "decoder_head.type=eomt", f"decoder_head.num_queries={QUERIES}",
        "decoder_head.num_blocks=2", "backbone.trainable=true", "loss.matched_gradients=false", *overrides])


def loaded(folder: Path, *overrides: str, source: Path | None = None) -> Segmenter:
    model = build_model(eomt_settings(source or folder, *overrides), CLASSES)
    model.load_weights(read_weights(folder))
    return model.eval()


@pytest.mark.parametrize("shares", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], ids=str)
@pytest.mark.parametrize("swiglu, registers", [(False, 3), (True, 3), (False, 0)], ids=["gelu", "swiglu", "plain"])
def test_eomt_on_dinov2_equals_transformers(swiglu: bool, registers: int, shares: list[float], tmp_path: Path) -> None:
    theirs = published_on_dinov2(tmp_path, swiglu=swiglu, registers=registers)
    theirs.attn_mask_probs.copy_(torch.tensor(shares))
    theirs.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    with torch.no_grad():
        expected, outputs = theirs(images()), model(images())
    torch.testing.assert_close(outputs["pred_logits"], expected.class_queries_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)


def test_eomt_on_dinov2_takes_other_and_oblong_sizes(tmp_path: Path) -> None:
    published_on_dinov2(tmp_path)
    with torch.no_grad():
        assert loaded(tmp_path)(images(48, 112))["pred_masks"].shape == (2, QUERIES, 12, 28)


def test_tue_mps_file_on_dinov2_equals_transformers(tmp_path: Path) -> None:
    """timm's names: fused qkv, `reg_token`, and positions of the patches only."""
    theirs = published_on_dinov2(tmp_path / "theirs")
    weights, file = theirs.state_dict(), head_of(theirs.state_dict()) | statistics()
    plain = {"embeddings.cls_token": "cls_token", "embeddings.register_tokens": "reg_token",
             "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
             "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
             "layernorm.weight": "norm.weight", "layernorm.bias": "norm.bias"}
    vit = {name: weights[key] for key, name in plain.items()}
    vit["pos_embed"] = weights["embeddings.position_embeddings.weight"][None]
    for block in range(4):
        for kind in ("weight", "bias"):
            attention = f"layers.{block}.attention"
            vit[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([weights[f"{attention}.{p}_proj.{kind}"] for p in "qkv"])
            vit[f"blocks.{block}.attn.proj.{kind}"] = weights[f"{attention}.out_proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                vit[f"blocks.{block}.{part}.{kind}"] = weights[f"layers.{block}.{part}.{kind}"]
        for part in (1, 2):
            vit[f"blocks.{block}.ls{part}.gamma"] = weights[f"layers.{block}.layer_scale{part}.lambda1"]
    file |= {f"network.encoder.backbone.{key}": tensor.clone() for key, tensor in vit.items()}
    torch.save({"state_dict": file}, tmp_path / "pytorch_model.bin")
    model = build_model(eomt_settings(tmp_path / "theirs"), CLASSES)
    with torch.no_grad():
        model.backbone.vit.layernorm.weight.add_(1)
        model.load_weights(read_weights(tmp_path / "pytorch_model.bin"))
        expected = theirs(images()).masks_queries_logits
        torch.testing.assert_close(model.eval()(images())["pred_masks"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    ({"patch_size": 14}, r"config\.json: patch_size is 14, legal: 16"),
    ({"hidden_act": "relu"}, r"config\.json: hidden_act is 'relu', legal: 'gelu'"),
    ({"num_attention_heads": "two"}, r"config\.json is not a valid configuration"),
])
def test_other_settings_than_the_published_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    published_on_dinov2(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"num_attention_heads": 0}, r"config\.json: num_attention_heads is 0, legal"),
    ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, but the weights beside it have 4"),
    ({"num_queries": 3}, "num_queries is 3, but the weights beside it have 7"),
    ({"num_blocks": 99}, "num_blocks is 99, but the weights beside it have 2"),
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True, but the weights beside it have False"),
    ({"image_size": 80}, "image_size is 80, but the weights beside it have 64"),
    ({"layer_norm_eps": -1.0}, r"layer_norm_eps is -1\.0, legal"),
])
def test_a_config_that_does_not_describe_the_weights_is_refused(change: dict[str, Any], message: str,
                                                                tmp_path: Path) -> None:
    published_on_dinov2(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"embeddings.cls_token": torch.zeros(())}, "the ViT's weights in .* missing or wrong shape"),
    ({"embeddings.cls_token": torch.zeros(0)}, "malformed key|do not fit"),
    ({"embeddings.position_embeddings.weight": torch.zeros(15, 128)}, "are not a square of patches"),
    ({"layers.foo": torch.zeros(1)}, "malformed key"),
    ({"layers.0.attention.o_proj.weight": torch.zeros(128, 128)}, "out_proj beside attention.o_proj"),
    ({"attn_mask_probs": torch.tensor([7.0, 0.0])}, r"attn_mask_probs is \[7\.0, 0\.0\], legal: fractions"),
    ({"query.weight": torch.zeros(7, 128, dtype=torch.int32)}, "query.weight is a tensor of torch.int32"),
    ({"query.weight": torch.full((7, 128), torch.inf)}, "query.weight has values that are not finite"),
])
def test_malformed_tensors_are_one_clear_error(change: State, message: str, tmp_path: Path) -> None:
    theirs = published_on_dinov2(tmp_path)
    save_file({key: tensor.contiguous() for key, tensor in (theirs.state_dict() | change).items()},
              tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"network.q.weight": torch.ones(7, 32), "q.weight": torch.zeros(7, 32)}, "two different tensors for .*query"),
    ({"network.encoder.pixel_mean": torch.tensor(0.4)}, "does not say whether"),
    ({"network.encoder.backbone.patch_embed.cls_token": torch.zeros(())}, "malformed key|do not fit"),
    ({"network.encoder.backbone.blocks.x": torch.zeros(1)}, "malformed key|do not fit"),
    ({"network.attn_mask_probs": torch.tensor([0.0, torch.nan])}, "not finite"),
])
def test_malformed_tue_mps_files_are_one_clear_error(change: State, message: str, tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs")
    torch.save(dinov3_file(theirs.state_dict()) | change, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=message):
        build_model(settings(tmp_path / "theirs"), CLASSES).load_weights(read_weights(tmp_path / "pytorch_model.bin"))


def test_files_saved_from_a_compiled_model_load_and_pixel_statistics_are_always_checked(tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs")
    file = dinov3_file(theirs.state_dict())
    compiled = {key.replace("network.", "network._orig_mod.", 1): tensor for key, tensor in file.items()}
    torch.save(compiled, tmp_path / "pytorch_model.bin")
    build_model(settings(tmp_path / "theirs"), CLASSES).load_weights(read_weights(tmp_path / "pytorch_model.bin"))
    head = {key: tensor for key, tensor in file.items() if ".backbone." not in key}
    for value, message in ((0.0, "holds differences, as its pixel_mean is zero, but no ViT"), (0.5, "pixel_mean is")):
        torch.save(head | statistics(value), tmp_path / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=message):
            read_weights(tmp_path / "pytorch_model.bin")


def test_a_head_on_the_other_family_is_refused(tmp_path: Path) -> None:
    published_on_dinov2(tmp_path / "dinov2")
    published(tmp_path / "dinov3")
    with pytest.raises(ConfigError, match=r"the weights in .*dinov2 do not fit this model"):
        loaded(tmp_path / "dinov2", source=tmp_path / "dinov3")


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (96, 144), (96, 128)], ids=str)
def test_evaluation_gives_the_scores_of_transformers_own_pipeline(size: tuple[int, int], tmp_path: Path) -> None:
    """Resize, windows along the longer side, averaging and resizing back, at sizes that both programs round equally."""
    theirs = published_on_dinov2(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = EomtImageProcessorPil(do_split_image=True, do_pad=False,
                                      size={"shortest_edge": 64, "longest_edge": None})
    inputs = processor(pixels, return_tensors="pt")
    with torch.no_grad():
        outputs = theirs(**inputs)
    [expected] = processor.post_process_semantic_segmentation(outputs, [size], return_segmentation_scores=True)
    config = eomt_settings(tmp_path, "eval.reference=eomt", "eval.crop_size=64")
    predict = Predictor(loaded(tmp_path), config, CLASSES, torch.device("cpu"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    [view] = predict.view_sizes(size)
    scores = view_scores(predict, predict.view(image, view), size, mirrored=False)
    torch.testing.assert_close(scores[0], expected.segmentation_scores, rtol=1e-3, atol=1e-3)
    assert torch.equal(predict(image), expected.segmentation)
