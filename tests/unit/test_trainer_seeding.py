"""Deterministic algorithms: no operation that CUDA cannot do in a fixed order, and the same numbers up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from shards.errors import ConfigError
from tests.support.training_run import TINY
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loop import train_step
from trainer.loss.pixel_loss import pixel_cross_entropy
from trainer.loss.point_losses import spread_to_pixels
from trainer.models.adapter import StemPool
from trainer.models.backbones.dinov2 import interpolated
from trainer.run.run import Run, build_run, run_places
from trainer.seeding import deterministic_algorithms

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
aten = torch.ops.aten
# What torch.use_deterministic_algorithms refuses on CUDA, as far as a CPU dispatches it too, and max pooling. Not
# bilinear interpolation: on CUDA, torch then computes it by operations that are not refused.
REFUSED = {aten.grid_sampler_2d_backward, aten.nll_loss2d_forward, aten.nll_loss2d_backward,
           aten.upsample_bicubic2d_backward, aten._upsample_bicubic2d_aa_backward,
           aten._upsample_bilinear2d_aa_backward, aten.max_pool2d_with_indices_backward,
           aten._adaptive_avg_pool2d_backward, aten.reflection_pad2d_backward,
           aten.adaptive_max_pool2d_backward, aten.put, aten.put_, aten.histc, aten.median, aten.kthvalue}
TRAINED = "backbone.trainable=true"
CASES = {
    "m2f": (), "linear": ("decoder_head.type=linear", "loss.class_weights=inverse_log"),
    "eomt": ("decoder_head.type=eomt", "decoder_head.num_blocks=2", TRAINED),
    "pmt": ("decoder_head.type=pmt", "decoder_head.block_ffn=128"),
    "linear, trained DINOv2": ("decoder_head.type=linear", TRAINED, "backbone.source=dinov2"),
    "eomt, trained DINOv2 with registers": ("decoder_head.type=eomt", "decoder_head.num_blocks=2", TRAINED,
                                            "backbone.source=registers"),
}


class InOrder(TorchDispatchMode):
    """Raises where deterministic algorithms would on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_refused = func.overloadpacket in REFUSED
        if func.overloadpacket in (aten.cumsum, aten.cumsum_):
            is_refused = args[0].is_floating_point()
        if is_refused:
            raise AssertionError(f"{func} has no deterministic implementation on CUDA")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vits")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 1, "image_size": 70,
             "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(folder / "registers")
    return folder


def run_of(case: str, root: Path, vits: Path, folder: Path, *settings: str) -> Run:
    words = [word.replace("backbone.source=", f"backbone.source={vits}/") for word in CASES[case]]
    random = ["backbone.random.hidden_size=null"] if any("source" in word for word in words) else []
    config = load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", *random, *words, *settings])
    return build_run(config, ALONE, run_places(config))


def stepped(run: Run) -> tuple[dict[str, float], dict[str, Tensor]]:
    result = train_step(run, [run.crops[0], run.crops[1]])
    return result.losses, {name: parameter.grad.clone() for name, parameter in run.model.named_parameters()
                           if parameter.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_all_in_order_and_has_the_same_numbers(scene_shards: Path, vits: Path, tmp_path: Path, case: str
                                                         ) -> None:
    usual_losses, usual = stepped(run_of(case, scene_shards, vits, tmp_path))
    run = run_of(case, scene_shards, vits, tmp_path, "train.deterministic=true")
    with deterministic_algorithms(True), InOrder():
        losses, gradients = stepped(run)
    assert losses == pytest.approx(usual_losses, rel=1e-4)
    assert gradients.keys() == usual.keys()
    for name, gradient in gradients.items():
        if "sampling_offsets" in name:  # at whole pixels, where they start, a bilinear sample has two derivatives
            continue
        torch.testing.assert_close(gradient, usual[name], rtol=1e-2, atol=1e-4, msg=lambda text, name=name: name + text)
    if case != "pmt":
        with pytest.raises(AssertionError, match="no deterministic implementation"), InOrder():
            stepped(run_of(case, scene_shards, vits, tmp_path))


def test_each_replacement_equals_what_it_replaces() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 200, 2, generator=generator) * 1.2 - 0.1  # some outside
    at_points = torch.randn(3, 200, generator=generator)
    maps = torch.randn(2, 4, 9, 8, generator=generator)
    labels = torch.randint(0, 4, (2, 20, 18), generator=generator)
    labels[0, :5] = 255
    positions = torch.randn(1, 25, 8, generator=generator).requires_grad_()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])

    def values() -> list[Tensor]:
        pooled = StemPool(3, stride=2, padding=1)(maps)
        return [spread_to_pixels(at_points, points, torch.Size((5, 7))), pooled,
                pixel_cross_entropy(maps, labels), pixel_cross_entropy(maps, labels, class_weights=weights),
                *(interpolated(positions, (3, 8), antialias=antialias) for antialias in (False, True))]

    usual = values()
    with deterministic_algorithms(True):
        for value, expected in zip(values(), usual, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_the_mode_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's
    attention = torch.backends.cuda
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not attention.mem_efficient_sdp_enabled() and not attention.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert attention.mem_efficient_sdp_enabled() and attention.cudnn_sdp_enabled()


def test_kernels_that_add_in_any_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^train\.triton is true, legal with train\.deterministic: false"):
        load_run_config(TINY, ["train.triton=true", "train.deterministic=true"])
