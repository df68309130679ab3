"""Train on real photographs with a tiny random backbone, through the commands a user would type.

    overfit   overfit 8 ADE20K images: validation is on the same images, mIoU should approach 1
    camvid    CamVid: 367 training and 101 validation images, mIoU over steps

example: python -m benchmarks.real_data overfit --data ../shared/data --output runs/overfit
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.results import Result, benchmark_parser

BIN = Path(sys.executable).parent

SHARDING = {
    "overfit": ("ade20k", "ade20k-sample", ("dataset.splits={train: validation, val: validation}", "dataset.limit=8",
                                            "crops.size=256", "crops.per_image=32", "crops.min_scale=1.0",
                                            "crops.max_scale=1.0", "crops.cat_max_ratio=1.0")),
    "camvid": ("camvid", "camvid", ("crops.size=256", "crops.per_image=4", "crops.min_scale=0.75",
                                    "crops.max_scale=1.5")),
}  # fmt: skip


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("experiment", choices=sorted(SHARDING))
    parser.add_argument("--data", required=True, help="folder that contains ade20k-sample/ and camvid/")
    parser.add_argument("--output", required=True, help="folder for shards and run (resumed if it exists)")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training settings")
    arguments = parser.parse_args()
    kind, folder, overrides = SHARDING[arguments.experiment]
    shards, run = Path(arguments.output) / "shards", Path(arguments.output) / "run"
    call(BIN / "python", "preprocess/make_shards.py", "--dataset", kind, "--root", Path(arguments.data) / folder,
         "--output", shards, *overrides)
    call(BIN / "python", "-m", "shards", "verify", shards)
    started = time.perf_counter()
    call(BIN / "torchrun", "--standalone", "--nproc-per-node", arguments.processes, "trainer/train.py", "--config",
         f"benchmarks/{arguments.experiment}.yaml", f"data.root={shards}", f"output_dir={run}", *arguments.overrides)
    seconds = time.perf_counter() - started
    result = Result(f"real_data-{arguments.experiment}", arguments.results)
    table = result.table(f"{arguments.experiment}, validation", "step", "mIoU", "pixel accuracy",
                         "mIoU of predicting the most frequent class")
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "val":
            table.row(record["step"], record["mIoU"], record["aAcc"], record["baseline_mIoU"])
    result.note(f"Training, with its evaluations, took {seconds:.0f} s with {arguments.processes} processes.")
    result.save()
    print(f"curves: {run / 'curves.png'}; pictures: {run / 'pictures'}")


def call(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


if __name__ == "__main__":
    main()
