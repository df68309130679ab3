"""What real features say: all heads on a pretrained DINOv2 ViT-S, on two sets of real photographs.

Trains linear, Mask2Former, EoMT (frozen and trained ViT) and PMT heads through trainer/train.py, each with the same
crops, steps and evaluation, and the same heads on a random ViT of the same shape as a control. Every finished run
leaves a line in RESULTS/runs/real_backbone.jsonl, from which the tables are made. A run with a line is not repeated, so
seeds can be added over several days.

example: python -m benchmarks.real_backbone --shared ../shared --output runs/real-backbone --datasets camvid --seeds 0
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks.results import REPOSITORY, Result, benchmark_parser, commit
from shards.files.strict_json import to_json

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
    arguments = parser.parse_args()
    result = Result("real_backbone", arguments.results)
    finished = arguments.results / "runs" / "real_backbone.jsonl"
    for seed, dataset, vit, head in itertools.product(arguments.seeds, arguments.datasets, arguments.vits,
                                                      arguments.heads):
        experiment = Experiment(dataset, vit, head, seed)
        if not any(record["steps"] == arguments.steps and record["experiment"] == list(experiment)
                   for record in lines_of(finished)):
            train(experiment, arguments)
            finished.parent.mkdir(parents=True, exist_ok=True)
            with finished.open("a") as file:
                file.write(to_json(record_of(experiment, arguments)) + "\n")
    report(result, lines_of(finished))
    result.save()


def train(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Run one experiment to its end; one that was stopped is resumed."""
    folder = run_folder(experiment, arguments)
    if [{"step": 0}, *evaluations(folder)][-1]["step"] == arguments.steps:
        return
    shards = sharded(experiment.dataset, arguments)
    call("trainer/train.py", *COMMON, *HEADS[experiment.head], f"data.root={shards}", f"seed={experiment.seed}",
         f"backbone.source={vit_folder(experiment.vit, arguments)}", f"train.total_steps={arguments.steps}",
         f"train.eval_every={arguments.steps // PARTS}", f"output_dir={folder}")


def record_of(experiment: Experiment, arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a finished run."""
    folder = run_folder(experiment, arguments)
    steps = [record for record in lines_of(folder / "metrics.jsonl") if record["kind"] == "train"]
    speeds = sorted(record["images_per_second"] for record in steps)
    return {"experiment": list(experiment), "steps": arguments.steps, "commit": commit(),
            "evaluated": [record["step"] for record in evaluations(folder)],
            "mIoU": [record["mIoU"] for record in evaluations(folder)],
            "baseline_mIoU": evaluations(folder)[-1]["baseline_mIoU"], "images_per_second": speeds[len(speeds) // 2],
            "memory_gb": max(record["memory_gb"] for record in steps),
            "trainable": sum(tensor.numel() for tensor in trained_tensors(folder))}


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
    """The validation records of a run, one per evaluated step, in order."""
    return list({record["step"]: record for record in lines_of(folder / "metrics.jsonl")
                 if record["kind"] == "val"}.values())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object per line; none when it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report(result: Result, finished: list[dict[str, Any]]) -> None:
    """A table per dataset and number of steps; a row per ViT and head, over the seeds that are there."""
    for steps, dataset in sorted({(record["steps"], record["experiment"][0]) for record in finished}):
        chosen = [record for record in finished if (record["steps"], record["experiment"][0]) == (steps, dataset)]
        evaluated = chosen[0]["evaluated"]
        table = result.table(
            f"{dataset}: val mIoU over {steps} steps of 4 crops, median (lowest to highest); predicting the most "
            f"frequent class everywhere: {chosen[0]['baseline_mIoU']:.3f}", "ViT", "head",
            *(f"step {step}" for step in evaluated), "seeds", "images/s", "memory, GB", "trained parameters, M")
        for vit, head in itertools.product(VITS, HEADS):
            runs = [record for record in chosen if record["experiment"][1:3] == [vit, head]]
            if runs:
                table.row(vit, head, *(over_seeds(run["mIoU"][part] for run in runs) for part in range(len(evaluated))),
                          len(runs), over_seeds(run["images_per_second"] for run in runs)["median"],
                          max(run["memory_gb"] for run in runs), runs[0]["trainable"] / 1e6)
    result.note("All heads see the same crops and are evaluated on the first 100 validation images, resized to a short "
                "side of 208 pixels. One process with one thread per run; images/s were measured while other programs "
                "used the other core, so compare them only roughly.")


def over_seeds(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "low": ordered[0], "high": ordered[-1], "count": len(ordered)}


def trained_tensors(folder: Path) -> list[torch.Tensor]:
    """The tensors that a checkpoint's optimiser has moments for."""
    newest = max((folder / "checkpoints").glob("step-*.pt"), key=lambda path: path.name)
    content = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
    return [state["exp_avg"] for state in content["optimizer"]["state"].values()]


def call(program: str, *words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, REPOSITORY / program, *map(str, words)], check=True, env=environment)


if __name__ == "__main__":
    main()
