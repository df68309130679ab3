"""The loss of a training step compared with transformers' Mask2FormerLoss, called as EoMT calls it.

Ten predictions of 100 queries at 128x128 (--side), targets of about 10 segments at four times the side, 12,544 points.
The masks are given; the loss and its backward pass are measured, either "to masks", or "to features": through the
masks to their factors, mask embeddings and mask features of width 256, as in a training step. Repetitions are
interleaved in one process; a row is marked when its quartiles for identical work differ by more than a factor of 1.3.
Memory: peak beyond the given tensors and their gradients, in a fresh process whose allocator returns freed memory at
once; in brackets with glibc's default, which may keep up to as much again, depending on chance (median of five).
Operations: dispatched in the forward pass. Kept: bytes saved for the backward pass beyond the given tensors.

example: python -m benchmarks.loss --batches 1 2 4 8 16 --repetitions 20
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from benchmarks.results import REPOSITORY, Result, Table, benchmark_parser, spread
from trainer.data.targets import dense_masks
from trainer.loss import mask_classification_loss, matcher
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.packed_targets import PackedTargets
from trainer.loss.point_sampling import point_sample

RUNS = ("transformers, to masks", "ours, to masks", "transformers, to features", "ours, to features")
STEADY = 1.3  # largest accepted ratio between quartiles of identical work
FLOOR = "drawing and sampling the points alone"
LAYERS, QUERIES, CLASSES, SEGMENTS, WIDTH, POINTS = 10, 100, 150, 10, 256, 12_544
COEFFICIENTS = {"loss_mask": 5.0, "loss_dice": 5.0, "loss_cross_entropy": 2.0}


class TheirLoss(Mask2FormerLoss):
    """As subclassed by EoMT (its all-reduce of the number of masks has no effect in one process)."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config, {})

    def total(self, masks: Tensor, targets: Sequence[dict[str, Tensor]], classes: Tensor) -> Tensor:
        losses = self(masks_queries_logits=masks, class_queries_logits=classes,
                      mask_labels=[target["masks"].to(masks.dtype) for target in targets],
                      class_labels=[target["labels"] for target in targets])
        return sum((COEFFICIENTS[name] * loss for name, loss in losses.items()), torch.zeros(()))

    def get_num_masks(self, class_labels: Any, device: Any) -> Tensor:
        return torch.tensor(float(sum(map(len, class_labels)))).clamp(min=1)


class Case:
    """Random predictions, and targets of blocky segments with a border of ignored pixels."""

    def __init__(self, batch: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = 4 * side
        segments = torch.randint(0, SEGMENTS, (batch, 8, 8), generator=generator).to(torch.uint8)
        maps = segments.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
        maps[:, :8] = 255
        self.targets = [{"segment_map": one, "labels": torch.randperm(CLASSES, generator=generator)[:SEGMENTS]}
                        for one in maps]
        self.dense = [{"masks": dense_masks(one["segment_map"], SEGMENTS), "labels": one["labels"]}
                      for one in self.targets]
        self.features = torch.randn(batch, WIDTH, side, side, generator=generator).requires_grad_()
        self.embeddings = [(0.2 * torch.randn(batch, QUERIES, WIDTH, generator=generator)).requires_grad_()
                           for _ in range(LAYERS)]
        self.classes = [torch.randn(batch, QUERIES, CLASSES + 1, generator=generator).requires_grad_()
                        for _ in range(LAYERS)]
        self.theirs = TheirLoss(Mask2FormerConfig(num_labels=CLASSES, train_num_points=POINTS))
        self.ours = MaskClassificationLoss(POINTS, 3.0, 0.75, *COEFFICIENTS.values(), CLASSES, 0.1)

    def masks(self, *, in_graph: bool) -> list[Tensor]:
        with torch.set_grad_enabled(in_graph):
            return [torch.einsum("bqd,bdhw->bqhw", one, self.features) for one in self.embeddings]

    def their_total(self, masks: list[Tensor]) -> Tensor:
        return torch.stack([self.theirs.total(one, self.dense, classes)
                            for one, classes in zip(masks, self.classes, strict=True)]).sum()

    def our_total(self, masks: list[Tensor], *, factors: bool) -> Tensor:
        items: list[dict[str, Any]] = [{"pred_masks": one, "pred_logits": classes}
                                       for one, classes in zip(masks, self.classes, strict=True)]
        if factors:
            for item, embeddings in zip(items, self.embeddings, strict=True):
                item |= {"mask_embeddings": embeddings, "mask_features": self.features}
        return self.ours.step({**items[0], "aux_outputs": items[1:]}, self.targets).total

    def floor(self, masks: list[Tensor]) -> None:
        """The minimum for any implementation: draw all points and sample the predictions there."""
        generator = torch.Generator().manual_seed(0)
        drawn = int(self.ours.num_points * self.ours.oversample_ratio)
        matched = [one[:, :SEGMENTS].flatten(0, 1)[:, None] for one in masks]
        for one, few in zip(masks, matched, strict=True):
            point_sample(one.detach(), torch.rand(len(one), POINTS, 2, generator=generator))
            point_sample(few.detach(), torch.rand(len(few), drawn, 2, generator=generator))

    def prepare(self, name: str) -> list[Tensor]:
        """The input masks of a run."""
        if name.endswith("to features"):
            return self.masks(in_graph=name.startswith("transformers"))
        return [mask.requires_grad_() for mask in self.masks(in_graph=False)]

    def total(self, name: str, masks: list[Tensor]) -> Tensor:
        """The tensors that a run computes gradients for."""
        if name.startswith("transformers"):
            return self.their_total(masks)
        return self.our_total(masks, factors=name.endswith("to features"))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="images per step")
    parser.add_argument("--side", type=int, default=128, help="side of mask logits (default: 128; 224 for 896 pixels)")
    parser.add_argument("--repetitions", type=int, default=20, help="interleaved repetitions (default: 20)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss's pure tensor functions")
    parser.add_argument("--memory", metavar="RUN", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(memory_of(arguments.memory, arguments.batches[0], arguments.side))
        return
    if arguments.compile:
        for module, function in ((matcher, "sum_over_points_"), (mask_classification_loss, "losses_and_gradients"),
                                 (PackedTargets, "_sample")):
            setattr(module, function, torch.compile(getattr(module, function), dynamic=False))
    result = Result(f"loss-{arguments.side}{'-compiled' if arguments.compile else ''}", arguments.results)
    table = result.table(
        f"Mask logits {arguments.side}x{arguments.side}, {arguments.repetitions} interleaved repetitions; memory in "
        "brackets: with glibc's default allocator", "images", "loss", "seconds", "speed-up", "memory, MB",
        "of transformers'", "operations", "kept for backward, MB")
    steady = [report(table, batch, arguments.side, arguments.repetitions) for batch in arguments.batches]
    if all(steady):
        result.save()
    else:
        raise SystemExit(f"rejected: quartiles of the same work are more than {STEADY} times apart (see \"unsteady\"); "
                         "run it again on a quieter machine")


def report(table: Table, batch: int, side: int, repetitions: int) -> bool:
    """Add five rows to the table; returns whether identical work took about the same time."""
    case = Case(batch, side)
    seconds: dict[str, list[float]] = {name: [] for name in (*RUNS, FLOOR)}
    for repetition in range(repetitions + 1):
        for name in RUNS:
            masks = case.prepare(name)
            started = perf_counter()
            case.total(name, masks).backward()
            if repetition:  # the first one is a warm-up
                seconds[name].append(perf_counter() - started)
        started = perf_counter()
        case.floor(masks)
        if repetition:
            seconds[FLOOR].append(perf_counter() - started)
    memory = {name: in_own_process(name, batch, side, MALLOC_MMAP_THRESHOLD_="131072") for name in RUNS}
    by_default = {name: in_own_process(name, batch, side, times=5) for name in RUNS}
    steady = True
    for name in RUNS:
        taken = spread(seconds[name])
        reference = name.replace("ours", "transformers")
        speed = np.median(np.array(seconds[reference]) / np.array(seconds[name]))
        operations, kept = counts(case, name)
        unsteady = " (unsteady)" if taken["high"] > STEADY * taken["low"] else ""
        steady = steady and not unsteady
        table.row(batch, f"{name}{unsteady}", taken, speed, f"{memory[name]:.0f} ({by_default[name]:.0f})",
                  f"{memory[name] / memory[reference]:.2f} ({by_default[name] / by_default[reference]:.2f})",
                  operations, round(kept / 1e6))
    table.row(batch, FLOOR, spread(seconds[FLOOR]), None, None, None, None, None)
    return steady


def counts(case: Case, name: str) -> tuple[int, int]:
    """(operations dispatched by the loss's forward pass, bytes kept for the backward pass), given masks"""
    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    masks = case.prepare(name)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*masks, *case.embeddings, *case.classes, case.features)}
    with saved_tensors_hooks(pack, lambda tensor: tensor), Operations() as operations:
        _ = case.total(name, masks)
    return operations.count, sum(size for place, size in kept.items() if place not in given)


def in_own_process(name: str, batch: int, side: int, times: int = 1, **environment: str) -> float:
    """Memory in megabytes, the median over fresh processes."""
    command = [sys.executable, "-m", "benchmarks.loss", "--memory", name, "--batches", str(batch), "--side", str(side)]
    used = [subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY,
                           env=os.environ | environment).stdout for _ in range(times)]
    return float(np.median([*map(float, used)]))


def memory_of(name: str, batch: int, side: int) -> float:
    """Megabytes that one run needs beyond its inputs and their gradients."""
    case = Case(batch, side)
    masks = case.prepare(name)
    for tensor in (*masks, *case.embeddings, *case.classes, case.features):
        if tensor.is_leaf and tensor.requires_grad:
            tensor.grad = torch.ones_like(tensor)
    before = memory("VmRSS")
    case.total(name, masks).backward()
    return (memory("VmHWM") - before) / 1e3


def memory(entry: str) -> int:
    """A value in kilobytes from this process's /proc status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1])


if __name__ == "__main__":
    main()
