"""DINOv2: the features of transformers' classes and of Meta's forward pass; the 16-pixel grid; what training needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from shards.errors import ConfigError
from shards.manifest import ClassInfo
from tests.unit.test_trainer_models import all_predictions_loss
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.exporting.directory import write_directory
from trainer.exporting.program import inference_program
from trainer.model_config import BackboneConfig
from trainer.models.backbones.base import vit_layers_above
from trainer.models.backbones.dinov2 import interpolated, resampling
from trainer.models.backbones.dinov2_keys import RELEASED_DINOV2, build_dinov2, dinov2_to_meta
from trainer.models.backbones.sources import build_backbone
from trainer.models.weights import read_weights
from trainer.optimizer import param_groups
from trainer.pretrained import Pretrained, load_pretrained

State = dict[str, Tensor]
HEADS = 2
KINDS = pytest.mark.parametrize("registers, gated", [(0, False), (4, False), (0, True), (4, True)],
                                ids=["plain", "registers", "swiglu", "registers-swiglu"])


def vit(registers: int = 0, gated: bool = False, patch_size: int = 14, seed: int = 0, **changes: Any) -> Any:
    """A random ViT of transformers' class with 5x5 positions, every weight far from its default."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": HEADS, "mlp_ratio": 2,
                             "image_size": 5 * patch_size, "patch_size": patch_size, "use_swiglu_ffn": gated,
                             **changes}
    model = (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)) if registers
             else Dinov2Model(Dinov2Config(**sizes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def scaled(pixels: Tensor, patch_size: int = 14) -> Tensor:
    size = [side // 16 * patch_size for side in pixels.shape[2:]]
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def source(folder: Path, **settings: Any) -> BackboneConfig:
    return BackboneConfig(source=str(folder), **{"layers": "FOUR_LAST", **settings})


def reference_tokens(state: State, pixels: Tensor) -> list[Tensor]:
    """Meta's forward pass from a state dict in Meta's layout: normed tokens after every block. Written from the
    paper's description, on images whose patches are those of the weights."""
    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    patch = state["patch_embed.proj.weight"].shape[-1]
    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], patch)
    grid = (patches.shape[2], patches.shape[3])
    registers = state.get("register_tokens", torch.empty(1, 0, patches.shape[1]))
    positions = interpolated(state["pos_embed"][:, 1:], grid, antialias=bool(registers.numel()))
    x = patches.flatten(2).mT + positions
    prefix = torch.cat([state["cls_token"] + state["pos_embed"][:, :1], registers], dim=1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    outputs = []
    for number in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        block = f"blocks.{number}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + state[f"{block}.ls1.gamma"] * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        normed = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in state:
            gate, up = linear(normed, f"{block}.mlp.w12").chunk(2, dim=-1)
            out = linear(F.silu(gate) * up, f"{block}.mlp.w3")
        else:
            out = linear(F.gelu(linear(normed, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.ls2.gamma"] * out
        outputs.append(norm(x, "norm"))
    return outputs


# -- the same numbers --------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("size", [(80, 80), (64, 96), (16, 48)], ids=str)
def test_features_equal_those_of_transformers(registers: int, gated: bool, size: tuple[int, int],
                                              tmp_path: Path) -> None:
    theirs = vit(registers, gated)
    theirs.save_pretrained(tmp_path)
    backbone = build_backbone(source(tmp_path, patch_resize="image"))
    pixels = images(*size)
    with torch.no_grad():
        states = theirs(scaled(pixels), output_hidden_states=True).hidden_states[1:]
        features = backbone(pixels)
        expected = [theirs.layernorm(state) for state in states]
    assert features.grid == (size[0] // 16, size[1] // 16) and features.rope is None
    assert features.num_prefix_tokens == 1 + registers
    torch.testing.assert_close(features.layers, expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_features_of_metas_file_equal_metas_forward_pass(registers: int, gated: bool, tmp_path: Path) -> None:
    state = dinov2_to_meta(vit(registers, gated).state_dict())
    assert ("blocks.0.mlp.w12.weight" in state) == gated and state["blocks.0.attn.qkv.weight"].shape == (384, 128)
    torch.save(state, tmp_path / "vit.pth")
    backbone = build_backbone(source(tmp_path / "vit.pth", patch_resize="image"))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images()).layers, reference_tokens(state, scaled(images())), rtol=1e-4,
                                   atol=1e-5)
    assert backbone.num_heads == HEADS, "64 channels each, as in all released files"
    meta = backbone.meta_state_dict()
    assert meta.keys() == state.keys() and all(torch.equal(meta[key], state[key]) for key in state)


def test_a_vit_with_patches_of_16_pixels_runs_as_it_is(tmp_path: Path) -> None:
    theirs = vit(4, patch_size=16)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(images()).last_hidden_state
        features = build_backbone(source(tmp_path))(images())
    torch.testing.assert_close(features.layers[-1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"patch_resize is image, but the backbone's patches have 16 pixels already"):
        build_backbone(source(tmp_path, patch_resize="image"))


def test_resampled_weights_see_in_enlarged_patches_what_the_original_saw(tmp_path: Path) -> None:
    theirs = vit()
    theirs.save_pretrained(tmp_path)
    small = images(4 * 14, 6 * 14)
    patches = small.unflatten(3, (6, 14)).unflatten(2, (4, 14)).permute(0, 2, 4, 1, 3, 5)  # [B, 4, 6, 3, 14, 14]
    enlarged = F.interpolate(patches.flatten(0, 2), (16, 16), mode="bilinear", align_corners=False)
    large = enlarged.unflatten(0, (2, 4, 6)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [B, 3, 64, 96]
    with torch.no_grad():
        expected = theirs(small).last_hidden_state
        found = build_backbone(source(tmp_path))(large).layers[-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_resampling_is_the_identity_between_equal_sizes() -> None:
    torch.testing.assert_close(resampling(14, 14), torch.eye(14 * 14), rtol=0, atol=1e-6)


def test_positions_on_their_own_grid_are_not_changed() -> None:
    positions = torch.randn(1, 25, 8)
    for antialias in (False, True):
        torch.testing.assert_close(interpolated(positions, (5, 5), antialias=antialias), positions)


@pytest.mark.parametrize("name, millions", [("vits14", 22.1), ("vitb14", 86.6), ("vitl14", 304.4), ("vitg14", 1136.5),
                                            ("vitl14_reg4", 304.4)])
def test_released_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_dinov2(RELEASED_DINOV2[name].config())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_real_vit_gives_transformers_features(real_vit: Path) -> None:
    theirs = Dinov2Model.from_pretrained(real_vit, dtype=torch.float32).eval()
    backbone = build_backbone(BackboneConfig(source=str(real_vit), layers="LAST", patch_resize="image"))
    pixels = images(160, 208, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixels).layers[0], theirs(scaled(pixels)).last_hidden_state)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_identity_is_that_of_everything_used(tmp_path: Path) -> None:
    theirs = vit()
    theirs.save_pretrained(tmp_path / "hf")
    torch.save(dinov2_to_meta(theirs.state_dict()), tmp_path / "meta.pth")
    without = {key: value for key, value in dinov2_to_meta(theirs.state_dict()).items() if key != "mask_token"}
    torch.save(without, tmp_path / "without-mask-token.pth")
    sources = ("hf", "meta.pth", "without-mask-token.pth")
    identities = {build_backbone(source(tmp_path / name)).weights_sha256() for name in sources}
    assert len(identities) == 1
    backbone = build_backbone(source(tmp_path / "hf"))
    backbone.check_same(without, "the file")
    changed = {**without, "blocks.1.ls1.gamma": without["blocks.1.ls1.gamma"] * 1.001}
    with pytest.raises(ConfigError, match=r"the file are not those .* differ in encoder\.layer\.1\.layer_scale1"):
        backbone.check_same(changed, "the file")
    identities.add(build_backbone(source(tmp_path / "hf", patch_resize="image")).weights_sha256())
    vit(num_attention_heads=4).save_pretrained(tmp_path / "heads")
    vit(layer_norm_eps=1e-5).save_pretrained(tmp_path / "epsilon")
    identities |= {build_backbone(source(tmp_path / name)).weights_sha256() for name in ("heads", "epsilon")}
    assert len(identities) == 4, "the way to 16 pixels, the heads and epsilon determine the features"


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("blocks.2.ls1.gamma"), r"missing: blocks\.2\.ls1\.gamma"),
    (lambda state: state.pop("pos_embed"), "not a DINOv3 ViT in Meta's layout"),
    (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
    (lambda state: state.update({"norm.weight": torch.zeros(3)}), r"of another shape: norm\.weight \(3,\)"),
    (lambda state: state.update(pos_embed=torch.zeros(1, 24, 128)), r"of another shape: pos_embed"),
    (lambda state: state.update({"blocks.0.mlp.fc1.weight": torch.zeros(250, 128)}), "of another shape"),
    (lambda state: state.pop("blocks.0.mlp.fc1.weight"), "not a DINOv2 ViT in Meta's layout"),
])
def test_a_file_that_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = dinov2_to_meta(vit().state_dict())
    change(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ConfigError, match=message):
        build_backbone(source(tmp_path / "vit.pth"))


@pytest.mark.parametrize("name, value, message", [
    ("mlp_ratio", 3, r"config\.json: mlp_ratio is 3, but the weights beside it have 2\.0: config\.json does not desc"),
    ("mlp_ratio", None, r"config\.json: mlp_ratio is None, but the weights beside it have"),
    ("num_hidden_layers", 10**6, r"num_hidden_layers is 1000000, but the weights beside it have 4"),
    ("image_size", 10**6, "image_size is 1000000, but the weights beside it have 70"),
    ("image_size", [70, 70], r"image_size is \[70, 70\], but the weights"),
    ("patch_size", 1, "patch_size is 1, but the weights beside it have 14"),
    ("hidden_act", "relu", "hidden_act is 'relu', but the weights beside it have 'gelu'"),
    ("qkv_bias", False, "qkv_bias is False, but the weights beside it have True"),
    ("num_attention_heads", 0, r"config\.json: num_attention_heads is 0, legal: a whole number from 1 to 512"),
    ("num_attention_heads", True, r"num_attention_heads is True, legal"),
    ("num_attention_heads", 3, r"num_attention_heads is 3, legal: a divisor of hidden_size \(128\)"),
    ("hidden_size", 0, r"config\.json: hidden_size is 0, legal"),
    ("layer_norm_eps", -1.0, r"config\.json: layer_norm_eps is -1\.0, legal: a number above 0 and below 1"),
    ("layer_norm_eps", None, "layer_norm_eps is None, legal"),
    ("model_type", [], r"a model of type \[\], legal: dinov3_vit"),
])
def test_a_directory_that_does_not_fit_is_refused(name: str, value: int, message: str, tmp_path: Path) -> None:
    theirs = vit()
    theirs.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match=message):
        build_backbone(source(tmp_path))


@pytest.mark.parametrize("extra", [
    {"attn_implementation": "eager"}, {"_attn_implementation": "eager"}, {"quantization_config": {"bits": 4}},
    {"torch_dtype": "float16"}, {"id2label": {"a": 1}},
], ids=lambda extra: next(iter(extra)))
def test_nothing_else_in_config_json_is_obeyed(extra: dict[str, Any], tmp_path: Path) -> None:
    vit(4).save_pretrained(tmp_path)
    expected = build_backbone(source(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | extra))
    found = build_backbone(source(tmp_path))
    assert found.vit.config._attn_implementation == "sdpa" and found.weights_sha256() == expected.weights_sha256()
    assert all(parameter.dtype == torch.float32 for parameter in found.parameters())


def test_directories_written_before_transformers_5_load(tmp_path: Path) -> None:
    theirs = vit(4, gated=True)
    theirs.save_pretrained(tmp_path)
    expected = build_backbone(source(tmp_path)).weights_sha256()
    state = theirs.state_dict()
    old: State = {}
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
             "o_proj": "output.dense"}
    for key, tensor in state.items():
        for new, name in names.items():
            key = key.replace(f"attention.{new}", f"attention.{name}")
        if "gate_proj" in key:
            tensor = torch.cat([tensor, state[key.replace("gate_proj", "up_proj")]])
        if "up_proj" not in key:
            key = key.replace("gate_proj", "weights_in").replace("down_proj", "weights_out")
            old[key] = tensor.contiguous()
    save_file(old, tmp_path / "model.safetensors")
    assert build_backbone(source(tmp_path)).weights_sha256() == expected


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "folder"])
def test_a_damaged_file_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = {"empty": b"", "truncated": file.read_bytes()[:5000], "text": b"{}", "folder": b""}[damage]
    file.unlink()
    file.mkdir() if damage == "folder" else file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        build_backbone(source(tmp_path))


@pytest.mark.parametrize("change, message", [
    (lambda tensor: tensor.int(), r"layernorm\.bias is a tensor of torch\.int32 on cpu, legal: plain floating-point"),
    (lambda tensor: tensor * torch.nan, r"layernorm\.bias has values that are not finite"),
    (lambda tensor: tensor[:7], r"of another shape: norm\.bias \(7,\)"),
])
def test_what_cannot_be_weights_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["layernorm.bias"] = change(state["layernorm.bias"]).contiguous()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        build_backbone(source(tmp_path))


def test_sides_that_are_no_multiple_of_16_are_refused(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image is 70x84, legal: height and width multiples of 16"):
        build_backbone(source(tmp_path))(images(70, 84))


# -- with the heads ----------------------------------------------------------------------------------------------------

SMALL = {
    "m2f": ("decoder_head.hidden_dim=32", "decoder_head.nheads=4", "decoder_head.enc_layers=1",
            "decoder_head.enc_ffn=32", "decoder_head.dec_layers=2", "decoder_head.dec_ffn=32",
            "decoder_head.num_queries=6", "adapter.conv_inplane=8", "adapter.deform_num_heads=4"),
    "linear": (),
    "eomt": ("decoder_head.num_queries=6", "decoder_head.num_blocks=2"),
    "pmt": ("decoder_head.num_queries=6", "decoder_head.dec_layers=2", "decoder_head.block_ffn=64"),
}


@pytest.mark.parametrize("head", SMALL)
def test_every_head_trains_on_it_and_is_exported_with_it(head: str, tmp_path: Path) -> None:
    vit(4).save_pretrained(tmp_path / "vit")
    config = load_run_config(None, [f"backbone.source={tmp_path / 'vit'}", f"decoder_head.type={head}", *SMALL[head],
                                    "loss.matched_gradients=false"])
    torch.manual_seed(0)
    model = build_model(config, 5).train()
    before = model.backbone.weights_sha256()
    outputs: Any = model(images())
    loss = outputs["logits"].square().mean() if head == "linear" else all_predictions_loss(outputs)
    loss.backward()
    assert not any(parameter.grad is not None for parameter in model.backbone.parameters())
    assert model.backbone.weights_sha256() == before and not model.backbone.vit.training
    model.eval()
    pretrained = Pretrained(model=model, config=config, classes=classes(5))
    write_directory(pretrained, tmp_path / "exported")
    again = load_pretrained(tmp_path / "exported")
    assert again.model.backbone.weights_sha256() == before
    with torch.no_grad():
        scores = [m.semantic_logits(m(images()), (64, 96)) for m in (model, again.model)]
        assert torch.equal(*scores)
        if head == "m2f":
            return  # half a minute to trace; tests/runs/test_export.py does it with DINOv3
        program = inference_program(pretrained).module()
        pixels = torch.randint(0, 256, (1, 3, 128, 64)).to(torch.uint8)
        assert program(pixels).shape == (1, 5, 128, 64)


def classes(count: int) -> list[ClassInfo]:
    return [ClassInfo(name=f"class {number}", color=(number, 0, 0)) for number in range(count)]


def test_trained_it_decays_by_layer_and_keeps_its_layout_in_checkpoints(tmp_path: Path) -> None:
    vit(4, gated=True).save_pretrained(tmp_path)
    config = load_run_config(None, [f"backbone.source={tmp_path}", "decoder_head.type=eomt", *SMALL["eomt"],
                                    "backbone.trainable=true", "optimizer.layer_decay=0.5",
                                    "loss.matched_gradients=false"])
    model = build_model(config, 5).train()
    all_predictions_loss(model(images())).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    above, vit_module = vit_layers_above(model), model.backbone.vit
    named = {name: above[id(parameter)] for name, parameter in vit_module.named_parameters()}
    assert named["layernorm.weight"] == named["encoder.layer.3.mlp.gate_proj.weight"] == 0
    assert named["encoder.layer.0.norm1.bias"] == 3
    assert named["embeddings.position_embeddings"] == named["embeddings.patch_embeddings.projection.weight"] == 4
    groups = {id(parameter): group for group in param_groups(model, config.optimizer) for parameter in group["params"]}
    assert groups[id(vit_module.embeddings.position_embeddings)]["weight_decay"] == 0.0
    assert groups[id(vit_module.embeddings.patch_embeddings.projection.weight)]["lr_scale"] == 0.0625
    state = {key: tensor.clone() for key, tensor in model.trainable_state_dict().items()}
    assert "segmentation_model.0.backbone.blocks.3.mlp.w12.weight" in state
    torch.save({"model": state}, tmp_path / "checkpoint.pt")
    other = build_model(config, 5)
    with torch.no_grad():
        other.backbone.vit.layernorm.weight.add_(1)
    other.load_weights(read_weights(tmp_path / "checkpoint.pt"))
    assert other.backbone.weights_sha256() == model.backbone.weights_sha256()
