"""Do one and two processes follow the same loss curve, at equal global batch size?

example: python -m benchmarks.ranks --root runs/overfit/shards --config benchmarks/overfit.yaml --steps 20
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import Result, benchmark_parser

BIN = Path(sys.executable).parent


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--root", required=True, help="shard set")
    parser.add_argument("--config", required=True, help="training configuration")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = []
        for name, launcher in (("one", [BIN / "python"]), ("two", [BIN / "torchrun", "--standalone",
                                                                   "--nproc-per-node", "2"])):
            run = Path(folder) / name
            command = [*launcher, "trainer/train.py", "--config", arguments.config, f"data.root={arguments.root}",
                       f"output_dir={run}", f"train.total_steps={arguments.steps}", "train.log_every=1",
                       "eval.max_images=1"]
            # One thread each, as under torchrun: more threads would sum in another order.
            subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            curves.append([record["loss"] for record in records if record["kind"] == "train"])
    result = Result("ranks", arguments.results)
    table = result.table("Loss at equal global batch", "step", "1 process", "2 processes", "relative difference")
    differences = []
    for step, (one, two) in enumerate(zip(*curves, strict=True), 1):
        differences.append(abs(one - two) / abs(one))
        table.row(step, f"{one:.6f}", f"{two:.6f}", f"{differences[-1]:.1e}")
    result.note(f"The largest relative difference is {max(differences):.1e}.")
    result.save()


if __name__ == "__main__":
    main()
