"""What does a loader process cost when a set has very many shards? Private memory, and time to the first batch.

The set is made here: one small shard under many names (links), and a manifest that lists all of them. Linux only.

example: python -m benchmarks.many_shards --shards 10 100000
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from benchmarks.results import Result, benchmark_parser, spread
from shards.manifest import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    ClassInfo,
    IndexInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    load_manifest,
    manifest_bytes,
)
from shards.plan import TrainPlan
from shards.rle import encode_rle
from shards.sample import encode_sample
from shards.writer import ShardWriter
from trainer.config import DataConfig
from trainer.data.crops import TrainCrops, open_reader
from trainer.data.loader import train_loader

SIDE, BATCH = 64, 4


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100_000],
                        help="numbers of shards (default: 10 100000)")
    parser.add_argument("--samples", type=int, default=10, help="samples per shard (default: 10)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    arguments = parser.parse_args()
    result = Result("many_shards", arguments.results)
    table = result.table(f"{arguments.samples} samples in each shard, {arguments.workers} loader processes", "shards",
                         "manifest, MB", "open the set, s", "first batch after, s",
                         "private memory of a loader process, MB")
    for count in arguments.shards:
        with tempfile.TemporaryDirectory() as folder:
            root = write_linked_set(Path(folder), count, arguments.samples)
            opened, first, memory = measure(root, arguments.workers)
            table.row(count, (root / MANIFEST_NAME).stat().st_size / 1e6, opened, first, spread(memory, 1e-6))
    result.save()


def write_linked_set(root: Path, count: int, samples: int) -> Path:
    """A set whose shards are all the same file."""
    with ShardWriter(root / "shard") as writer:
        record, picture = encode_rle(np.zeros((SIDE, SIDE), np.uint8)), io.BytesIO()
        Image.new("RGB", (SIDE, SIDE)).save(picture, "PNG")
        for number in range(samples):
            writer.write(str(number), picture.getvalue(), "png", encode_sample(str(number), record, {}))
    shards = [dataclasses.replace(writer.info, name=f"train-{number:06d}.tar") for number in range(count)]
    for shard in shards:
        (root / shard.name).symlink_to("shard")
    index = writer.index.tobytes() * count
    (root / "train.index").write_bytes(index)
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(manifest_of(shards, index)))
    return root


def manifest_of(shards: list[ShardInfo], index: bytes) -> Manifest:
    """Manifest of samples whose pixels are all class 0."""
    samples = len(index) // INDEX_DTYPE.itemsize
    split = SplitInfo(kind="crops", images=samples, samples=samples, shards=shards, class_samples=[samples],
                      class_pixels=[samples * SIDE**2], ignored_pixels=0,
                      index=IndexInfo(name="train.index", bytes=len(index), sha256=hashlib.sha256(index).hexdigest()))
    return Manifest(dataset="folder", classes=[ClassInfo(name="all", color=(0, 0, 0))], ignore_index=255, seed=0,
                    crops={}, config={}, config_hash="0" * 64, producer={}, splits={"train": split})


def measure(root: Path, workers: int) -> tuple[float, float, list[int]]:
    """(seconds to open the set, seconds from there to the first batch, private bytes of each loader process)"""
    config, started = DataConfig(root=str(root), workers=workers), perf_counter()
    manifest = load_manifest(root)
    reader = open_reader(config, "train", manifest)
    plan = TrainPlan([shard.samples for shard in reader.info.shards], BATCH, 0)
    opened = perf_counter() - started
    with closing(_batches(TrainCrops(reader, plan, config))) as batches:
        next(batches)
        first = perf_counter() - started - opened
        for _ in range(8 * workers):  # enough that every process has made some
            next(batches)
        return opened, first, [memory_of(process.pid) for process in multiprocessing.active_children() if process.pid]


def _batches(crops: TrainCrops) -> Iterator[object]:
    yield from train_loader(crops, range(1000), torch.device("cpu"))


def memory_of(process: int) -> int:
    """Bytes not shared with any other process (USS)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main()
