"""What does a loader process cost when a set has very many shards? Memory, and time to the first batch.

The set is generated: its storage answers as if one small shard had very many names, and an index as large as that. The
index, 16 bytes a sample, is read in parts; the table of shards, 52 bytes each, whole, and shared. Linux only.

example: python -m benchmarks.many_shards --shards 10 10000 100000 1000000
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from benchmarks.results import Result, benchmark_parser, spread
from shards.manifest import (
    MANIFEST_NAME,
    SHARD_DTYPE,
    ClassInfo,
    FileInfo,
    Manifest,
    SplitInfo,
    load_manifest,
    manifest_bytes,
)
from shards.plan import TrainPlan
from shards.reader import ShardReader
from shards.rle import encode_rle
from shards.sample import encode_sample
from shards.writer import ShardWriter
from trainer.data.crops import TrainCrops, TrainSource
from trainer.data.loader import train_loader
from trainer.data_config import DataConfig

SIDE, BATCH = 64, 4


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 10_000, 100_000, 1_000_000],
                        help="numbers of shards (default: 10, 10^4, 10^5, 10^6)")
    parser.add_argument("--samples", type=int, default=1000, help="samples per shard (default: 1000)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    parser.add_argument("--batches", type=int, default=400, help="batches before memory is measured (default: 400)")
    arguments = parser.parse_args()
    result = Result("many_shards", arguments.results)
    table = result.table(f"{arguments.samples} samples in each shard, {arguments.workers} loader processes; memory "
                         f"after {arguments.batches} batches of {BATCH}", "shards", "samples", "manifest, kB",
                         "table, MB", "index, MB", "open the set, s", "first batch after, s",
                         "private memory of a process, MB")
    for count in arguments.shards:
        storage = Generated(count, arguments.samples)
        opened, first, memory = measure(storage, arguments.workers, arguments.batches)
        info = load_manifest(storage).splits["train"]
        assert info.table is not None
        table.row(count, info.samples, storage.size(MANIFEST_NAME) / 1e3, info.table.bytes / 1e6,
                  info.index.bytes / 1e6, opened, first, spread(memory, 1e-6))
    result.save()


class Generated:
    """Storage of a set whose shards are all the same."""

    root = "generated"

    def __init__(self, count: int, samples: int) -> None:
        record, picture = encode_rle(np.zeros((SIDE, SIDE), np.uint8)), io.BytesIO()
        Image.new("RGB", (SIDE, SIDE)).save(picture, "PNG")
        with TemporaryDirectory() as folder:
            with ShardWriter(Path(folder) / "train-000000.tar") as writer:
                for number in range(samples):
                    writer.write(str(number), picture.getvalue(), "png", encode_sample(str(number), record, {}))
            self.shard = writer.path.read_bytes()
        self.part, self.count = writer.index.tobytes(), count
        table = np.zeros(count, SHARD_DTYPE)
        table["number"], table["samples"], table["bytes"] = np.arange(count), samples, len(self.shard)
        table["index_crc32"] = zlib.crc32(self.part)
        table["sha256"] = np.array(hashlib.sha256(self.shard).digest(), "V32")
        self.table = table.tobytes()
        self.manifest = manifest_bytes(self.described(samples))

    def described(self, samples: int) -> Manifest:
        """The manifest: all pixels are class 0. A large index is never read whole, nor its hash compared."""
        size = len(self.part) * self.count
        index = hashlib.sha256(self.part * self.count).hexdigest() if size < 1 << 28 else "0" * 64
        split = SplitInfo(
            kind="crops", images=samples * self.count, samples=samples * self.count, shards=self.count,
            bytes=len(self.shard) * self.count, class_samples=[samples * self.count],
            class_pixels=[samples * self.count * SIDE**2], ignored_pixels=0,
            table=FileInfo(name="train.shards", bytes=len(self.table), sha256=hashlib.sha256(self.table).hexdigest()),
            index=FileInfo(name="train.index", bytes=size, sha256=index))
        return Manifest(dataset="folder", classes=[ClassInfo(name="all", color=(0, 0, 0))], ignore_index=255, seed=0,
                        crops={}, config={}, config_hash="0" * 64, producer={}, splits={"train": split})

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name == "train.index":
            assert length is not None
            return b"".join(self._index_parts(offset, offset + length))
        data = {MANIFEST_NAME: self.manifest, "train.shards": self.table}.get(name, self.shard)
        return data[offset : len(data) if length is None else offset + length]

    def _index_parts(self, position: int, end: int) -> Iterator[bytes]:
        while position < end:
            start = position % len(self.part)
            taken = min(len(self.part) - start, end - position)
            yield self.part[start : start + taken]
            position += taken

    def size(self, name: str) -> int:
        if name == "train.index":
            return len(self.part) * self.count
        return len({MANIFEST_NAME: self.manifest, "train.shards": self.table}.get(name, self.shard))

    def sizes(self, *, deep: bool = False) -> dict[str, int] | None:
        return None

    def where(self, name: str) -> str:
        return f"generated/{name}"

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        raise NotImplementedError

    def upload(self, name: str, source: Path | BinaryIO) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "table": b""}  # a process that asks for it would fail


def measure(storage: Generated, workers: int, count: int) -> tuple[float, float, list[int]]:
    """(seconds to open the set, seconds from there to the first batch, private bytes of each loader process)"""
    config, started = DataConfig(root="generated", workers=workers), perf_counter()
    reader = ShardReader(storage, "train")
    plan = TrainPlan(reader.table.samples, BATCH, 0)
    opened = perf_counter() - started
    with closing(_batches(TrainCrops([TrainSource(reader, plan)], config))) as batches:
        next(batches)
        first = perf_counter() - started - opened
        for _ in range(count):
            next(batches)
        return opened, first, [memory_of(process.pid) for process in multiprocessing.active_children() if process.pid]


def _batches(crops: TrainCrops) -> Iterator[object]:
    yield from train_loader(crops, range(1_000_000), torch.device("cpu"))


def memory_of(process: int) -> int:
    """Bytes not shared with any other process (USS)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main()
