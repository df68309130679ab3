"""Weights that others published: every key has a place, every difference is an error, features are equal.

`reference_tokens` is Meta's ViT written down once more in plain torch, on Meta's own keys.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DINOv3ViTModel

from shards.errors import ConfigError
from trainer.build import build_model
from trainer.config import LoadConfig, RunConfig
from trainer.model_config import AdapterConfig, BackboneConfig, DecoderHeadConfig
from trainer.models import Segmenter
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbones.base import tapped_layers
from trainer.models.backbones.dinov3 import DINOv3Backbone
from trainer.models.backbones.dinov3_keys import (
    LOCAL_CLS_NORM,
    RELEASED_VITS,
    VitArchitecture,
    architecture_of,
    kind_of,
    meta_vit_to_transformers,
    rope_periods,
    transformers_vit_to_meta,
)
from trainer.models.backbones.sources import build_backbone
from trainer.models.heads import Mask2FormerHead
from trainer.models.weights import read_weights

State = dict[str, Tensor]
DIM, HEADS, DEPTH = 64, 2, 4
SMALL_VITS = {  # each published kind, small
    "vits16, vitb16, vitl16": VitArchitecture(DIM, DEPTH, HEADS, 96),
    "vits16plus, vith16plus": VitArchitecture(DIM, DEPTH, HEADS, 96, gated=True),
    "vit7b16": VitArchitecture(DIM, DEPTH, HEADS, 96, gated=True, qkv_bias=False),
}
SMALL = SMALL_VITS["vits16, vitb16, vitl16"]
M2F = DecoderHeadConfig(hidden_dim=32, num_queries=4, nheads=4, enc_layers=1, enc_ffn=32, dec_layers=2, dec_ffn=32)
LINEAR = DecoderHeadConfig(type="linear", dropout=0.0)
CLASSES = 5
QKV_BIAS = "blocks.1.attn.qkv.bias"


def meta_vit(architecture: VitArchitecture, *, seed: int = 0, local_cls_norm: bool = False,
             rounded_periods: bool = True) -> State:
    """A ViT's state dict as Meta writes it, with random weights of a size at which every one of them shows.

    The key third of the bias is masked, not zero. Periods are rounded to bfloat16, as in Meta's files.
    """
    with torch.device("meta"):
        empty = DINOv3ViTModel(architecture.config()).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, tensor in transformers_vit_to_meta(empty, architecture.heads).items():
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")):
            state[key] = 1 + 0.3 * noise  # a LayerScale of 1e-5, as initialised, would hide any error
        elif tensor.ndim > 1 and not key.endswith("token"):
            state[key] = noise / math.sqrt(tensor[0].numel())
        else:
            state[key] = 0.5 * noise
        if key.endswith("bias_mask"):
            state[key] = torch.ones(3, tensor.numel() // 3).index_fill(0, torch.tensor(1), 0).flatten()
    periods = rope_periods(architecture.dim // architecture.heads)
    state["rope_embed.periods"] = periods.bfloat16().float() if rounded_periods else periods
    if local_cls_norm:
        state |= {key: torch.randn(architecture.dim, generator=generator) for key in LOCAL_CLS_NORM}
    return state


def make_images(batch: int = 2, height: int = 32, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(9))


def reference_tokens(state: State, heads: int, images: Tensor, layers: list[int]) -> list[Tensor]:
    """Meta's ViT on Meta's keys: tokens [B, 1 + 4 + N, D] after the given blocks and the final norm."""
    dim = state["cls_token"].shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    rows, columns = patches.shape[-2:]
    y, x = ((2 * (torch.arange(count) + 0.5) / count - 1) for count in (rows, columns))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2, 1)  # [N, 2, 1]
    angles = (2 * math.pi * grid / state["rope_embed.periods"]).flatten(1).repeat(1, 2)  # [N, head_dim]

    def turned(t: Tensor) -> Tensor:  # [B, heads, 5 + N, head_dim]; class and storage tokens have no position
        prefix, rest = t[:, :, :5], t[:, :, 5:]
        first, second = rest.chunk(2, dim=-1)
        return torch.cat([prefix, rest * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()], dim=2)

    tokens = torch.cat([state["cls_token"].expand(len(images), -1, -1),
                        state["storage_tokens"].expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
    taken = {}
    for block in range(1 + max(layers)):
        name = f"blocks.{block}"
        normed = norm(tokens, f"{name}.norm1")
        bias = state.get(f"{name}.attn.qkv.bias")
        masked = None if bias is None else bias * state[f"{name}.attn.qkv.bias_mask"]
        qkv = F.linear(normed, state[f"{name}.attn.qkv.weight"], masked)
        q, k, v = qkv.unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
        weights = (turned(q) @ turned(k).mT / math.sqrt(dim // heads)).softmax(dim=-1)
        tokens = tokens + state[f"{name}.ls1.gamma"] * linear((weights @ v).transpose(1, 2).flatten(2),
                                                              f"{name}.attn.proj")
        normed = norm(tokens, f"{name}.norm2")
        if f"{name}.mlp.w1.weight" in state:
            hidden = F.silu(linear(normed, f"{name}.mlp.w1")) * linear(normed, f"{name}.mlp.w2")
            out = linear(hidden, f"{name}.mlp.w3")
        else:
            out = linear(F.gelu(linear(normed, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        tokens = tokens + state[f"{name}.ls2.gamma"] * out
        taken[block] = norm(tokens, "norm")
    return [taken[layer] for layer in layers]


def worst_difference(backbone: DINOv3Backbone, state: State, heads: int = HEADS) -> float:
    """Largest difference between ours and `reference_tokens`, over all tokens of all tapped layers."""
    expected = reference_tokens(state, heads, make_images(), backbone.layers)
    worst = 0.0
    for ours, tokens in zip(backbone(make_images()).layers, expected, strict=True):
        worst = max(worst, float((ours - tokens).abs().max()))
    return worst


def backbone_from(state: Any, path: Path) -> DINOv3Backbone:
    torch.save(state, path)
    return build_backbone(BackboneConfig(source=str(path)))


def model_on(vit_file: Path, head: DecoderHeadConfig = M2F, classes: int = CLASSES, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    backbone = BackboneConfig(source=str(vit_file))
    adapter = AdapterConfig(conv_inplane=8, drop_path=0.0)
    return build_model(RunConfig(backbone=backbone, adapter=adapter, decoder_head=head), classes)


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "dinov3_small.pth"
    torch.save(meta_vit(SMALL), path)
    return path


# -- the published key lists ----------------------------------------------------------------------------------------


def full_layout(architecture: VitArchitecture, extra: State | None = None) -> Segmenter:
    """The released size of adapter and head on a ViT, on the meta device: shapes without memory."""
    with torch.device("meta"):
        vit = DINOv3ViTModel(architecture.config())
        backbone = DINOv3Backbone(vit, tapped_layers(architecture.blocks, "FOUR_EVEN_INTERVALS"), extra)
        head = Mask2FormerHead([architecture.dim] * 4, 2048, 150, num_queries=100, nheads=16, enc_layers=6,
                               enc_ffn=4096, dec_layers=9, dec_ffn=4096)
        return Segmenter(DINOv3Adapter(backbone, AdapterConfig()), head)


@pytest.mark.parametrize("kind", ["vits16", "vitb16", "vitl16", "vit7b16"])
def test_golden_full_model_has_the_published_keys_and_shapes(golden: Any, kind: str) -> None:
    description, _ = golden(f"state_dict_keys_{kind}")
    expected = {key: tuple(shape) for key, shape in description["keys"].items()}
    architecture = RELEASED_VITS[kind]
    has_local_norm = f"segmentation_model.0.backbone.{LOCAL_CLS_NORM[0]}" in expected
    assert has_local_norm == (kind == "vit7b16")
    extra = {key: torch.empty(architecture.dim) for key in LOCAL_CLS_NORM} if has_local_norm else {}
    model = full_layout(architecture, extra)
    assert {key: tuple(value.shape) for key, value in model.meta_state_dict().items()} == expected


@pytest.mark.parametrize("kind", ["vits16", "vitb16", "vitl16", "vit7b16"])
def test_golden_vit_keys_tell_the_kind(golden: Any, kind: str) -> None:
    description, _ = golden(f"state_dict_keys_{kind}")
    prefix = "segmentation_model.0.backbone."
    vit = {key.removeprefix(prefix): torch.empty(shape, device="meta")
           for key, shape in description["keys"].items() if key.startswith(prefix)}
    assert kind_of(architecture_of(vit, "the keys")) == kind
    parameters = sum(tensor.numel() for key, tensor in vit.items() if not key.endswith(("bias_mask", "periods")))
    assert parameters == description["param_counts"]["backbone"]


@pytest.mark.parametrize(("kind", "keys_per_block", "millions"), [
    ("vits16", 15, 21.6), ("vits16plus", 17, 28.7), ("vitb16", 15, 85.7), ("vitl16", 15, 303.1),
    ("vith16plus", 17, 840.6), ("vit7b16", 15, 6716.0),
])
def test_every_released_vit_has_the_published_size_and_is_recognised(
    kind: str, keys_per_block: int, millions: float
) -> None:
    architecture = RELEASED_VITS[kind]
    with torch.device("meta"):
        vit = DINOv3ViTModel(architecture.config())
    state = transformers_vit_to_meta(vit.state_dict(), architecture.heads)
    assert len(state) == 8 + keys_per_block * architecture.blocks
    assert sum(parameter.numel() for parameter in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert kind_of(architecture_of(state, "the keys")) == kind
    dim, ffn = architecture.dim, architecture.ffn
    mlp = {"w1": (ffn, dim), "w2": (ffn, dim), "w3": (dim, ffn)} if architecture.gated else {
        "fc1": (ffn, dim), "fc2": (dim, ffn)}
    for name, shape in {f"mlp.{name}": shape for name, shape in mlp.items()}.items():
        assert state[f"blocks.0.{name}.weight"].shape == shape and state[f"blocks.0.{name}.bias"].shape == shape[:1]
    assert ("blocks.0.attn.qkv.bias" in state) == (kind != "vit7b16")
    assert state["rope_embed.periods"].shape == (dim // architecture.heads // 4,)


def test_golden_periods_are_the_formula(golden: Any) -> None:
    _, tensors = golden("dinov3_adapter_small")
    periods = tensors["weights/backbone.rope_embed.periods"]
    assert torch.equal(periods, rope_periods(4 * periods.numel()))


# -- a ViT from Meta's file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_cls_norm", [False, True], ids=["plain", "local_cls_norm"])
@pytest.mark.parametrize("rounded_periods", [False, True], ids=["exact", "bf16 periods"])
@pytest.mark.parametrize("architecture", SMALL_VITS.values(), ids=SMALL_VITS.keys())
def test_features_equal_metas_forward_pass(
    architecture: VitArchitecture, rounded_periods: bool, local_cls_norm: bool, tmp_path: Path
) -> None:
    state = meta_vit(architecture, local_cls_norm=local_cls_norm, rounded_periods=rounded_periods)
    backbone = backbone_from(state, tmp_path / "vit.pth")
    assert worst_difference(backbone, state) < 2e-5
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    written = backbone.meta_state_dict()
    assert written.keys() == state.keys()
    for key, tensor in written.items():
        expected = state[key] * state[f"{key}_mask"] if key.endswith("qkv.bias") else state[key]  # keys get no bias
        assert torch.equal(tensor, expected), key


def test_files_as_meta_published_them_load(tmp_path: Path) -> None:
    """In the released files bias and bias_mask are reported to be zero (facebookresearch/dinov3 issue 195)."""
    state = meta_vit(SMALL)
    state = {key: torch.zeros_like(value) if ".qkv.bias" in key else value for key, value in state.items()}
    backbone = backbone_from(state, tmp_path / "vit.pth")
    assert worst_difference(backbone, state) < 2e-5
    assert not backbone.vit.state_dict()["model.layer.0.attention.q_proj.bias"].any()


def test_the_files_own_periods_are_used_and_seen_by_the_hash(tmp_path: Path) -> None:
    exact, rounded = (meta_vit(SMALL, rounded_periods=choice) for choice in (False, True))
    first, second = backbone_from(exact, tmp_path / "exact.pth"), backbone_from(rounded, tmp_path / "rounded.pth")
    assert worst_difference(first, rounded) > 1e-3 and worst_difference(second, exact) > 1e-3
    assert first.weights_sha256() != second.weights_sha256()
    first.vit.save_pretrained(tmp_path / "hf")  # transformers computes its periods by the formula
    assert build_backbone(BackboneConfig(source=str(tmp_path / "hf"))).weights_sha256() == first.weights_sha256()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "bfloat16", "full"])
def test_a_vit_is_read_from_any_form_of_file(form: str, tmp_path: Path) -> None:
    state, path = meta_vit(SMALL), tmp_path / ("vit.safetensors" if form == "safetensors" else "vit.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "bfloat16":
        state = {key: tensor.bfloat16().float() for key, tensor in state.items()}
        torch.save({key: tensor.bfloat16() for key, tensor in state.items()}, path)
    elif form == "full":
        torch.save({"model": {f"segmentation_model.0.feature_model.{key}": value for key, value in state.items()}
                    | {"segmentation_model.1.conv.bias": torch.zeros(1)}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    backbone = build_backbone(BackboneConfig(source=str(path)))
    path.write_bytes(b"")  # a mapped file would now kill the process
    assert worst_difference(backbone, state) < 2e-5
    assert {tensor.dtype for tensor in backbone.state_dict().values()} == {torch.float32}


def test_swapped_queries_and_keys_give_other_features(tmp_path: Path) -> None:
    state = meta_vit(SMALL)
    q, k, v = state["blocks.2.attn.qkv.weight"].chunk(3)
    swapped = state | {"blocks.2.attn.qkv.weight": torch.cat([k, q, v])}
    assert worst_difference(backbone_from(swapped, tmp_path / "vit.pth"), state) > 1e-2


def altered(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {key: change(state[key])}


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(("damage", "message"), [
    (without("blocks.3.mlp.fc2.bias"), r"do not fit.*missing: blocks\.3\.mlp\.fc2\.bias\."),
    (without("blocks.1.attn.qkv.bias_mask"), r"missing: blocks\.1\.attn\.qkv\.bias_mask"),
    (without("rope_embed.periods"), r"not .* in Meta's layout; missing or wrong shape: 'rope_embed\.periods'"),
    (lambda state: state | {"blocks.0.attn.gate": torch.zeros(1)}, r"unexpected: blocks\.0\.attn\.gate\."),
    (lambda state: state | {"local_cls_norm.weight": torch.zeros(DIM)}, r"missing: local_cls_norm\.bias"),
    (altered("blocks.2.norm1.weight", lambda t: t[:-1]), r"of another shape: blocks\.2\.norm1\.weight \(63,\) instead"),
    (altered(f"{QKV_BIAS}_mask", torch.ones_like), r"blocks\.1\.attn\.qkv\.bias times its bias_mask is not finite"),
    (altered(f"{QKV_BIAS}_mask", lambda t: t * math.nan), "bias_mask has values that are not finite"),
    (altered("rope_embed.periods", lambda t: t**1.1), "have the rotary periods"),
    (lambda state: {f"layer.{key}": value for key, value in state.items()},
     r"neither a ViT in Meta's layout nor a segmentation model; its keys are .* and \d+ more.*Hugging Face"),
    (lambda state: {**state, "epoch": 3}, r"entries are not named tensors: epoch"),
    (lambda state: {}, "contains no weights"),
    (lambda state: {"segmentation_model.1.conv.bias": torch.zeros(1)}, r"a head but no ViT; set load\.w"),
])
def test_a_file_that_is_not_exactly_a_vit_is_refused(
    damage: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone_from(damage(meta_vit(SMALL)), tmp_path / "vit.pth")


@pytest.mark.parametrize(("setting", "message"), [
    ({"use_gated_mlp": False}, "use_gated_mlp is False, but the weights beside it have True"),
    ({"intermediate_size": 48}, "intermediate_size is 48, but the weights beside it have 96"),
    ({"query_bias": False}, "query_bias is False, but the weights beside it have True"),
    ({"rope_theta": 10000.0}, r"rope_theta is 10000\.0, but the weights beside it have 100\.0"),
])
def test_a_hugging_face_directory_whose_config_is_of_another_vit_is_refused(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    DINOv3ViTModel(SMALL_VITS["vits16plus, vith16plus"].config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(source=str(tmp_path)))


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_a_planted_pickle_is_not_executed(legacy: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "vit.pth", tmp_path / "executed"
    content = {**meta_vit(SMALL), "cls_token": Planted(trace)}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=r"vit\.pth cannot be read, .* plain tensors: it contains a .*; save"):
        build_backbone(BackboneConfig(source=str(path)))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_weights(path)
    assert not trace.exists()


def test_unreadable_files_are_named(tmp_path: Path, vit_file: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(vit_file.read_bytes()[:-2000])
    for path, message in ((cut, "cannot be read"), (tmp_path / "no.pth", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=message):
            read_weights(path)
    with pytest.raises(ConfigError, match=r"weights/vit\.pth is not a directory or file"):
        build_backbone(BackboneConfig(source="weights/vit.pth"))  # not to be taken for a hub id
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match=r"bad\.safetensors cannot be read"):
        read_weights(tmp_path / "bad.safetensors")


# -- the whole model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [M2F, LINEAR], ids=["m2f", "linear"])
@pytest.mark.parametrize("architecture", SMALL_VITS.values(), ids=SMALL_VITS.keys())
def test_the_whole_model_goes_through_metas_layout_unchanged(
    architecture: VitArchitecture, head: DecoderHeadConfig, tmp_path: Path
) -> None:
    torch.save(meta_vit(architecture, seed=1, local_cls_norm=True), tmp_path / "one.pth")
    torch.save(meta_vit(architecture, seed=2, rounded_periods=False), tmp_path / "two.pth")
    model, other = model_on(tmp_path / "one.pth", head, seed=1), model_on(tmp_path / "two.pth", head, seed=2)
    torch.save(model.meta_state_dict(), tmp_path / "full.pth")
    other.load_meta_state_dict(torch.load(tmp_path / "full.pth", weights_only=True))
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert other.backbone.weights_sha256() == model.backbone.weights_sha256()
    again = other.meta_state_dict()
    assert again.keys() == model.meta_state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.meta_state_dict().items())
    outputs = [each.eval().semantic_logits(each(make_images()), (32, 64)) for each in (model, other)]
    assert torch.equal(*outputs)


def test_a_whole_model_of_another_kind_changes_nothing(vit_file: Path, tmp_path: Path) -> None:
    torch.save(meta_vit(VitArchitecture(DIM, DEPTH + 1, HEADS, 96)), tmp_path / "deeper.pth")
    other, model = model_on(tmp_path / "deeper.pth"), model_on(vit_file, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"unexpected: blocks\.4\.attn\.proj\.bias, .* and \d+ more"):
        model.load_meta_state_dict(other.meta_state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def saved_head(vit_file: Path, path: Path, layout: str, head: DecoderHeadConfig = M2F) -> Segmenter:
    """A trained model (seed 7) and its file in one of the supported layouts."""
    model = model_on(vit_file, head, seed=7)
    full = model.meta_state_dict()
    bare = {key: value for key, value in full.items() if ".backbone." not in key and ".feature_model." not in key}
    content: dict[str, Any] = {
        "bare release": bare,
        "wrapped": {"model": bare, "optimizer": {"state": {}}},
        "inside DDP": {"model": {f"module.{key}": value for key, value in bare.items()}},
        "full": full,
        "ours": {"model": bare, "format": 1, "backbone_sha256": model.backbone.weights_sha256(), "step": 3},
        "safetensors": bare,
    }[layout]
    if layout == "safetensors":
        save_file({key: value.contiguous() for key, value in bare.items()}, path)
    else:
        torch.save(content, path)
    return model


@pytest.mark.parametrize("head", [M2F, LINEAR], ids=["m2f", "linear"])
@pytest.mark.parametrize("layout", ["bare release", "wrapped", "inside DDP", "full", "ours", "safetensors"])
def test_a_head_is_read_from_every_layout(
    layout: str, head: DecoderHeadConfig, vit_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / ("head.safetensors" if layout == "safetensors" else "head.pth")
    trained = saved_head(vit_file, path, layout, head)
    model = model_on(vit_file, head)
    assert model.load_weights(read_weights(path)) == []
    expected = trained.trainable_state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.trainable_state_dict().items())


@pytest.mark.parametrize("layout", ["full", "ours"])
def test_a_head_of_another_vit_is_refused(layout: str, vit_file: Path, tmp_path: Path) -> None:
    saved_head(vit_file, tmp_path / "head.pth", layout)
    changed = altered("blocks.3.attn.qkv.bias", lambda bias: bias + 1e-3)(meta_vit(SMALL))
    for name, state, difference in (
        ("other", changed, r"model\.layer\.3\.attention\.q_proj\.bias, model\.layer\.3\.attention\.v_proj\.bias"),
        ("exact", meta_vit(SMALL, rounded_periods=False), r"rope_embed\.periods"),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
        model = model_on(tmp_path / f"{name}.pth")
        before = {key: value.clone() for key, value in model.trainable_state_dict().items()}
        message = f"not those of the configured backbone, they differ in {difference};" if layout == "full" else (
            "was trained on another ViT")
        with pytest.raises(ConfigError, match=message):
            model.load_weights(read_weights(tmp_path / "head.pth"))
        assert all(torch.equal(value, before[key]) for key, value in model.trainable_state_dict().items())


def test_a_head_that_does_not_fit_is_refused_key_by_key(vit_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    saved_head(vit_file, path, "bare release")
    with pytest.raises(ConfigError, match=r"head\.pth do not fit this model; missing: segmentation_model\.1\.batchno"
                                          r".*; unexpected: segmentation_model\.0\.interact.* and \d+ more\. Check"):
        model_on(vit_file, LINEAR).load_weights(read_weights(path))
    with pytest.raises(ConfigError, match=r"of another shape: .*class_embed\.bias \(6,\) instead of \(8,\), "
                                          r".*class_embed\.weight \(6, 32\) instead of \(8, 32\)\. Check"):
        model_on(vit_file, classes=7).load_weights(read_weights(path))
    with pytest.raises(ConfigError, match=r"contains a ViT but no head; set backbone\.source"):
        model_on(vit_file).load_weights(read_weights(vit_file))
    # What the reference's training saves of a Mask2Former: the adapter is lost.
    head_only = {key: value for key, value in read_weights(path).model.items() if "segmentation_model.1" in key}
    torch.save({"model": head_only}, tmp_path / "head-only.pth")
    with pytest.raises(ConfigError, match=r"missing: segmentation_model\.0\.interactions"):
        model_on(vit_file).load_weights(read_weights(tmp_path / "head-only.pth"))


def test_ignored_keys_stay_random_and_are_reported(vit_file: Path, tmp_path: Path) -> None:
    trained = saved_head(vit_file, tmp_path / "head.pth", "bare release").trainable_state_dict()
    weights = read_weights(tmp_path / "head.pth")
    expected = [f"segmentation_model.1.predictor.class_embed.{name}" for name in ("bias", "weight")]
    for classes in (CLASSES, 7):  # also where the shape would happen to fit
        model = model_on(vit_file, classes=classes)
        before = {key: value.clone() for key, value in model.trainable_state_dict().items()}
        assert model.load_weights(weights, ["*class_embed.*"]) == expected
        for key, value in model.trainable_state_dict().items():
            assert torch.equal(value, before[key] if key in expected else trained[key]), key
    with pytest.raises(ConfigError, match=r"load\.ignore pattern '\*classembed\*' matches no key"):
        model_on(vit_file).load_weights(weights, ["*class_embed.*", "*classembed*"])
    with pytest.raises(ConfigError, match=r"load\.weights is not set"):
        LoadConfig(ignore=["*class_embed.*"])


def test_conversion_to_transformers_copies_no_weight() -> None:
    """A 7B ViT must not be held twice: converted tensors are views of what was read."""
    state = meta_vit(SMALL)
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    converted = meta_vit_to_transformers(state)
    copied = {key for key, tensor in converted.items() if tensor.untyped_storage().data_ptr() not in storages}
    assert all(key.endswith(("q_proj.bias", "v_proj.bias")) for key in copied)


@pytest.mark.parametrize("name", ["module", "old_module", "namespace", "numpy", "pickle", "script", "text", "empty",
                                  "zip"])
def test_torch_s_advice_to_run_what_is_in_a_file_reaches_nobody(tmp_path: Path, name: str) -> None:
    path, tensor = tmp_path / f"{name}.pt", torch.zeros(2)
    contents: dict[str, Any] = {"module": nn.Linear(2, 2), "old_module": nn.Linear(2, 2), "numpy": {"a": np.zeros(2)},
                                "namespace": {"model": {"a": tensor}, "args": argparse.Namespace(lr=1)}}
    raw = {"pickle": pickle.dumps({"a": [1, {2}]}, protocol=5), "text": b"404 not found " * 99, "empty": b"",
           "zip": b"PK\x03\x04" + b"0" * 200}
    if name == "script":
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), tensor), path)
    elif name in raw:
        path.write_bytes(raw[name])
    else:
        torch.save(contents[name], path, _use_new_zipfile_serialization=name != "old_module")
    with pytest.raises(ConfigError, match=r"damaged or contains more than plain tensors: .") as found:
        read_weights(path)
    assert not re.search(r"weights_only|PyTorch|torch\.load|trust|safe_globals", str(found.value)), found.value
    if name in ("module", "old_module", "namespace"):
        assert "state_dict()" in str(found.value)
