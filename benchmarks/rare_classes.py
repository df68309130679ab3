"""Do class weights, sampling by class and averaged weights help where many classes are rare?

On the photographs of clothing-co-parsing, whose tail is long: a linear head on a pretrained DINOv2 ViT-S, in equal
steps, with nothing, and with each way of favouring rare classes. All runs average their weights (EMA), and are
evaluated with averaged and raw ones. "Rare" is the third of the classes with the fewest training pixels, among those
that the validation images hold. Every finished run leaves a line in RESULTS/runs/rare_classes.jsonl, and is not
repeated.

example: python -m benchmarks.rare_classes --shared ../shared --output runs/rare-classes
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

from benchmarks.real_backbone import COMMON, HEADS, call, evaluations, lines_of, over_seeds, sharded
from benchmarks.results import Result, benchmark_parser, commit
from shards.files.strict_json import to_json
from shards.manifest import load_manifest
from trainer.reporting.run_logger import read_evaluation

DATASET = "clothing-co-parsing"
WAYS = {
    "nothing": (),
    "class weights: inverse_log": ("loss.class_weights=inverse_log",),
    "class weights: effective_number": ("loss.class_weights=effective_number",),
    "sampling: repeat_factor, threshold 0.1": ("data.sampling=repeat_factor", "data.sampling_threshold=0.1"),
    "sampling: class_balanced": ("data.sampling=class_balanced",),
}
DECAY = 0.98  # of the average, over about 50 steps


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and weights/")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shard set and runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="steps of 4 crops (default: 300)")
    arguments = parser.parse_args()
    result = Result("rare_classes", arguments.results)
    finished = arguments.results / "runs" / "rare_classes.jsonl"
    for seed, way in itertools.product(arguments.seeds, WAYS):
        if not any(record["experiment"] == [way, seed] and record["steps"] == arguments.steps
                   for record in lines_of(finished)):
            record = run(way, seed, arguments)
            finished.parent.mkdir(parents=True, exist_ok=True)
            with finished.open("a") as file:
                file.write(to_json(record) + "\n")
    report(result, [record for record in lines_of(finished) if record["steps"] == arguments.steps])
    result.save()


def run(way: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train to the end, and return the record."""
    shards = sharded(DATASET, arguments)
    folder = Path(arguments.output) / f"steps-{arguments.steps}" / f"{list(WAYS).index(way)}-{seed}"
    if not evaluations(folder):
        call("trainer/train.py", *COMMON, *HEADS["linear"], *WAYS[way], f"data.root={shards}", f"seed={seed}",
             f"train.ema_decay={DECAY}", f"backbone.source={arguments.shared / 'weights/dinov2-vits14'}",
             f"train.total_steps={arguments.steps}", f"train.eval_every={arguments.steps}", f"output_dir={folder}")
    [raw] = [record["mIoU"] for record in lines_of(folder / "metrics.jsonl") if record["kind"] == "val_raw"]
    evaluation = read_evaluation(folder)
    assert evaluation is not None and evaluation["weights"] == "averaged"
    pixels = load_manifest(shards).split("train").class_pixels
    present = [number for number, iou in enumerate(evaluation["per_class_iou"]) if not math.isnan(iou)]
    rare = sorted(present, key=lambda number: pixels[number])[: len(present) // 3]
    return {"experiment": [way, seed], "steps": arguments.steps, "commit": commit(), "raw": raw,
            "averaged": evaluation["mIoU"], "accuracy": evaluation["aAcc"], "classes": len(present),
            "rare": sum(evaluation["per_class_iou"][number] for number in rare) / len(rare), "rare_classes": len(rare),
            "rare_pixels": sum(pixels[number] for number in rare) / sum(pixels)}


def report(result: Result, records: list[dict[str, Any]]) -> None:
    first = records[0]
    share = 100 * first["rare_pixels"]
    table = result.table(
        f"{DATASET}, linear head, {first['steps']} steps of 4 crops; {first['rare_classes']} rare of "
        f"{first['classes']} classes, with {share:.2f} % of the pixels; median (lowest to highest) over seeds",
        "", "seeds", "mIoU, averaged", "mIoU, raw", "IoU of rare classes, averaged", "aAcc, averaged")
    for way in WAYS:
        mine = [record for record in records if record["experiment"][0] == way]
        if mine:
            table.row(way, len(mine), *(over_seeds(record[name] for record in mine)
                                        for name in ("averaged", "raw", "rare", "accuracy")))


if __name__ == "__main__":
    main()
