"""What real features say: all heads on a pretrained DINOv2 ViT-S, on two sets of real photographs.

Trains linear, Mask2Former, EoMT (frozen and trained ViT) and PMT heads through trainer/train.py, each with the same
crops, steps and evaluation, and the same heads on a random ViT of the same shape as a control. Runs that exist are
continued or reused, so that the table can grow: more seeds, a longer run. Unfinished runs are left out of the table.

example: python -m benchmarks.real_backbone --shared ../shared --output runs/real-backbone --datasets camvid --seeds 0
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks.results import REPOSITORY, Cell, Result, benchmark_parser

DATASETS = {"camvid": "camvid", "clothing-co-parsing": "folder"}  # folder in data/ -> layout
CROPS = ("crops.size=160", "crops.min_scale=1.0", "crops.max_scale=1.5", "crops.cat_max_ratio=0.95")
COMMON = (
    "data.workers=1", "data.hue_degrees=18", "train.global_batch_size=4", "train.micro_batch_size=4",
    "train.log_every=20", "train.checkpoint_every=100", "train.keep_checkpoints=1", "optimizer.warmup_steps=20",
    "optimizer.clip_grad_norm=1.0", "eval.mode=whole", "eval.resize_short_side=208", "eval.max_images=100",
    "eval.panels=8",
)
MASKS = ("loss.num_points=4096", "decoder_head.num_queries=50", "optimizer.lr=5e-4")
HEADS: dict[str, tuple[str, ...]] = {
    "linear": ("decoder_head.type=linear", "backbone.layers=LAST", "optimizer.lr=5e-3", "optimizer.weight_decay=0.001"),
    "eomt": ("decoder_head.type=eomt", *MASKS, "decoder_head.num_blocks=3", "decoder_head.num_upscale_blocks=1"),
    "pmt": ("decoder_head.type=pmt", *MASKS, "decoder_head.dec_layers=3", "decoder_head.num_upscale_blocks=1",
            "decoder_head.block_ffn=768"),
    "eomt-trained": ("decoder_head.type=eomt", *MASKS, "decoder_head.num_blocks=3",
                     "decoder_head.num_upscale_blocks=1", "backbone.trainable=true", "optimizer.lr=2e-4",
                     "optimizer.layer_decay=0.8", "optimizer.backbone_warmup_steps=20"),
    "m2f": ("decoder_head.type=m2f", *MASKS, "decoder_head.hidden_dim=128", "decoder_head.nheads=8",
            "decoder_head.enc_layers=3", "decoder_head.enc_ffn=512", "decoder_head.dec_layers=6",
            "decoder_head.dec_ffn=512", "adapter.deform_num_heads=6", "adapter.conv_inplane=16"),
}
VITS = ("pretrained", "random")
PARTS = 2  # evaluations, evenly spread over a run


class Experiment(NamedTuple):
    """One training run."""

    dataset: str
    vit: str
    head: str
    seed: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and weights/")
    parser.add_argument("--output", type=Path, required=True, help="folder for shard sets and runs")
    parser.add_argument("--datasets", nargs="*", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--vits", nargs="*", default=list(VITS), choices=VITS)
    parser.add_argument("--heads", nargs="*", default=list(HEADS), choices=HEADS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--report-only", action="store_true", help="train nothing; tabulate the runs that are complete")
    arguments = parser.parse_args()
    experiments = [Experiment(dataset, vit, head, seed) for seed, dataset, vit, head in itertools.product(
        arguments.seeds, arguments.datasets, arguments.vits, arguments.heads)]
    result = Result(f"real_backbone-{arguments.steps}", arguments.results)
    if not arguments.report_only:
        for experiment in experiments:
            train(experiment, arguments)
    report(result, experiments, arguments)
    result.save()


def train(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Run one experiment to its end, unless it is there."""
    folder = run_folder(experiment, arguments)
    if len(evaluations(folder)) and evaluations(folder)[-1]["step"] == arguments.steps:
        return
    shards = sharded(experiment.dataset, arguments)
    call("trainer/train.py", *COMMON, *HEADS[experiment.head], f"data.root={shards}", f"seed={experiment.seed}",
         f"backbone.source={vit_folder(experiment.vit, arguments)}", f"train.total_steps={arguments.steps}",
         f"train.eval_every={arguments.steps // PARTS}", f"output_dir={folder}")


def run_folder(experiment: Experiment, arguments: argparse.Namespace) -> Path:
    return Path(arguments.output) / f"steps-{arguments.steps}" / str(experiment)


def sharded(dataset: str, arguments: argparse.Namespace) -> Path:
    """The shard set of a dataset; made when it is missing."""
    folder = Path(arguments.output) / f"shards-{dataset}"
    if not (folder / "manifest.json").is_file():
        call("preprocess/make_shards.py", "--dataset", DATASETS[dataset], "--root", arguments.shared / "data" / dataset,
             "--output", folder, *CROPS)
    return folder


def vit_folder(vit: str, arguments: argparse.Namespace) -> Path:
    """The pretrained ViT, or one of the same shape with random weights."""
    pretrained = arguments.shared / "weights" / "dinov2-vits14"
    random = Path(arguments.output) / "random-vits14"
    if vit == "random" and not random.exists():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config.from_pretrained(pretrained, dtype="float32")).save_pretrained(random)
    return pretrained if vit == "pretrained" else random


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The validation records of a run, in order."""
    return [record for record in records(folder) if record["kind"] == "val"]


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report(result: Result, experiments: list[Experiment], arguments: argparse.Namespace) -> None:
    """A row per dataset, ViT and head: mIoU at each evaluation as mean and range over seeds, cost of a step."""
    evaluated = [arguments.steps * part // PARTS for part in range(1, PARTS + 1)]
    for dataset in arguments.datasets:
        table = result.table(f"{dataset}: val mIoU over {arguments.steps} steps of 4 crops, median (lowest to highest)",
                             "ViT", "head", *(f"step {step}" for step in evaluated), "seeds", "images/s", "memory, GB",
                             "trainable, M")
        for vit, head in itertools.product(arguments.vits, arguments.heads):
            folders = [run_folder(one, arguments) for one in experiments if one[:3] == (dataset, vit, head)]
            finished = [folder for folder in folders if [record["step"] for record in evaluations(folder)] == evaluated]
            if finished:
                table.row(vit, head, *cells(finished))
    result.note("All heads see the same crops and are evaluated on the first 100 validation images, resized to a short "
                "side of 208 pixels. One process with one thread per run; images/s were measured while another run "
                "used the other core.")


def cells(folders: list[Path]) -> list[Cell]:
    """The numbers of one row, over runs that differ in their seed."""
    curves = [[record["mIoU"] for record in evaluations(folder)] for folder in folders]
    steps = [record for folder in folders for record in records(folder) if record["kind"] == "train"]
    speeds = sorted(record["images_per_second"] for record in steps)
    shown: list[Cell] = []
    for values in map(sorted, zip(*curves, strict=True)):
        shown.append({"median": values[len(values) // 2], "low": values[0], "high": values[-1], "count": len(values)})
    trainable = sum(parameter.numel() for parameter in trained_parameters(folders[0]))
    return [*shown, len(folders), speeds[len(speeds) // 2], max(record["memory_gb"] for record in steps),
            trainable / 1e6]


def trained_parameters(folder: Path) -> list[torch.Tensor]:
    """The tensors that a checkpoint's optimiser has moments for."""
    newest = max((folder / "checkpoints").glob("step-*.pt"), key=lambda path: path.name)
    content = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
    return [state["exp_avg"] for state in content["optimizer"]["state"].values()]


def call(program: str, *words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, REPOSITORY / program, *map(str, words)], check=True, env=environment)


if __name__ == "__main__":
    main()
