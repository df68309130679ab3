"""What only a GPU can prove: `make gpu-check`. `pytest tests/gpu --device cpu` runs everything that a CPU can.

Small networks, as numbers are compared, not times: benchmarks/gpu.py measures. Nothing outside of this machine is
needed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from shards.crops.drawing import Crop
from shards.crops.resampling import cut_image
from tests.conftest import REPOSITORY
from tests.golden.test_loss_and_evaluation import MaskLossCase, in_drawing_order
from tests.golden.test_models import golden_adapter, golden_head, part
from tests.golden.test_published_heads import images_of, pmt
from tests.support.training_run import TINY, assert_same_end, final_state
from tests.support.zygote import call_on_ranks
from tests.unit.test_trainer_models_precision import HEADS, images, loss_of, model_of
from trainer.config import LossConfig, load_run_config
from trainer.data.resampling import region_of, resample
from trainer.distributed import distributed
from trainer.evaluation.predictor import Predictor
from trainer.loop import train as train_run
from trainer.loss.criterion import MaskCriterion
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.models.deform_attn import MSDeformAttn, deformable_sampling, gathered_sampling
from trainer.precision import store_for_autocast
from trainer.reporting.run_logger import read_metrics

__all__ = ["golden_adapter", "golden_head", "pmt"]  # fixtures

CPU = torch.device("cpu")
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device to prove, in exact float32."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; `pytest tests/gpu --device cpu` runs what a CPU can")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(name)
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


def assert_near(found: Tensor, expected: Tensor, share: float) -> None:
    """Within this share of the largest number."""
    difference = float((found.detach().float().cpu() - expected.detach().float().cpu()).abs().max())
    assert difference <= share * float(expected.detach().abs().max().cpu()) + 1e-7, difference


# -- numbers ---------------------------------------------------------------------------------------------------------


@EVERY_HEAD
def test_networks_compute_and_learn_as_on_the_cpu(head: str, device: torch.device) -> None:
    """Outputs and gradients. Rounding can flip a position of masked attention, so one of three images must agree."""
    problems = []
    for seed in range(3):
        pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
        results = []
        for place in (CPU, device):
            still = "decoder_head.dropout=0" if head == "linear" else "adapter.drop_path=0"
            model = model_of(head, still).to(place).train()
            model.head.set_progress(0.0, 1)
            outputs = model(pixels.to(place))
            loss_of(outputs).backward()
            results.append([leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)] + [
                parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        try:
            for expected, found in zip(*results, strict=True):
                assert found.device.type == device.type
                assert_near(found, expected, 1e-3)
        except AssertionError as error:
            problems.append(str(error))
        else:
            return
    pytest.fail(f"differences at three images: {problems}")


@EVERY_HEAD
def test_bf16_stays_close_to_float32(head: str, device: torch.device) -> None:
    model = model_of(head).to(device).eval()
    pixels = images().to(device)
    with torch.no_grad():
        exact = model.semantic_logits(model(pixels), (64, 96))
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(pixels)
        assert_near(model.semantic_logits(outputs, (64, 96)), exact, 0.1)


@EVERY_HEAD
def test_a_frozen_vit_stored_in_bf16_changes_no_bit(head: str, device: torch.device) -> None:
    model = model_of(head, "backbone.trainable=false").to(device).eval()

    def scores() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            outputs = model(images().to(device))
        return model.semantic_logits(outputs, (64, 96))

    before = scores()
    store_for_autocast(model, load_run_config(None, ["train.precision=bf16"]), device)
    assert torch.equal(scores(), before)


class SamePoints(MaskClassificationLoss):
    """Draws its points on the CPU, the same for every device."""

    def make_draw(self, device: torch.device, generator: torch.Generator | None) -> Callable[[tuple[int, ...]], Tensor]:
        source = torch.Generator().manual_seed(0)
        return lambda shape: torch.rand(shape, generator=source).to(device)


def loss_inputs(place: torch.device) -> tuple[Any, list[Any]]:
    generator = torch.Generator().manual_seed(1)
    items = [{"pred_logits": torch.randn(2, 9, 6, generator=generator).to(place).requires_grad_(),
              "pred_masks": torch.randn(2, 9, 24, 32, generator=generator).to(place).requires_grad_()}
             for _ in range(3)]
    targets = [{"masks": (torch.rand(count, 96, 128, generator=generator) > 0.6).float().to(place),
                "labels": torch.arange(count).to(place)} for count in (4, 2)]
    return items[0] | {"aux_outputs": items[1:]}, targets


def test_the_loss_is_that_of_the_cpu(device: torch.device) -> None:
    results = []
    for place in (CPU, device):
        criterion = MaskCriterion(LossConfig(num_points=500), 5).to(place)
        criterion.loss.__class__ = SamePoints
        outputs, targets = loss_inputs(place)
        total, losses, *_ = criterion.loss.step(outputs, targets)
        total.backward()
        results.append([total, *losses.values(), *(item[name].grad for item in (outputs, *outputs["aux_outputs"])
                                                   for name in ("pred_logits", "pred_masks"))])
    for expected, found in zip(*results, strict=True):
        assert_near(found, expected, 1e-4)


def test_deformable_attention_by_gathers_and_triton_is_the_same(device: torch.device) -> None:
    generator, shapes = torch.Generator().manual_seed(0), [(9, 7), (4, 5), (2, 3)]
    value = torch.randn(2, sum(h * w for h, w in shapes), 3, 24, generator=generator)
    locations = 1.4 * torch.rand(2, 50, 3, 3, 4, 2, generator=generator) - 0.2
    weights = torch.rand(2, 50, 3, 3, 4, generator=generator)

    def run(sample: Any, place: torch.device) -> list[Tensor]:
        leaves = [tensor.to(place).requires_grad_() for tensor in (value, locations, weights)]
        found = sample(leaves[0], shapes, leaves[1], leaves[2])
        found.sin().sum().backward()
        return [found, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    samplings = [deformable_sampling, gathered_sampling]
    if device.type == "cuda":
        from trainer.models.deform_attn_triton import triton_sampling

        samplings.append(triton_sampling)
    expected = run(deformable_sampling, CPU)
    for sample in samplings:
        for found, of_cpu in zip(run(sample, device), expected, strict=True):
            assert_near(found, of_cpu, 1e-5 if sample is deformable_sampling else 1e-4)


def test_the_device_resizes_as_pillow_does(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width = rng.integers(1, 200, 2)
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        scaled = [max(1, int(side * rng.uniform(0.3, 3))) for side in (height, width)]
        size = [int(rng.integers(1, min(side, 128) + 1)) for side in scaled]
        top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(scaled, size, strict=True))
        crop = Crop(scaled[0], scaled[1], top, left, size[0], size[1])
        expected = np.asarray(cut_image(Image.fromarray(image), crop, max(size)))[: size[0], : size[1]]
        region, resize = region_of(image, crop)
        found = resample(torch.from_numpy(region.copy()).to(device), resize)
        assert np.array_equal(found.cpu().numpy(), expected)


def test_label_maps_are_those_of_the_cpu(device: torch.device) -> None:
    config = load_run_config(TINY, ["decoder_head.type=linear", "eval.crop_size=64", "eval.stride=48",
                                    "train.precision=fp32"])
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 90, 150), np.uint8))
    maps = [Predictor(model_of("linear").to(place).eval(), config, 5, place)(picture).cpu() for place in (CPU, device)]
    assert (maps[0] == maps[1]).float().mean() > 0.999


# -- the reference's numbers ---------------------------------------------------------------------------------------


PRECISIONS = pytest.mark.parametrize(("low", "share"), [(False, 1e-3), (True, 0.05)], ids=["float32", "bf16"])


@PRECISIONS
def test_golden_m2f(golden_head: Any, device: torch.device, low: bool, share: float) -> None:
    """In bf16 the first prediction only: later ones depend on which positions are masked."""
    head, _, tensors = golden_head
    features = {name: tensor.to(device) for name, tensor in part(tensors, "inputs/").items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        outputs = head.to(device)(features, with_aux=True)
    for name in ("pred_logits", "pred_masks"):
        assert_near(outputs["aux_outputs"][0][name], tensors[f"outputs/aux_outputs.0.{name}"], share)
        if not low:
            assert_near(outputs[name], tensors[f"outputs/{name}"], share)


@PRECISIONS
def test_golden_adapter(golden_adapter: Any, device: torch.device, low: bool, share: float) -> None:
    adapter, _, tensors = golden_adapter
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        outputs = adapter.to(device).eval()(tensors["inputs/image"].to(device))
    for name, output in outputs.items():
        assert_near(output, tensors[f"outputs/{name}"], share)


@PRECISIONS
def test_golden_pmt(pmt: Any, device: torch.device, low: bool, share: float) -> None:
    model, _, tensors = pmt
    model.to(device).eval()
    head = model.head
    head.load_state_dict(head.state_dict() | {"attn_mask_probs": torch.zeros(len(head.blocks), device=device)})
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        outputs = model(images_of(tensors).to(device))
    expected = part(tensors, "unmasked_attention/")
    last = sum(name.startswith("mask_logits") for name in expected) - 1
    assert_near(outputs["pred_masks"], expected[f"mask_logits{last}"], share)
    assert_near(outputs["pred_logits"], expected[f"class_logits{last}"], share)


def test_golden_mask_loss(golden: Any, device: torch.device) -> None:
    info, tensors = golden("mask_loss_small")
    case = MaskLossCase(info, {name: tensor.to(device) for name, tensor in tensors.items()})
    loss = case.loss().to(device)
    candidates, rests = zip(*map(case.loss_points, case.layers), strict=True)
    loss.recorded = in_drawing_order([points for layer in case.layers for points in case.matcher_points(layer)],
                                     candidates, rests)
    items = [{"pred_logits": found.class_logits, "pred_masks": found.mask_logits}
             for found in map(case.prediction, case.layers)]
    total, *_ = loss.step(items[0] | {"aux_outputs": items[1:]}, case.targets)
    assert_near(total, tensors["losses/sum_over_layers"][0], 1e-4)
    total.backward()
    for layer, item in zip(case.layers, items, strict=True):
        for name, logits in item.items():
            assert_near(logits.grad, tensors[f"{layer}grads/{name}"], 1e-3)


# -- waits, memory, compilation --------------------------------------------------------------------------------------


@EVERY_HEAD
def test_forward_and_backward_passes_never_wait(head: str, cuda: torch.device) -> None:
    model, pixels = model_of(head).to(cuda).train(), images().to(cuda)
    model.head.set_progress(0.3, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model(pixels)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loss_waits_once(cuda: torch.device) -> None:
    """For the costs, which the Hungarian algorithm needs on the host."""
    criterion = MaskCriterion(LossConfig(num_points=500), 5).to(cuda)
    outputs, targets = loss_inputs(cuda)
    num_masks, generator = torch.ones((), device=cuda), torch.Generator(cuda).manual_seed(0)
    criterion(outputs, targets, num_masks, generator)  # warms up
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            criterion(outputs, targets, num_masks, generator).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(item.message) for item in caught if "synchroniz" in str(item.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("part", ["head", "vit"])
def test_parts_compile(part: str, cuda: torch.device) -> None:
    plain, compiled = (model_of("m2f").to(cuda).eval() for _ in range(2))
    if part == "head":
        compiled.head.compile()
    else:
        for block in compiled.backbone.blocks:
            block.compile()
    with torch.no_grad():
        assert_near(compiled(images().to(cuda))["pred_masks"], plain(images().to(cuda))["pred_masks"], 1e-2)


def test_synchronised_batch_norm_runs(cuda: torch.device) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model_of("m2f"))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    model.to(cuda).eval()(images().to(cuda))


def test_triton_kernels_never_wait(cuda: torch.device) -> None:
    from trainer.models.deform_attn import sample_by_triton

    model = model_of("m2f").to(cuda).train()
    sample_by_triton(model, cuda)
    assert any(isinstance(module, MSDeformAttn) for module in model.modules())
    loss_of(model(images().to(cuda))).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model(images().to(cuda))).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- runs ------------------------------------------------------------------------------------------------------------


def train(device: torch.device, root: Path, folder: Path, *settings: str, ranks: int = 0) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(REPOSITORY / "trainer/train.py"), "--config", str(TINY),
               f"data.root={root}", f"output_dir={folder}", f"device={device.type}", "train.log_every=1", *settings]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def last_loss(said: str) -> float:
    return float(re.findall(r"loss ([0-9.]+)", said)[-1])


@EVERY_HEAD
def test_a_killed_run_goes_on_where_it_was(head: str, device: torch.device, scene_shards: Path,
                                           tmp_path: Path) -> None:
    """Bit for bit."""
    steps = 50 if device.type == "cuda" else 12
    settings = [f"decoder_head.type={head}", *HEADS[head], f"train.total_steps={steps}", "train.checkpoint_every=5",
                f"train.eval_every={steps}", "train.deterministic=true", "train.ema_decay=0.9"]
    finish(train(device, scene_shards, tmp_path / "whole", *settings))
    process = train(device, scene_shards, tmp_path / "killed", *settings)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed/checkpoints").glob("*5.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    said = finish(train(device, scene_shards, tmp_path / "killed", *settings))
    assert "continuing at step" in said
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_rank_of_torchrun_trains_in_half_precision(precision: str, device: torch.device, scene_shards: Path,
                                                     tmp_path: Path) -> None:
    """NCCL with one rank on CUDA."""
    said = finish(train(device, scene_shards, tmp_path / "run", f"train.precision={precision}", "data.workers=1",
                        "train.ema_decay=0.9", ranks=1))
    assert last_loss(said) > 0 and f"on {device.type}" in said


def test_a_rank_trains_sharded(device: torch.device, scene_shards: Path, tmp_path: Path) -> None:
    """NCCL and FSDP2 with one rank on CUDA, to the same end as without."""
    settings = ("decoder_head.type=eomt", *HEADS["eomt"], "train.deterministic=true", "train.precision=fp32")
    for name in ("false", "true"):
        finish(train(device, scene_shards, tmp_path / name, *settings, f"train.fsdp={name}", ranks=1))
    whole, sharded = (final_state(tmp_path / name).model for name in ("false", "true"))
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: name + text)


def _on_rank(rank: int, device: str, *settings: str) -> None:
    with distributed("cpu") as context:  # gloo, as NCCL allows no two ranks on a GPU
        train_run(load_run_config(TINY, list(settings)), replace(context, device=torch.device(device)))


def test_two_ranks_on_one_device_learn_as_one(device: torch.device, scene_shards: Path, tmp_path: Path) -> None:
    """With synchronised batch norm on CUDA."""
    settings = [f"data.root={scene_shards}", "train.deterministic=true", "train.log_every=1", "optimizer.lr=1e-4"]
    for ranks in (1, 2):
        call_on_ranks(_on_rank, str(device), *settings, f"output_dir={tmp_path / str(ranks)}", ranks=ranks)
    one, two = ([record["loss"] for record in read_metrics(tmp_path / str(ranks)) if record["kind"] == "train"]
                for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-2)
