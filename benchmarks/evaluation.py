"""What does evaluating an image cost beside the network, in time, launches and memory?

Compared with one window at a time and whole maps of scores: each window's scores are added to a map of all classes,
which is divided, resized, put through a softmax and added to the sum of the views; the class ids are its argmax. Both
use the same network, and it is an error if they predict different ids in more than 0.1 % of the pixels.
Repetitions are interleaved in one process; ratios are medians over repetitions. Operators are counted as torch
dispatches them, views not, and with bands as large as on a GPU, where each is about one kernel launch. The ViT is that
of --backbone, or of the same sizes with random weights. Memory is the peak of a process of its own above what it holds
before it predicts the large image, with a tiny network (but 100 queries), so that its own memory does not hide that of
the scores.

example: python -m benchmarks.evaluation --backbone ../shared/weights/dinov2-vits14
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.results import Result, benchmark_parser, spread
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.data.transforms import normalize
from trainer.evaluation import score_memory
from trainer.evaluation.predictor import Predictor
from trainer.evaluation.sliding_window import window_grid
from trainer.models import Segmenter

CLASSES, CROP, STRIDE = 150, 512, 341
CPU = torch.device("cpu")
VIEWS = ("view", "slice", "select", "as_strided", "t.default", "transpose", "permute", "expand", "unsqueeze", "squeeze",
         "detach", "alias", "unbind", "split", "unfold")
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


SMALL_HEAD = ("hidden_dim=32", "nheads=2", "enc_layers=1", "dec_layers=1", "enc_ffn=32", "dec_ffn=32")
TINY_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 1, "intermediate_size": 32}


def configured(head: str, backbone: str | None, *overrides: str, sizes: dict[str, int] = SIZES) -> RunConfig:
    """Settings of a ViT with a head, by default of the published sizes."""
    vit = ([f"backbone.source={backbone}"] if backbone else
           [f"backbone.random.{name}={value}" for name, value in sizes.items()])
    widths = ["hidden_dim=256", "nheads=8", "enc_ffn=1024", "dec_ffn=1024"] if head == "m2f" else []
    return load_run_config(None, [f"decoder_head.type={head}", *(f"decoder_head.{width}" for width in widths),
                                  *vit, f"eval.crop_size={CROP}", f"eval.stride={STRIDE}", "device=cpu", *overrides])


def one_window_at_a_time(model: Segmenter, config: RunConfig, image: Tensor, crop: int = CROP,
                         stride: int = STRIDE) -> Tensor:
    """Class ids of an image that is at least as large as a window, with maps of all scores."""
    size = (image.shape[1], image.shape[2])
    view = normalize(image[None], config.backbone.image_mean, config.backbone.image_std)
    total = torch.zeros(1, CLASSES, *size)
    scores, visits = torch.zeros(1, CLASSES, *size), torch.zeros(1, 1, *size)
    for top, bottom, left, right in window_grid(size, (crop, crop), (stride, stride)):
        window = view[:, :, top:bottom, left:right]
        scores[:, :, top:bottom, left:right] += model.semantic_logits(model(window), (crop, crop))
        visits[:, :, top:bottom, left:right] += 1
    total += F.interpolate(scores / visits, size, mode="bilinear", align_corners=False).softmax(1)
    return total.argmax(1)[0]


class Launches(TorchDispatchMode):
    """Counts operators that do something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(name in str(func) for name in VIEWS)
        return func(*args, **(kwargs or {}))


class Timed:
    """The network, with the time spent in it."""

    def __init__(self, model: Segmenter) -> None:
        self.model, self.seconds = model, 0.0
        self.semantic_logits, self.probabilities = model.semantic_logits, model.probabilities

    def __call__(self, images: Tensor) -> Any:
        start = time.perf_counter()
        outputs = self.model(images)
        self.seconds += time.perf_counter() - start
        return outputs


def pictures(count: int, height: int, width: int) -> list[Tensor]:
    """Smooth random pictures uint8 [3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 24, 32, generator=generator) * 255
    return list(F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8))


def measure_time(result: Result, head: str, backbone: str | None, repetitions: int) -> None:
    """The tables of time and launches for one head."""
    images = pictures(4, 512, 683)  # two windows each
    model = Timed(build_model(configured(head, backbone), CLASSES).eval())
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "one window at a time": lambda: [one_window_at_a_time(model, configured(head, backbone), image)  # type: ignore[arg-type]
                                         for image in images]}
    for batch in (1, 2, 4, 8):
        ways[f"eval.window_batch={batch}"] = lambda batch=batch: segmented(model, head, backbone, images, batch, None)
    ways["eval.window_batch=4, with confidences"] = lambda: segmented(model, head, backbone, images, 4, "confidence")
    ways["eval.window_batch=4, half_scores"] = lambda: segmented(model, head, backbone, images, 4, None,
                                                                 "eval.half_scores=true")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    network: dict[str, list[float]] = {name: [] for name in ways}
    launches, differing = {}, {}
    with torch.inference_mode():
        expected = ways["one window at a time"]()
        for name, run in ways.items():
            with Launches() as counter, mock.patch.object(score_memory, "_CACHED", 1 << 62):  # as on a GPU
                found = run()
            launches[name] = counter.count / len(images)
            differing[name] = float(np.mean([(a != b).float().mean() for a, b in zip(found, expected, strict=True)]))
        assert differing["eval.window_batch=4"] < 1e-3, differing
        for _ in range(repetitions):
            for name, run in ways.items():
                model.seconds, start = 0.0, time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                network[name].append(model.seconds)
    table = result.table(f"{head}: 4 images of 512 x 683, 2 windows each, {CLASSES} classes", "", "images/s",
                         "speed, first row = 1", "share outside the network", "operators per image", "ids that differ")
    base = np.array(seconds["one window at a time"])
    for name in ways:
        taken = np.array(seconds[name])
        table.row(name, spread(len(images) / taken), spread(base / taken), spread(1 - np.array(network[name]) / taken),
                  launches[name], f"{differing[name]:.3%}")


def segmented(model: Any, head: str, backbone: str | None, images: list[Tensor], batch: int, extra: Any,
              *overrides: str) -> list[Tensor]:
    """What the product predicts."""
    config = configured(head, backbone, f"eval.window_batch={batch}", *overrides)
    predict = Predictor(model, config, CLASSES, CPU)
    return [found.label_map for found in predict.segment(images, extra)]


def measure_memory(result: Result) -> None:
    """The table of memory, each row in a process of its own."""
    table = result.table(f"Memory for one image of 5472 x 3648 (20 megapixels), {CLASSES} classes", "head", "eval.…",
                         "budget, GB", "peak above the image's own, GB", "seconds")
    for head in ("linear", "m2f"):
        for settings, budget in ((("memory_gb=1",), 1.0), (("memory_gb=1", "half_scores=true"), 1.0),
                                 (("memory_gb=4",), 4.0)):
            done = subprocess.run([sys.executable, "-m", "benchmarks.evaluation", "--child", head, *settings],
                                  check=True, capture_output=True, text=True)
            peak, seconds = map(float, done.stdout.split())
            table.row(head, ", ".join(settings), budget, peak, seconds)
    result.note("A map of all scores of such an image is 12 GB in float32. The peak contains the network's own memory "
                "for a batch of windows that the small image did not need, and the image.")


def child(head: str, settings: list[str]) -> None:
    """Print the peak of memory, in GB, and the seconds."""
    small = [f"decoder_head.{each}" for each in SMALL_HEAD] if head == "m2f" else []
    config = configured(head, None, *small, f"eval.stride={CROP}", *(f"eval.{each}" for each in settings),
                        sizes=TINY_SIZES)
    predict = Predictor(build_model(config, CLASSES).eval(), config, CLASSES, CPU)
    predict(pictures(1, 1024, 1024)[0])
    image = pictures(1, 3648, 5472)[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before, start = resident("VmRSS"), time.perf_counter()
    predict(image)
    print(resident("VmHWM") - before, time.perf_counter() - start)


def resident(which: str) -> float:
    """Memory of this process in GB: VmRSS, resident now, or VmHWM, its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--backbone", help="folder of a ViT-S (default: random weights)")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default: 5)")
    parser.add_argument("--heads", nargs="+", default=["linear", "m2f"], help="heads to time (default: linear m2f)")
    parser.add_argument("--only", choices=("time", "memory"), help="measure one of both (default: both)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1:])
        return
    result = Result("evaluation" if arguments.only is None else f"evaluation-{arguments.only}", arguments.results)
    for head in arguments.heads if arguments.only != "memory" else ():
        measure_time(result, head, arguments.backbone, arguments.repetitions)
    if arguments.only != "time":
        measure_memory(result)
    result.save()


if __name__ == "__main__":
    main()
