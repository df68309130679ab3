"""How well does the plan shuffle? Beside a full permutation of all samples, and beside reading shards in order.

Two things that a batch should have: samples that do not lie beside each other in storage, and many classes.

example: python benchmarks/shuffling.py --root shards-ade20k
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np
import numpy.typing as npt

from shards.plan import LANES, SPAN_SAMPLES, TrainPlan
from shards.reader import ShardReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="shard set")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--batch", type=int, default=16, help="global batch size (default: 16)")
    parser.add_argument("--lanes", type=int, default=LANES, help=f"data.lanes (default: {LANES})")
    parser.add_argument("--span", type=int, default=SPAN_SAMPLES, help=f"data.span_samples (default: {SPAN_SAMPLES})")
    arguments = parser.parse_args()
    reader = ShardReader(arguments.root, arguments.split)
    total = len(reader)
    labels = [set(reader.read(number).labels.tolist()) for number in range(total)]
    plan = TrainPlan([shard.samples for shard in reader.info.shards], 1, 0, arguments.lanes, arguments.span)
    orders = {
        "the plan": np.array([plan.draw(position).sample for position in range(total)]),
        "a full permutation": np.random.default_rng(0).permutation(total),
        "in order": np.arange(total),
    }
    print(f"{total} samples\n\n| order | places between neighbours: 1st, 10th, 50th percentile | classes a batch, mean "
          "(least) | standard deviation of sample numbers in a batch |\n|---|---|---|---|")
    for name, order in orders.items():
        apart = np.percentile(np.abs(np.diff(np.argsort(order))), [1, 10, 50])
        classes, spread = of_batches(order[: total // arguments.batch * arguments.batch], arguments.batch, labels)
        print(f"| {name} | {', '.join(f'{value:.0f}' for value in apart)} | {np.mean(classes):.1f} ({min(classes)}) | "
              f"{spread:.0f} |")
    for epoch in (0, 1000):
        print(f"plan of 10^8 samples in 10^5 shards, first batch of every lane in epoch {epoch}: "
              f"{seconds_to_start(epoch):.2f} s")


def seconds_to_start(epoch: int) -> float:
    """Time of a new plan's first 128 batches of 4, at the beginning of an epoch."""
    started = perf_counter()
    plan = TrainPlan([1000] * 100_000, 4, 0)
    for number in range(128):
        plan.micro_batch(25 * 10**6 * epoch + number)
    return perf_counter() - started


def of_batches(order: npt.NDArray[np.int64], size: int, labels: list[set[int]]) -> tuple[list[int], float]:
    """(classes in each batch, mean spread of the numbers in a batch)"""
    batches = order.reshape(-1, size)
    classes = [len(set.union(*(labels[number] for number in batch))) for batch in batches]
    return classes, float(batches.std(axis=1).mean())


if __name__ == "__main__":
    main()
