"""How well does the plan shuffle, compared with a full permutation of all samples and with reading shards in order?

A batch should have samples that are far apart in storage, and many classes.

example: python -m benchmarks.shuffling --root runs/shuffling
Shards of the ADE20K sample, in which crops of an image are close together:
    python preprocess/make_shards.py --dataset ade20k --root ../shared/data/ade20k-sample --output runs/shuffling
        crops.per_image=60 "dataset.splits={train: validation}" images_per_shard=8
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import numpy.typing as npt

from benchmarks.results import Result, benchmark_parser
from shards.plan import LANES, SPAN_SAMPLES, TrainPlan
from shards.reader import ShardReader


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--root", required=True, help="shard set")
    parser.add_argument("--split", default="train", help="split to use (default: train)")
    parser.add_argument("--batch", type=int, default=16, help="global batch size (default: 16)")
    parser.add_argument("--lanes", type=int, default=LANES, help=f"data.lanes (default: {LANES})")
    parser.add_argument("--span", type=int, default=SPAN_SAMPLES, help=f"data.span_samples (default: {SPAN_SAMPLES})")
    arguments = parser.parse_args()
    reader = ShardReader(arguments.root, arguments.split)
    total = len(reader)
    labels = [set(reader.read(number).labels.tolist()) for number in range(total)]
    plan = TrainPlan(reader.table.samples, 1, 0, arguments.lanes, arguments.span)
    orders = {
        "the plan": np.array([plan.sample_at(position).sample for position in range(total)]),
        "a full permutation": np.random.default_rng(0).permutation(total),
        "in order": np.arange(total),
    }
    result = Result("shuffling", arguments.results)
    table = result.table(f"{total} samples, batches of {arguments.batch}", "order",
                         "places between stored neighbours: 1st, 10th, 50th percentile",
                         "classes in a batch, mean (least)", "standard deviation of sample numbers in a batch")
    for name, order in orders.items():
        apart = np.percentile(np.abs(np.diff(np.argsort(order))), [1, 10, 50])
        classes, deviation = of_batches(order[: total // arguments.batch * arguments.batch], arguments.batch, labels)
        table.row(name, ", ".join(f"{value:.0f}" for value in apart), f"{np.mean(classes):.1f} ({min(classes)})",
                  round(deviation))
    starts = result.table("Plan of 10^8 samples in 10^5 shards: time to the first 128 batches", "epoch", "seconds")
    for epoch in (0, 1000):
        starts.row(epoch, seconds_to_start(epoch))
    result.save()


def seconds_to_start(epoch: int) -> float:
    """Seconds that a new plan takes for the first 128 batches of 4 of an epoch."""
    started = perf_counter()
    plan = TrainPlan([1000] * 100_000, 4, 0)
    for number in range(128):
        plan.micro_batch(25 * 10**6 * epoch + number)
    return perf_counter() - started


def of_batches(order: npt.NDArray[np.int64], size: int, labels: list[set[int]]) -> tuple[list[int], float]:
    """(number of classes in each batch, mean standard deviation of the sample numbers in a batch)"""
    batches = order.reshape(-1, size)
    classes = [len(set.union(*(labels[number] for number in batch))) for batch in batches]
    return classes, float(batches.std(axis=1).mean())


if __name__ == "__main__":
    main()
