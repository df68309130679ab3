"""One process and two processes, equal global batch: do they follow the same loss curve?

example: python benchmarks/ranks.py --root runs/overfit/shards --config benchmarks/overfit.yaml --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            # One thread each, as torchrun has it: more would add up in another order.
            subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            curves.append([record["loss"] for record in records if record["kind"] == "train"])
    print("| step | 1 process | 2 processes | relative difference |\n|---|---|---|---|")
    differences = []
    for step, (one, two) in enumerate(zip(*curves, strict=True), 1):
        differences.append(abs(one - two) / abs(one))
        print(f"| {step} | {one:.6f} | {two:.6f} | {differences[-1]:.1e} |")
    print(f"\nlargest relative difference: {max(differences):.1e}")


if __name__ == "__main__":
    main()
