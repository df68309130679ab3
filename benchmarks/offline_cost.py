"""What do stored crops cost in mIoU, compared with crops drawn anew in each epoch?

On few real photographs, so that a run has many epochs, trains heads on a pretrained DINOv2 ViT-S, in equal steps, from
K = 1, 4, 16 or 64 stored crops per image, from K = 4 crops stored larger and rescaled again, and from whole images.
Crops and training have the same seed. Every finished run leaves a line in RESULTS/runs/offline_cost.jsonl, from which
the tables and the plot are made; a run with a line is not repeated, and a stopped one is resumed.

example: python -m benchmarks.offline_cost --shared ../shared --output runs/offline-cost --datasets camvid
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib

from benchmarks.real_backbone import COMMON, DATASETS, HEADS, call, evaluations, lines_of, over_seeds
from benchmarks.results import REPOSITORY, Result, benchmark_parser, commit
from shards.files.strict_json import to_json
from shards.manifest import load_manifest
from shards.plan import TrainPlan
from trainer.config import load_run_config
from trainer.data.crops import TrainCrops, TrainSource, open_reader

SIDE = 160
SCALES = ("crops.min_scale=1.0", "crops.max_scale=1.5", "crops.cat_max_ratio=0.95", f"crops.size={SIDE}")
ONLINE = (f"data.crop_size={SIDE}", "data.online.cat_max_ratio=0.95")
FOLDERS = {"camvid": ("train", "trainannot"), "clothing-co-parsing": ("images/train", "annotations/train")}
SEEDS = {"linear": 5, "pmt": 3}  # how many, at least
SPEED_BATCHES = 100


class Mode(NamedTuple):
    """What is stored, and how it is trained on."""

    sharding: tuple[str, ...]
    training: tuple[str, ...] = ()
    crops: int | None = None  # per image


MODES = {
    **{f"{count} crops": Mode((*SCALES, f"crops.per_image={count}"), crops=count) for count in (1, 4, 16, 64)},
    "4 larger crops": Mode((*SCALES, "crops.per_image=4", "crops.stored_size=240"),
                           (*ONLINE, "data.online.scaled_side=stored", "data.online.min_scale=0.8",
                            "data.online.max_scale=1.25")),
    "whole images": Mode(("crops.splits=[]",),
                         (*ONLINE, "data.online.scaled_side=short", "data.online.min_scale=1.0",
                          "data.online.max_scale=1.5")),
}


class Experiment(NamedTuple):
    """One training run."""

    dataset: str
    head: str
    mode: str
    seed: int

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(" ", "-")


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and weights/")
    parser.add_argument("--output", type=Path, required=True, help="folder for images, shard sets and runs")
    parser.add_argument("--datasets", nargs="*", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--heads", nargs="*", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", nargs="*", type=int, help="default: 0 to 4 for linear, 0 to 2 for pmt")
    parser.add_argument("--images", type=int, default=32, help="training images (default: 32)")
    parser.add_argument("--steps", type=int, default=200, help="steps of 4 crops (default: 200)")
    parser.add_argument("--figure", type=Path, default=REPOSITORY / "benchmarks/figures/offline-cost.png")
    arguments = parser.parse_args()
    result = Result("offline_cost", arguments.results)
    finished = arguments.results / "runs" / "offline_cost.jsonl"
    for seed, dataset, head, mode in itertools.product(arguments.seeds or range(max(SEEDS.values())),
                                                       arguments.datasets, arguments.heads, arguments.modes):
        experiment = Experiment(dataset, head, mode, seed)
        known = any(record["experiment"] == list(experiment) and record["steps"] == arguments.steps
                    and record["images"] == arguments.images for record in lines_of(finished))
        if not known and (arguments.seeds or seed < SEEDS[head]):
            record = run(experiment, arguments)
            finished.parent.mkdir(parents=True, exist_ok=True)
            with finished.open("a") as file:
                file.write(to_json(record) + "\n")
    records = [record for record in lines_of(finished)
               if (record["steps"], record["images"]) == (arguments.steps, arguments.images)]
    report(result, records)
    plot(records, arguments.figure)
    result.save()


def run(experiment: Experiment, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train to the end, and return the record."""
    shards = sharded(experiment, arguments)
    folder = Path(arguments.output) / f"steps-{arguments.steps}" / str(experiment)
    settings = [*COMMON, *HEADS[experiment.head], *MODES[experiment.mode].training, f"data.root={shards}",
                f"seed={experiment.seed}", f"backbone.source={arguments.shared / 'weights/dinov2-vits14'}",
                f"train.total_steps={arguments.steps}", f"train.eval_every={arguments.steps}", f"output_dir={folder}"]
    if not evaluations(folder):
        call("trainer/train.py", *settings)
    train = load_manifest(shards).split("train")
    return {"experiment": list(experiment), "steps": arguments.steps, "images": arguments.images, "commit": commit(),
            "mIoU": evaluations(folder)[-1]["mIoU"], "baseline_mIoU": evaluations(folder)[-1]["baseline_mIoU"],
            "bytes": train.bytes, "samples": train.samples, "samples_per_second": speed(settings)}


def sharded(experiment: Experiment, arguments: argparse.Namespace) -> Path:
    """The shard set of a dataset, mode and seed; made when it is missing. Whole images are the same for all seeds."""
    mode, seed = MODES[experiment.mode], experiment.seed if MODES[experiment.mode].crops else 0
    folder = Path(arguments.output) / f"shards-{experiment.dataset}-{experiment.mode.replace(' ', '-')}-{seed}"
    if not (folder / "manifest.json").is_file():
        call("preprocess/make_shards.py", "--dataset", DATASETS[experiment.dataset], "--root",
             few_images(experiment.dataset, arguments), "--output", folder, f"seed={seed}", *mode.sharding)
    return folder


def few_images(dataset: str, arguments: argparse.Namespace) -> Path:
    """The dataset with evenly chosen training images only, in the same layout."""
    source, target = arguments.shared / "data" / dataset, Path(arguments.output) / f"images-{dataset}"
    if target.is_dir():
        return target
    building = target.with_name(f"{target.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    images, labels = (sorted((source / folder).iterdir()) for folder in FOLDERS[dataset])
    chosen = {images[number * len(images) // arguments.images].stem for number in range(arguments.images)}
    left_out = {path for path in [*images, *labels] if path.stem not in chosen}
    shutil.copytree(source, building, ignore=lambda folder, names: [name for name in names
                                                                   if Path(folder) / name in left_out])
    building.rename(target)
    return target


def speed(settings: list[str]) -> float:
    """Samples per second of CPU time that one loader process delivers."""
    config = load_run_config(None, [*settings, "data.workers=0"])
    reader = open_reader(config.data, "train")
    crops = TrainCrops([TrainSource(reader, TrainPlan(reader.table.samples, 4, 0))], config.data, range(SPEED_BATCHES))
    next(iter(crops))
    start = time.process_time()
    for _ in crops:
        pass
    return 4 * SPEED_BATCHES / (time.process_time() - start)


def report(result: Result, records: list[dict[str, Any]]) -> None:
    for dataset in sorted({record["experiment"][0] for record in records}):
        mine = [record for record in records if record["experiment"][0] == dataset]
        heads = [head for head in SEEDS if any(record["experiment"][1] == head for record in mine)]
        images, steps = mine[0]["images"], mine[0]["steps"]
        table = result.table(
            f"{dataset}: {images} training images, {steps} steps of 4 crops = {4 * steps / images:.0f} epochs; val "
            "mIoU, mean, and median (lowest to highest); predicting the most frequent class: "
            f"{mine[0]['baseline_mIoU']:.3f}",
            "stored", *(part for head in heads for part in (f"{head}, mean", f"{head}, median", "seeds")), "MB stored",
            "samples/s, one core")
        for mode in MODES:
            of_mode = [record for record in mine if record["experiment"][2] == mode]
            if of_mode:
                table.row(mode, *(part for head in heads for part in cells(of_mode, head)), of_mode[0]["bytes"] / 1e6,
                          over_seeds(record["samples_per_second"] for record in of_mode)["median"])


def cells(records: list[dict[str, Any]], head: str) -> tuple[float | None, dict[str, float] | None, int]:
    found = [record["mIoU"] for record in records if record["experiment"][1] == head]
    return (mean(found), over_seeds(found), len(found)) if found else (None, None, 0)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Mean mIoU against the number of stored crops, with the range over seeds; lines: whole images, larger crops."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted({(record["experiment"][0], record["experiment"][1]) for record in records})
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), squeeze=False)
    for axis, (dataset, head) in zip(axes[0], shown, strict=True):
        mine = [record for record in records if record["experiment"][:2] == [dataset, head]]
        by_mode = {mode: [record["mIoU"] for record in mine if record["experiment"][2] == mode] for mode in MODES}
        counts = [mode.crops for name, mode in MODES.items() if mode.crops and by_mode[name]]
        spreads = [over_seeds(by_mode[f"{count} crops"]) for count in counts]
        means = [mean(by_mode[f"{count} crops"]) for count in counts]
        axis.errorbar(counts, means, fmt="o-", capsize=3, label="stored crops",
                      yerr=[[middle - spread["low"] for middle, spread in zip(means, spreads, strict=True)],
                            [spread["high"] - middle for middle, spread in zip(means, spreads, strict=True)]])
        for name, color in (("whole images", "C1"), ("4 larger crops", "C2")):
            if by_mode[name]:
                spread = over_seeds(by_mode[name])
                axis.axhline(mean(by_mode[name]), color=color, label=name)
                axis.axhspan(spread["low"], spread["high"], color=color, alpha=0.15)
        axis.set(xscale="log", xlabel="stored crops per image", ylabel="val mIoU", title=f"{dataset}, {head}")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
