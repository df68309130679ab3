"""How fast are batches made, as a share of decoding the same JPEGs alone on one core?

Rounds are interleaved in one run and medians compared, because these machines stall. "one core" rows use the
process's CPU time; the worker rows use wall time of the DataLoader, after its workers have started.

example: python benchmarks/loader.py --root shards-ade20k
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from shards.plan import TrainPlan
from shards.reader import ShardReader
from shards.sample import decode_image
from trainer.config import DataConfig
from trainer.data import TrainCrops, train_loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="shard set")
    parser.add_argument("--split", default="train", help="split of crops (default: train)")
    parser.add_argument("--batch", type=int, default=4, help="micro-batch size (default: 4)")
    parser.add_argument("--batches", type=int, default=40, help="micro-batches per round (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reader = ShardReader(arguments.root, arguments.split)
    plan = TrainPlan([shard.samples for shard in reader.info.shards], arguments.batch, 0)
    numbers = range(arguments.batches)
    jpegs = [reader.read(draw.sample).image_bytes for number in numbers for draw in plan.micro_batch(number)]
    samples = len(jpegs)

    def decode_only() -> None:
        for data in jpegs:
            decode_image(data, "benchmark")

    def one_core(targets: str) -> Callable[[], None]:
        crops = TrainCrops(reader, plan, DataConfig(workers=0, targets=targets))

        def run() -> None:
            for number in numbers:
                crops[number]

        return run

    rows = {"JPEG decoding alone, one core": decode_only, "batches, one core, segment maps": one_core("segment_map"),
            "batches, one core, dense masks": one_core("dense")}
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for workers in (1, 2):
        rates[f"DataLoader, {workers} worker(s), wall"] = []
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            started = time.process_time()
            run()
            rates[name].append(samples / (time.process_time() - started))
        for workers in (1, 2):
            rate = loader_rate(reader, plan, workers, arguments.batches)
            rates[f"DataLoader, {workers} worker(s), wall"].append(rate)
    floor = float(np.median(rates["JPEG decoding alone, one core"]))
    print(f"{samples} samples a round, {arguments.rounds} rounds, medians\n")
    print("| | samples/s | of JPEG decoding |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {np.median(values):.0f} | {np.median(values) / floor:.2f} |")


def loader_rate(reader: ShardReader, plan: TrainPlan, workers: int, batches: int) -> float:
    """Samples per wall second once every worker has delivered its first batch."""
    loader = train_loader(TrainCrops(reader, plan, DataConfig(workers=workers, prefetch_batches=1)),
                               range(batches + 2 * workers), torch.device("cpu"))
    for _ in range(2 * workers):
        next(loader)
    started = time.perf_counter()
    count = sum(batch.images.shape[0] for batch in loader)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
