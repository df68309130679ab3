"""The networks against numbers recorded from the reference. Sizes come from the golden files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from trainer.model_config import AdapterConfig
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbones.dinov3 import DINOv3Backbone
from trainer.models.backbones.dinov3_keys import meta_vit_to_transformers
from trainer.models.deform_attn import MSDeformAttn
from trainer.models.heads import LinearHead, Mask2FormerHead
from trainer.models.mask_decoder import blocked_positions

GRADIENT_NORM_FLOOR = 1e-6  # some gradients are zero but for rounding, because a batch norm cancels them


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without the prefix."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def assert_forward(actual: Tensor, expected: Tensor, name: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def assert_gradient(actual: Tensor | None, expected: Tensor, name: str) -> None:
    assert actual is not None, f"{name} got no gradient"
    floor = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=floor, msg=lambda text: f"{name}: {text}")


def assert_gradient_norms(module: nn.Module, expected: dict[str, float]) -> None:
    """Checks every recorded norm, and that every trainable parameter is recorded."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, norm in expected.items():
        gradient = trained[name].grad
        assert gradient is not None, f"{name} got no gradient"
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=GRADIENT_NORM_FLOOR), name


def vit_from_meta(state: dict[str, Any], num_heads: int) -> DINOv3ViTModel:
    """A ViT with the sizes of the weights under Meta's keys (num_heads is not visible in shapes)."""
    gated = "blocks.0.mlp.w1.weight" in state
    has_bias = "blocks.0.attn.qkv.bias" in state
    return DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=state["cls_token"].shape[-1],
        num_hidden_layers=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_attention_heads=num_heads,
        intermediate_size=state[f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"].shape[0],
        num_register_tokens=state["storage_tokens"].shape[1],
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=has_bias,
        value_bias=has_bias,
    ))


# --------------------------------------------------------------------------------------------- deformable attention


def test_golden_deform_attn(golden: Any) -> None:
    description, tensors = golden("deform_attn_small")
    for number, case in enumerate(description["cases"]):
        data = part(tensors, f"case{number}/")
        module = MSDeformAttn(case["d_model"], len(case["shapes"]), case["n_heads"], case["n_points"], case["ratio"])
        torch.testing.assert_close(module.sampling_offsets.bias.detach(), data["default_offset_bias"])
        module.load_state_dict(part(data, "weights/"))
        query = data["inputs/query"].requires_grad_()
        value_tokens = data["inputs/value_tokens"].requires_grad_()
        shapes = [(height, width) for height, width in data["inputs/spatial_shapes"].tolist()]

        out = module(query, data["inputs/reference_points"], value_tokens, shapes)
        (out * data["grad_probe"]).sum().backward()

        assert_forward(out, data["outputs/out"])
        gradients = {"query": query.grad, "value_tokens": value_tokens.grad}
        gradients |= {name: parameter.grad for name, parameter in module.named_parameters()}
        expected = part(data, "grads/")
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_gradient(gradients[name], gradient, name)


# ---------------------------------------------------------------------------------------------------------- adapter


@pytest.fixture
def golden_adapter(golden: Any) -> tuple[DINOv3Adapter, dict[str, Any], dict[str, Tensor]]:
    description, tensors = golden("dinov3_adapter_small")
    weights = part(tensors, "weights/")
    meta_vit = part(weights, "backbone.")
    vit = vit_from_meta(meta_vit, description["vit"]["num_heads"])
    vit.load_state_dict(meta_vit_to_transformers(meta_vit))
    config = AdapterConfig(
        conv_inplane=description["conv_inplane"],
        n_points=description["n_points"],
        deform_num_heads=description["deform_num_heads"],
        cffn_ratio=description["cffn_ratio"],
        deform_ratio=description["deform_ratio"],
        drop_path=0.0,
    )
    adapter = DINOv3Adapter(DINOv3Backbone(vit, description["interaction_indexes"]), config)
    own = {key: value for key, value in weights.items() if not key.startswith("backbone.")}
    missing, unexpected = adapter.load_state_dict(own, strict=False)
    assert not unexpected and all(key.startswith("backbone.") for key in missing)
    return adapter, description, tensors


def test_golden_adapter_eval(golden_adapter: tuple[DINOv3Adapter, dict[str, Any], dict[str, Tensor]]) -> None:
    adapter, _, tensors = golden_adapter
    adapter.eval()
    image = tensors["inputs/image"]
    seen: list[Tensor] = []
    for block in adapter.interactions:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        outputs = adapter(image)
        tapped = adapter.backbone(image)
        prior = adapter.spm(image)

    for level, (patch_tokens, cls_token) in enumerate(zip(tapped.patch_tokens, tapped.cls_tokens, strict=True)):
        assert_forward(patch_tokens, tensors[f"intermediate/vit.{level}.patch_tokens"], f"vit {level}")
        assert_forward(cls_token, tensors[f"intermediate/vit.{level}.cls_token"], f"vit {level} class token")
    assert_forward(prior[0], tensors["intermediate/spm.c1"], "c1")
    for number, level_map in enumerate(prior[1:], start=2):
        assert_forward(level_map.flatten(2).mT, tensors[f"intermediate/spm.c{number}"], f"c{number}")
    for block_number, c in enumerate(seen):
        assert_forward(c, tensors[f"intermediate/interaction.{block_number}.c"], f"interaction {block_number}")
    assert outputs.keys() == part(tensors, "outputs/").keys()
    for name, output in outputs.items():
        assert_forward(output, tensors[f"outputs/{name}"], f"output {name}")


def test_golden_adapter_train(golden_adapter: tuple[DINOv3Adapter, dict[str, Any], dict[str, Tensor]]) -> None:
    adapter, description, tensors = golden_adapter
    adapter.train()
    outputs = adapter(tensors["inputs/image"])
    for name, output in outputs.items():
        assert_forward(output, tensors[f"train_outputs/{name}"], f"output {name}")
    buffers = dict(adapter.named_buffers())
    for name, buffer in part(tensors, "train_buffers/").items():
        assert_forward(buffers[name], buffer, name)
    torch.stack([(output**3).mean() for output in outputs.values()]).sum().backward()
    assert_gradient_norms(adapter, description["train_mode_param_grad_l2_norms"])


# --------------------------------------------------------------------------------------------------------- m2f head


@pytest.fixture
def golden_head(golden: Any) -> tuple[Mask2FormerHead, dict[str, Any], dict[str, Tensor]]:
    description, tensors = golden("m2f_head_small")
    sizes = ("num_queries", "nheads", "enc_layers", "enc_ffn", "dec_layers", "dec_ffn")
    head = Mask2FormerHead(description["in_channels"], description["hidden_dim"], description["num_classes"],
                           **{name: description[name] for name in sizes})
    head.load_state_dict(part(tensors, "weights/"))
    return head.eval(), description, tensors


def test_golden_m2f_forward(golden_head: tuple[Mask2FormerHead, dict[str, Any], dict[str, Tensor]]) -> None:
    head, description, tensors = golden_head
    features = part(tensors, "inputs/")
    with torch.no_grad():
        mask_features, multi_scale = head.pixel_decoder(features)
        outputs = head(features, with_aux=True)

    assert_forward(mask_features, tensors["intermediate/mask_features"], "mask features")
    for level, level_map in enumerate(multi_scale):
        assert_forward(level_map, tensors[f"intermediate/multi_scale.{level}"], f"multi scale {level}")
    predictions = [*outputs["aux_outputs"], outputs]
    assert len(predictions) == description["dec_layers"] + 1
    for number, prediction in enumerate(predictions):
        prefix = f"outputs/aux_outputs.{number}." if number < description["dec_layers"] else "outputs/"
        for name in ("pred_logits", "pred_masks"):
            assert_forward(prediction[name], tensors[prefix + name], f"prediction {number} {name}")


def test_golden_m2f_attention_masks(golden_head: tuple[Mask2FormerHead, dict[str, Any], dict[str, Tensor]]) -> None:
    head, _, tensors = golden_head
    features = part(tensors, "inputs/")
    with torch.no_grad():
        outputs = head(features, with_aux=True)
        for number, prediction in enumerate([*outputs["aux_outputs"], outputs]):
            size = features[("4", "3", "2")[number % 3]].shape[-2:]
            blocked = blocked_positions(prediction["pred_masks"], size)
            expected = tensors[f"intermediate/attn_mask.{number}"].bool()
            resized = nn.functional.interpolate(prediction["pred_masks"], size=size, mode="bilinear").flatten(2)
            undecided = resized.abs() < 1e-5  # either answer is right where rounding decides the sign
            assert ((blocked == expected) | undecided).all(), f"attention mask {number}"


def test_golden_m2f_semantic_logits(golden_head: tuple[Mask2FormerHead, dict[str, Any], dict[str, Tensor]]) -> None:
    head, description, tensors = golden_head
    with torch.no_grad():
        outputs = head(part(tensors, "inputs/"))
        scores = head.semantic_logits(outputs, tuple(description["rescale_to"]))
    assert_forward(scores, tensors["outputs/predict.semantic_fp32"])


def test_golden_m2f_gradients(golden_head: tuple[Mask2FormerHead, dict[str, Any], dict[str, Tensor]]) -> None:
    head, description, tensors = golden_head
    features = {name: tensor.requires_grad_() for name, tensor in part(tensors, "inputs/").items()}
    outputs = head(features, with_aux=True)
    scalar = torch.stack([(prediction[name] ** 2).mean() for prediction in [outputs, *outputs["aux_outputs"]]
                          for name in ("pred_logits", "pred_masks")]).sum()
    scalar.backward()
    assert_forward(scalar.reshape(1), tensors["outputs/grad_scalar"])
    for name, feature in features.items():
        assert_gradient(feature.grad, tensors[f"grads/inputs.{name}"], f"feature {name}")
    assert_gradient_norms(head, description["param_grad_l2_norms"])


# ------------------------------------------------------------------------------------------------------ linear head


def test_golden_linear_head(golden: Any) -> None:
    description, tensors = golden("linear_head_small")
    for number, case in enumerate(description["cases"]):
        data = part(tensors, f"case{number}/")
        head = LinearHead(case["in_channels"], case["num_classes"], dropout=0.0,
                          use_batchnorm=case["use_batchnorm"], use_cls_token=case["use_cls_token"])
        head.load_state_dict(part(data, "weights/"))
        head.train(case.get("train", False))
        maps = [data[f"inputs/feature.{level}"] for level in range(len(case["in_channels"]))]
        features = [(level_map, data.get(f"inputs/cls.{level}", level_map.mean(dim=(2, 3))))
                    for level, level_map in enumerate(maps)]

        with torch.no_grad():
            assert_forward(head(features)["logits"], data["outputs/forward"], f"case {number}")
            buffers = dict(head.named_buffers())
            for name, buffer in part(data, "train_buffers/").items():
                assert_forward(buffers[name], buffer, f"case {number} {name}")
            head.eval()
            scores = head.semantic_logits(head(features), tuple(case["rescale_to"]))
        assert_forward(scores, data["outputs/predict"], f"case {number} predict")


# --------------------------------------------------------------------------------------------------------- ViT keys


@pytest.mark.parametrize("backbone", ["vits16", "vitb16", "vitl16", "vit7b16"])
def test_golden_meta_keys_convert_to_transformers(golden: Any, backbone: str) -> None:
    description, _ = golden(f"state_dict_keys_{backbone}")
    with torch.device("meta"):
        meta_vit = {key: torch.empty(shape) for key, shape in
                    part(description["keys"], "segmentation_model.0.backbone.").items()}
        vit = vit_from_meta(meta_vit, num_heads=meta_vit["cls_token"].shape[-1] // 64)
    converted = {key: tuple(value.shape) for key, value in meta_vit_to_transformers(meta_vit).items()}
    assert converted == {key: tuple(value.shape) for key, value in vit.state_dict().items()}


def test_meta_key_that_no_vit_has_is_refused() -> None:
    with pytest.raises(KeyError, match=re.escape("blocks")):
        meta_vit_to_transformers({"decoder.blocks.0.weight": torch.zeros(1)})
