"""How much of a training step does the loss take, ours and transformers' Mask2FormerLoss called as EoMT calls it?

One step: forward, loss, backward, on the CPU, of (a) the demo's model and (b) a ViT-S (frozen, random) with adapter
and a head of width 256. The rest of the step is timed with a mean over the outputs in place of the loss. Repetitions
are interleaved; medians.

example: python -m benchmarks.loss_share
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Mask2FormerConfig

from benchmarks.loss import CLASSES, POINTS, TheirLoss
from benchmarks.results import Result, benchmark_parser, spread
from trainer.build import build_criterion, build_model
from trainer.config import RunConfig, load_run_config
from trainer.data.targets import dense_masks

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
VIT_S = ["backbone.random.hidden_size=384", "backbone.random.num_hidden_layers=12",
         "backbone.random.num_attention_heads=6", "backbone.random.intermediate_size=1536",
         "backbone.layers=FOUR_EVEN_INTERVALS", "decoder_head.hidden_dim=256", "decoder_head.nheads=8",
         "decoder_head.enc_layers=6", "decoder_head.enc_ffn=1024", "decoder_head.dec_layers=9",
         "decoder_head.dec_ffn=2048", "decoder_head.num_queries=100", "adapter.conv_inplane=64",
         f"loss.num_points={POINTS}"]


class Case:
    """A model and its batch."""

    def __init__(self, config: RunConfig, classes: int, side: int, batch: int, segments: int) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = build_model(config, classes).train()
        self.criterion = build_criterion(config, classes, 255)
        self.theirs = TheirLoss(Mask2FormerConfig(num_labels=classes, train_num_points=config.loss.num_points))
        self.images = torch.randn(batch, 3, side, side, generator=generator)
        maps = torch.randint(0, segments, (batch, 8, 8), generator=generator).to(torch.uint8)
        maps = maps.repeat_interleave(side // 8, 1).repeat_interleave(side // 8, 2)
        self.targets = [{"segment_map": one, "labels": torch.randperm(classes, generator=generator)[:segments]}
                        for one in maps]
        self.dense = [{"masks": dense_masks(one["segment_map"], segments), "labels": one["labels"]}
                      for one in self.targets]
        self.num_masks = torch.tensor(float(batch * segments))

    def step(self, loss: Callable[[dict[str, Any]], Tensor], matched_gradients: bool) -> float:
        """Seconds of one step."""
        self.model.head.set_matched_gradients(matched_gradients)
        self.model.zero_grad()
        started = perf_counter()
        loss(self.model(self.images)).backward()
        return perf_counter() - started

    def ours(self, outputs: dict[str, Any]) -> Tensor:
        return self.criterion(outputs, self.targets, self.num_masks, torch.Generator().manual_seed(0)).total

    def transformers(self, outputs: dict[str, Any]) -> Tensor:
        return torch.stack([self.theirs.total(item["pred_masks"], self.dense, item["pred_logits"])
                            for item in (outputs, *outputs["aux_outputs"])]).sum()

    def none(self, outputs: dict[str, Any]) -> Tensor:
        """A mean whose gradient reaches all that a loss's would, including embeddings and mask features directly."""
        items = (outputs, *outputs["aux_outputs"])
        return torch.stack([item[name].mean() for item in items
                            for name in ("pred_logits", "mask_embeddings", "mask_features")]).sum()


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=7, help="interleaved repetitions (default: 7)")
    arguments = parser.parse_args()
    demo = load_run_config(CONFIGS / "demo.yaml", [])
    cases = {"demo, 4 crops of 128": Case(demo, 8, 128, 4, 4),
             "ViT-S, head 256, 2 crops of 512": Case(load_run_config(CONFIGS / "demo.yaml", VIT_S), CLASSES, 512, 2,
                                                     10)}
    result = Result("loss_share", arguments.results)
    table = result.table(f"{arguments.repetitions} interleaved repetitions", "model and batch", "rest of the step, s",
                         "with transformers' loss, s", "share of loss", "with ours, s", "share of loss")
    for name, case in cases.items():
        seconds: dict[str, list[float]] = {kind: [] for kind in ("none", "transformers", "ours")}
        for repetition in range(arguments.repetitions + 1):
            for kind, found in seconds.items():
                taken = case.step(getattr(case, kind), kind != "transformers")
                if repetition:  # the first one is a warm-up
                    found.append(taken)
        rest, theirs, ours = (float(np.median(found)) for found in seconds.values())
        table.row(name, spread(seconds["none"]), spread(seconds["transformers"]), f"{1 - rest / theirs:.0%}",
                  spread(seconds["ours"]), f"{1 - rest / ours:.0%}")
    result.save()


if __name__ == "__main__":
    main()
