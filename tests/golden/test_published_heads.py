"""EoMT and PMT against numbers recorded from their authors' code, loaded from files in their authors' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from shards.errors import ConfigError
from tests.golden.test_models import assert_forward, assert_gradient, assert_gradient_norms, part
from trainer.data.transforms import normalize
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD
from trainer.models import Segmenter
from trainer.models.backbones.dinov3 import DINOv3Backbone
from trainer.models.eomt import EomtHead, PartialBackbone
from trainer.models.outputs import MaskOutputs, MaskPrediction
from trainer.models.pmt import PmtHead, TappedBackbone
from trainer.models.weights import read_weights

ANNEALING = (0.125, 0.8125)


def vit_of(sizes: dict[str, Any], **changes: Any) -> DINOv3ViTModel:
    return DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=sizes["hidden"], num_hidden_layers=sizes["depth"], num_attention_heads=sizes["heads"],
        intermediate_size=sizes["ffn"], num_register_tokens=sizes["registers"], key_bias=False, **changes))


def predictions(outputs: MaskOutputs) -> list[MaskPrediction]:
    return [*outputs.get("aux_outputs", []), outputs]


def assert_predictions(outputs: MaskOutputs, expected: dict[str, Tensor]) -> None:
    found = predictions(outputs)
    assert len(found) == sum(name.startswith("mask_logits") for name in expected)
    for number, prediction in enumerate(found):
        masks = expected[f"mask_logits{number}"]  # up to 40, with values near zero among them
        torch.testing.assert_close(prediction["pred_masks"], masks, rtol=1e-4, atol=2e-6 * float(masks.abs().max()))
        assert_forward(prediction["pred_logits"], expected[f"class_logits{number}"], f"classes {number}")


def published(tensors: dict[str, Tensor], prefix: str, path: Path, wrapped: bool = False) -> Path:
    """A file as the authors publish it: `pytorch_model.bin`, bare or below `state_dict`."""
    state = {key: tensor.clone() for key, tensor in part(tensors, prefix).items()}
    torch.save({"state_dict": state} if wrapped else state, path)
    return path


# -- PMT ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pmt(golden: Any, tmp_path: Path) -> tuple[Segmenter, dict[str, Any], dict[str, Tensor]]:
    description, tensors = golden("pmt_small")
    sizes = description["settings"]
    vit = vit_of(sizes)
    state = {key.removeprefix("state/network.encoder.backbone."): tensor for key, tensor in tensors.items()}
    names = {"patch_embed.": "embeddings.", "blocks.": "model.layer.", "norm.": "norm."}
    own = {ours + key.removeprefix(theirs): tensor for key, tensor in state.items() for theirs, ours in names.items()
           if key.startswith(theirs)}
    vit.load_state_dict(own | {"embeddings.mask_token": vit.embeddings.mask_token.detach()})
    backbone = DINOv3Backbone(vit, sizes["taps"])
    head = PmtHead(sizes["hidden"], sizes["classes"], num_layers=len(sizes["taps"]), num_heads=sizes["heads"],
                   ffn_dim=sizes["decoder_ffn"], num_queries=sizes["queries"], num_blocks=sizes["blocks"],
                   num_upscale_blocks=2, mask_annealing=ANNEALING)
    model = Segmenter(TappedBackbone(backbone), head)
    model.load_weights(read_weights(published(tensors, "state/", tmp_path / "pytorch_model.bin")))
    return model, description, tensors


def images_of(tensors: dict[str, Tensor]) -> Tensor:
    return normalize(tensors["inputs/image"], IMAGENET_MEAN, IMAGENET_STD)


def test_golden_pmt_eval(pmt: tuple[Segmenter, dict[str, Any], dict[str, Tensor]]) -> None:
    model, _, tensors = pmt
    head: Any = model.eval().head
    with torch.no_grad():
        features = model.segmentation_model[0](images_of(tensors))
        assert_forward(features.rope[0], tensors["eval/rope_cos"], "rope")
        for number, (tokens, norm) in enumerate(zip(features.layers, head.bn, strict=True)):
            assert_forward(norm(tokens), tensors[f"eval/lateral{number}"], f"lateral {number}")
        for name, share in (("masked", 1.0), ("unmasked_attention", 0.0)):
            head.load_state_dict(head.state_dict() | {"attn_mask_probs": torch.full((len(head.blocks),), share)})
            assert_predictions(head(features, with_aux=True), part(tensors, f"{name}/"))
            torch.testing.assert_close(head(features)["pred_masks"], head(features, with_aux=True)["pred_masks"])


def test_golden_pmt_train(pmt: tuple[Segmenter, dict[str, Any], dict[str, Tensor]]) -> None:
    model, description, tensors = pmt
    head: Any = model.train().head
    head.load_state_dict(head.state_dict() | {"attn_mask_probs": torch.ones(len(head.blocks))})
    outputs = model(images_of(tensors))
    expected = part(tensors, "train/")
    assert_predictions(outputs, expected)
    loss = torch.stack([
        (prediction["pred_masks"] * expected[f"mask_weights{number}"]).mean()
        + (prediction["pred_logits"] * expected[f"class_weights{number}"]).mean()
        for number, prediction in enumerate(predictions(outputs))]).sum()
    loss.backward()
    assert_forward(loss, expected["loss"], "loss")
    for name, running in part(expected, "after/").items():
        assert_forward(head.state_dict()[name], running, name)
    gradients = dict(head.named_parameters())
    for name, gradient in part(expected, "grad/network.").items():
        assert_gradient(gradients[ours(name)].grad, gradient, name)
    assert_gradient_norms(head, {ours(name): norm for name, norm in description["grad_norms"].items()})
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def ours(name: str) -> str:
    """Our name of a parameter of PMT's decoder."""
    renamed = {"q.": "query.", "class_head.": "class_predictor.", "mask_head.0": "mask_head.fc1",
               "mask_head.2": "mask_head.fc2", "mask_head.4": "mask_head.fc3", "upscale.": "upscale_block.block."}
    name = name.removeprefix("decoder.")
    for theirs, mine in renamed.items():
        if name.startswith(theirs):
            return (mine + name.removeprefix(theirs)).replace(".norm.", ".layernorm2d.")
    return name


# -- EoMT --------------------------------------------------------------------------------------------------------------


def eomt(golden: Any, *, with_base: bool = True, trainable: bool = True
         ) -> tuple[Segmenter, dict[str, Any], dict[str, Tensor]]:
    """An EoMT on the recorded pretrained ViT, or on random weights."""
    description, tensors = golden("eomt_delta_small")
    sizes = description["settings"]
    vit = vit_of(sizes)
    if with_base:
        vit.load_state_dict(part(tensors, "base/"))
    backbone = DINOv3Backbone(vit, [sizes["depth"] - 1], trainable=trainable)
    head = EomtHead(sizes["hidden"], sizes["classes"], num_queries=sizes["queries"], num_blocks=sizes["blocks"],
                    num_upscale_blocks=2, activation="gelu", mask_annealing=ANNEALING)
    return Segmenter(PartialBackbone(backbone, sizes["blocks"]), head).eval(), description, tensors


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "state_dict"])
@pytest.mark.parametrize("kind", ["delta", "absolute"])
def test_golden_eomt_as_published(kind: str, wrapped: bool, golden: Any, tmp_path: Path) -> None:
    model, _, tensors = eomt(golden, with_base=kind == "delta")
    model.load_weights(read_weights(published(tensors, f"{kind}/", tmp_path / "pytorch_model.bin", wrapped)))
    head: Any = model.head
    assert not head.attn_mask_probs.any(), "annealed"
    with torch.no_grad():
        assert_predictions(model(images_of(tensors)), part(tensors, "masked_attn_off/"))
        head.load_state_dict(head.state_dict() | {"attn_mask_probs": torch.ones(len(head.attn_mask_probs))})
        outputs = head(model.segmentation_model[0](images_of(tensors)), with_aux=True)
    assert_predictions(outputs, part(tensors, "masked_attn_on/"))


def test_golden_deltas_are_refused_where_they_do_not_belong(golden: Any, tmp_path: Path) -> None:
    model, _, tensors = eomt(golden)
    weights = read_weights(published(tensors, "delta/", tmp_path / "pytorch_model.bin"))
    model.backbone.vit.half().float()  # in place: the right ViT, rounded, is as near as a wrong one can be
    with pytest.raises(ConfigError, match=r"were made from another ViT .* \d+ of \d+ sums had to be rounded"):
        model.load_weights(weights)
    other, *_ = eomt(golden, with_base=False)
    with pytest.raises(ConfigError, match=r"too large to be differences|made from another ViT"):
        other.load_weights(weights)
    frozen, *_ = eomt(golden, trainable=False)
    with pytest.raises(ConfigError, match=r"changes the ViT, but backbone\.trainable is false"):
        frozen.load_weights(weights)
