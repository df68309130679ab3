"""What does drawing crops anew in each epoch cost a loader process, compared with stored crops and with the reference's
transform on a folder?

Makes two shard sets of an ADE20K folder's validation images, of which the published samples have more: one of 512-pixel
crops, one of whole images. Measures samples per second of CPU time on one core, interleaved in one run because machines
stall. "All work in the loader" adds mirroring, colour, normalisation and dense float masks, as the reference's
transform does there; here the training device does them.

example: python -m benchmarks.online_crops --data ../shared/data/ade20k-sample
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.loader import REPOSITORY, consume, measured
from benchmarks.peers import online_batches
from benchmarks.results import Result, benchmark_parser, spread
from shards.plan import TrainPlan
from shards.reader import ShardReader
from shards.workers import keep_freed_memory
from trainer.data.batch import Batch, normalized_images
from trainer.data.crops import TrainCrops, TrainSource
from trainer.data.targets import to_dense
from trainer.data_config import DataConfig, OnlineConfig
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD

REFERENCE_SHARE = 5  # one of its samples takes as long as many of ours
CPU = torch.device("cpu")


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="ADE20K folder")
    parser.add_argument("--batch", type=int, default=4, help="micro-batch size (default: 4)")
    parser.add_argument("--samples", type=int, default=200, help="samples per round (default: 200)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as loader processes do
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, overrides in (("crops", ["crops.per_image=4"]), ("whole", ["crops.splits=[]"])):
            subprocess.run([sys.executable, REPOSITORY / "preprocess/make_shards.py", "--dataset", "ade20k", "--root",
                            arguments.data, "--output", folder / name, "dataset.splits={train: validation}",
                            *overrides], check=True)
        stored = crops(folder / "crops", arguments.batch, DataConfig(workers=0))
        drawn = {name: crops(folder / "whole", arguments.batch, config) for name, config in online_configs().items()}
        result = Result("online_crops", arguments.results)
        compare(stored, drawn, arguments, result)
        result.save()


def online_configs() -> dict[str, DataConfig]:
    ways = {"whole images": {}, "whole images, reduced decoding": {"reduced_decoding": True},
            "whole images, resized on the device": {"resample_on": "device"}}
    return {name: DataConfig(workers=0, crop_size=512,
                             online=OnlineConfig(scaled_side="short", **way))  # type: ignore[arg-type]
            for name, way in ways.items()}


def crops(root: Path, batch: int, config: DataConfig) -> TrainCrops:
    reader = ShardReader(root, "train")
    return TrainCrops([TrainSource(reader, TrainPlan(reader.table.samples, batch, 0))], config)


def compare(stored: TrainCrops, drawn: dict[str, TrainCrops], arguments: argparse.Namespace, result: Result) -> None:
    samples, batch, rounds = arguments.samples, arguments.batch, arguments.rounds
    numbers = range(samples // batch)
    few = samples // REFERENCE_SHARE
    reference = "the reference's transform on a folder"

    def batches(dataset: TrainCrops) -> Callable[[], Iterator[object]]:
        return lambda: map(dataset.__getitem__, numbers)

    rows: dict[str, tuple[int, Callable[[], object]]] = {
        reference: (few, consume(online_batches(arguments.data, few, batch))),
        "stored crops": (samples, consume(batches(stored))),
        "stored crops, all work in the loader": (samples, consume(lambda: map(finished, batches(stored)()))),
    }
    for name, dataset in drawn.items():
        rows[name] = (samples, consume(batches(dataset)))
    whole = batches(drawn["whole images"])
    rows["whole images, all work in the loader"] = (samples, consume(lambda: map(finished, whole())))
    rates = measured(rows, rounds)
    table = result.table(f"One core, CPU time, crops of 512 pixels, {rounds} interleaved rounds of {samples} samples",
                         "samples", "samples/s", "times the reference", "handed over, MB a sample")
    for name, values in rates.items():
        dataset = drawn.get(name, stored if name == "stored crops" else None)
        size = None if dataset is None else np.mean([handed_over(dataset[number]) for number in numbers]) / batch / 1e6
        table.row(name, spread(values), np.median(values) / np.median(rates[reference]), size)


def finished(batch: Batch) -> object:
    """Everything up to the model's input and dense float targets."""
    moved = batch.to(CPU)
    images = normalized_images(moved, IMAGENET_MEAN, IMAGENET_STD)
    return images, [to_dense(target)["masks"].float() for target in moved.targets()]


def handed_over(batch: Batch) -> int:
    """Bytes that a loader process passes to the trainer."""
    sizes: list[int] = []
    batch.map_tensors(lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


if __name__ == "__main__":
    main()
