"""How fast is it on a GPU? Training steps by head, ViT and image side, evaluation, the loss, and the dearest kernels.

Random weights of the published sizes, images and targets from memory, as the loader has benchmarks of its own. Steps
are whole: forward pass in `train.precision=auto`, loss with matching, backward pass, clipping and AdamW. Every row is
measured on its own, after warming up; cases that do not fit into memory are left out. One command, no network, a few
minutes; `make gpu-check` runs it after the tests. On a CPU it only shows that it works.

example: python -m benchmarks.gpu
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluation import CLASSES, one_window_at_a_time
from benchmarks.loss import TheirLoss
from benchmarks.results import Result, benchmark_parser, spread
from trainer.build import build_criterion, build_model
from trainer.config import RunConfig, load_run_config
from trainer.data.targets import dense_masks
from trainer.evaluation.predictor import Predictor
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.models import Segmenter
from trainer.models.deform_attn import sample_by_triton
from trainer.optimizer import build_optimizer, clip_gradients
from trainer.precision import autocast, store_for_autocast

VITS = {  # width, blocks, heads, width of the MLP, gated
    "S": (384, 12, 6, 1536, False), "B": (768, 12, 12, 3072, False), "L": (1024, 24, 16, 4096, False),
    "7B": (4096, 40, 32, 8192, True), "tiny": (32, 4, 1, 32, False),
}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "use_gated_mlp")
HEADS = ("m2f", "linear", "eomt", "pmt")
SMALL = {"m2f": ("hidden_dim=32", "nheads=2", "enc_layers=1", "enc_ffn=32", "dec_layers=1", "dec_ffn=32"),
         "linear": (), "eomt": ("num_blocks=2",), "pmt": ("dec_layers=1", "block_ffn=64")}
WARM_UP, SEGMENTS = 3, 10
KERNELS = 10  # of the profile


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--vits", nargs="+", default=["S", "B", "L"], choices=VITS)
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS)
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 896])
    parser.add_argument("--batch", type=int, default=2, help="images per step (default: 2)")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--no-7b", action="store_true", help="leave out the forward pass of the 7B ViT")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --vits tiny --sides 64 shows that it works")
    result = Result("gpu" if device.type == "cuda" else "gpu-cpu", arguments.results)
    measure_steps(result, arguments, device)
    if not arguments.no_7b:
        measure_forward(result, arguments, device)
    measure_evaluation(result, arguments, device)
    measure_loss(result, arguments, device)
    profile(result, arguments, device)
    result.note(f"Device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}.")
    result.save()


def configured(vit: str, head: str, *overrides: str) -> RunConfig:
    """A recipe's head on a random ViT."""
    sizes = [f"backbone.random.{name}={str(value).lower()}" for name, value in zip(FIELDS, VITS[vit], strict=True)]
    small = [f"decoder_head.{setting}" for setting in SMALL[head]] if vit == "tiny" else []
    layers = ["adapter.conv_inplane=8", "adapter.deform_num_heads=1"] if vit == "tiny" and head == "m2f" else []
    return load_run_config(None, [f"decoder_head.type={head}", *sizes, *small, *layers, *overrides])


def model_on(device: torch.device, config: RunConfig) -> Segmenter:
    """Initialised on the device, where that takes a moment; a frozen ViT as in training."""
    with device:
        model = build_model(config, CLASSES)
    model.to(device)
    store_for_autocast(model, config, device)
    return model


def batch_of(count: int, side: int, device: torch.device) -> tuple[Tensor, list[Any]]:
    """Normalised images, and targets of blocky segments."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, SEGMENTS, (count, 8, 8), generator=generator).to(torch.uint8)
    maps = maps.repeat_interleave(side // 8, 1).repeat_interleave(side // 8, 2)
    labels = [torch.randperm(CLASSES, generator=generator)[:SEGMENTS].to(device) for _ in range(count)]
    return (torch.randn(count, 3, side, side, generator=generator).to(device),
            [{"segment_map": one.to(device), "labels": ids} for one, ids in zip(maps, labels, strict=True)])


def step_of(model: Segmenter, config: RunConfig, images: Tensor, targets: list[Any]) -> Callable[[], None]:
    """A whole training step."""
    device = images.device
    model.train()
    criterion = build_criterion(config, CLASSES, 255).to(device)
    optimizer = build_optimizer(model, config.optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_masks = torch.full((), float(SEGMENTS * len(targets)), device=device)
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(config, device):
            outputs = model(images)
        criterion(outputs, targets, num_masks, generator).total.backward()
        clip_gradients(parameters, config.optimizer.clip_grad_norm)
        optimizer.step()

    return step


def seconds_of(run: Callable[[], Any], device: torch.device, repetitions: int) -> list[float]:
    """Of each repetition, to the end of the device's work."""
    found = []
    for number in range(WARM_UP + repetitions):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            found.append(time.perf_counter() - start)
    return found


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """A function that gives the GB held at most since; None on a CPU."""
    if device.type != "cuda":
        yield lambda: None
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) / 1e9


def measure_steps(result: Result, arguments: argparse.Namespace, device: torch.device) -> None:
    table = result.table(f"Training steps, {arguments.batch} images", "head", "ViT", "side", "sampling", "ms a step",
                         "images/s", "peak GB")
    for vit in arguments.vits:
        for head in arguments.heads:
            for side in arguments.sides:
                for triton in (False, True) if head == "m2f" and device.type == "cuda" else (False,):
                    config = configured(vit, head)
                    with peak_memory(device) as peak:
                        try:
                            model = model_on(device, config)
                            if triton:
                                sample_by_triton(model, device)
                            step = step_of(model, config, *batch_of(arguments.batch, side, device))
                            taken = seconds_of(step, device, arguments.repetitions)
                        except torch.OutOfMemoryError:
                            table.row(head, vit, side, "", None, None, None)
                            continue
                        sampling = ("Triton" if triton else "grid_sample") if head == "m2f" else ""
                        table.row(head, vit, side, sampling, spread(taken, 1000),
                                  spread([arguments.batch / one for one in taken]), peak())


def measure_forward(result: Result, arguments: argparse.Namespace, device: torch.device) -> None:
    vit = "7B" if device.type == "cuda" else "tiny"
    table = result.table("Forward pass of the frozen ViT, 1 image", "ViT", "side", "ms", "peak GB")
    config = configured(vit, "linear")
    with peak_memory(device) as peak:
        model = model_on(device, config).eval()
        for side in arguments.sides:
            images, _ = batch_of(1, side, device)
            with torch.inference_mode(), autocast(config, device):
                taken = seconds_of(lambda images=images: model.backbone(images), device, arguments.repetitions)
            table.row(vit, side, spread(taken, 1000), peak())


def measure_evaluation(result: Result, arguments: argparse.Namespace, device: torch.device) -> None:
    side = min(arguments.sides)
    stride = 2 * side // 3
    table = result.table(f"Evaluation of images of {3 * side // 2} x {2 * side} pixels, windows of {side}", "head",
                         "ViT", "batches of windows, images/s", "one window at a time, images/s")
    picture = torch.randint(0, 256, (3, 3 * side // 2, 2 * side), dtype=torch.uint8)
    for head in arguments.heads:
        config = configured(arguments.vits[0], head, f"eval.crop_size={side}", f"eval.stride={stride}",
                            f"device={device.type}")
        model = model_on(device, config).eval()
        predict = Predictor(model, config, CLASSES, device)
        batched = seconds_of(lambda predict=predict: predict(picture), device, arguments.repetitions)
        with torch.inference_mode(), autocast(config, device), device:
            single = seconds_of(lambda model=model, config=config: one_window_at_a_time(
                model, config, picture.to(device), side, stride), device, arguments.repetitions)
        table.row(head, arguments.vits[0], spread([1 / one for one in batched]), spread([1 / one for one in single]))


def measure_loss(result: Result, arguments: argparse.Namespace, device: torch.device) -> None:
    """Ten predictions of 100 masks, forward and backward."""
    from transformers import Mask2FormerConfig

    side, points = min(arguments.sides), 12_544 if device.type == "cuda" else 500
    _, targets = batch_of(arguments.batch, side, device)
    dense = [{"masks": dense_masks(one["segment_map"].cpu(), SEGMENTS).to(device), "labels": one["labels"]}
             for one in targets]
    with device:
        masks = [torch.randn(arguments.batch, 100, side // 4, side // 4, requires_grad=True) for _ in range(10)]
        classes = [torch.randn(arguments.batch, 100, CLASSES + 1, requires_grad=True) for _ in range(10)]
        theirs = TheirLoss(Mask2FormerConfig(num_labels=CLASSES, train_num_points=points)).to(device)
        ours = MaskClassificationLoss(points, 3.0, 0.75, 5.0, 5.0, 2.0, CLASSES, 0.1).to(device)

    def their_step() -> None:
        with device:
            torch.stack([theirs.total(one, dense, scores) for one, scores in zip(masks, classes, strict=True)]
                        ).sum().backward()

    def our_step() -> None:
        items = [{"pred_masks": one, "pred_logits": scores} for one, scores in zip(masks, classes, strict=True)]
        ours.step({**items[0], "aux_outputs": items[1:]}, targets).total.backward()

    table = result.table(f"Loss of ten predictions, {arguments.batch} images of {side} pixels", "", "ms")
    for name, step in (("transformers", their_step), ("ours", our_step)):
        table.row(name, spread(seconds_of(step, device, arguments.repetitions), 1000))


def profile(result: Result, arguments: argparse.Namespace, device: torch.device) -> None:
    """The dearest kernels of a step of the first head."""
    head, side = arguments.heads[0], min(arguments.sides)
    config = configured(arguments.vits[-1], head)
    step = step_of(model_on(device, config), config, *batch_of(arguments.batch, side, device))
    for _ in range(WARM_UP):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as record:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    table = result.table(f"The {KERNELS} dearest kernels of a step, {head} on ViT-{arguments.vits[-1]}, side {side}",
                         "kernel", "calls", "ms", "share, %")
    for event in events[:KERNELS]:
        taken = getattr(event, name)
        table.row(event.key[:80].replace("|", "/"), event.count, taken / 1000, 100 * taken / total)


if __name__ == "__main__":
    main()
