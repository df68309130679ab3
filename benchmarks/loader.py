"""How fast are batches made, compared with decoding the same JPEGs alone, with other loaders, and from object storage?

Makes 512-pixel crops of an ADE20K folder and measures on them, interleaved in one run because machines stall:
1. samples per second of CPU time, on one core, of our batches and of other loaders (those installed: webdataset,
   litdata, mosaicml-streaming);
2. samples per second of wall time from a folder and from an S3 server (SeaweedFS, on this machine) behind a proxy that
   delays each request: one loader process, one epoch, without its first tenth;
3. bytes that a loader process passes to the trainer.

example: python -m benchmarks.loader --data ../shared/data/ade20k-sample
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.peers import available, encoded, online_batches
from benchmarks.results import Result, benchmark_parser, spread
from shards.mirror import copy_set
from shards.plan import TrainPlan
from shards.reader import ShardReader
from shards.sample import decode_by_pillow, decode_image
from shards.workers import keep_freed_memory
from tests.support.object_storage import KEY, SECRET, FaultyProxy, s3_server
from trainer.data.batch import Batch, augmented_images
from trainer.data.crops import TrainCrops, TrainSource, open_reader
from trainer.data.loader import train_loader
from trainer.data_config import DataConfig

REPOSITORY = Path(__file__).resolve().parent.parent
ONLINE_SHARE = 10  # one of its samples takes as long as dozens of the others'


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="ADE20K folder")
    parser.add_argument("--crops", type=int, default=60, help="crops per image (default: 60)")
    parser.add_argument("--batch", type=int, default=4, help="micro-batch size (default: 4)")
    parser.add_argument("--samples", type=int, default=320, help="samples per round (default: 320)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds added to each request (default: 0.03)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_crops(arguments.data, folder / "set", arguments.crops)
        result = Result("loader", arguments.results)
        one_core(folder, arguments, result)
        over_the_network(folder, arguments, result)
        result.save()


def make_crops(data: Path, output: Path, per_image: int) -> None:
    """Crops of the validation images, of which the published ADE20K samples have more."""
    subprocess.run([sys.executable, REPOSITORY / "preprocess/make_shards.py", "--dataset", "ade20k", "--root", data,
                    "--output", output, f"crops.per_image={per_image}", "dataset.splits={train: validation}",
                    "images_per_shard=8"], check=True)


def one_core(folder: Path, arguments: argparse.Namespace, result: Result) -> None:
    """Tables 1 and 3."""
    keep_freed_memory()  # as loader processes do
    reader = ShardReader(folder / "set", "train")
    plan = TrainPlan(reader.table.samples, arguments.batch, 0)
    numbers = range(arguments.samples // arguments.batch)
    samples = [reader.read(draw.sample) for number in numbers for draw in plan.micro_batch(number)]
    jpegs = [sample.image_bytes for sample in samples]
    packed, dense = (TrainCrops([TrainSource(reader, plan)], DataConfig(workers=0, targets=targets), numbers)
                     for targets in ("segment_map", "dense"))
    online = arguments.samples // ONLINE_SHARE
    rows: dict[str, tuple[int, Callable[[], object]]] = {
        "decoding the JPEGs alone, by Pillow": (len(jpegs), lambda: decode(decode_by_pillow, jpegs)),
        "decoding the JPEGs alone, as we do": (len(jpegs), lambda: decode(decode_image, jpegs)),
        "ours": (len(jpegs), consume(lambda: iter(packed))),
        "ours, mirroring and colour in the loader too": (len(jpegs), lambda: list(map(augmented_images_of, packed))),
        "ours, dense float masks": (len(jpegs), lambda: list(map(float_masks, dense))),
        "on-line transform from whole images": (online, consume(online_batches(arguments.data, online,
                                                                               arguments.batch))),
    }
    for name, batches in available(encoded(samples), folder, arguments.batch):
        rows[name] = (len(jpegs), consume(batches))
    rates = measured(rows, arguments.rounds)
    floor, own = (np.median(rates[f"decoding the JPEGs alone, {how}"]) for how in ("by Pillow", "as we do"))
    size = sum(map(len, jpegs)) / len(jpegs)
    table = result.table(f"One core, CPU time, {len(jpegs)} crops of {size / 1000:.0f} KB a round, "
                         f"{arguments.rounds} interleaved rounds", "loader", "samples/s", "of Pillow's decoding",
                         "of our decoding", "ours is faster by")
    for name, values in rates.items():
        rate, ours = np.median(values), np.median(rates["ours"])
        table.row(name, spread(values), rate / floor, rate / own, ours / rate)
    note_sizes(list(packed), result)


def note_sizes(batches: list[Batch], result: Result) -> None:
    """Bytes that a loader process passes to the trainer, compared with dense masks."""
    count = sum(len(batch.keys) for batch in batches)
    ours = sum(batch.images.nbytes + batch.labels.nbytes + batch.photometric.nbytes + batch.segment_maps.nbytes
               for batch in batches if batch.segment_maps is not None and batch.photometric is not None) / count
    images = sum(batch.images.nbytes for batch in batches) / count
    pixels = batches[0].segment_maps[0].numel()  # type: ignore[index]
    masks = sum(sum(batch.counts) for batch in batches) / count * pixels
    result.note(f"A loader process hands over {ours / 1e6:.2f} MB a sample; with bool masks it would be "
                f"{(images + masks) / 1e6:.2f} MB, with float masks {(images + 4 * masks) / 1e6:.2f} MB.")


def over_the_network(folder: Path, arguments: argparse.Namespace, result: Result) -> None:
    """Table 2."""
    with s3_server() as server:
        proxy = FaultyProxy(server.port, arguments.delay)
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
                       "AWS_ENDPOINT": server.endpoint}
        copy_set(folder / "set", "s3://benchmark/set")
        os.environ["AWS_ENDPOINT"] = proxy.endpoint
        roots = {"a folder": str(folder / "set"), "S3, not delayed": "s3://benchmark/set", "S3": "s3://benchmark/set"}
        found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in roots}
        for _ in tqdm(range(arguments.rounds), unit="round", disable=None):
            for name, root in roots.items():
                proxy.delay = 0.0 if name.endswith("not delayed") else arguments.delay
                before = proxy.bytes
                rate, first, memory = epoch(root, arguments.batch)
                found[name].append((rate, first, memory, proxy.bytes - before))
        size = sum(path.stat().st_size for path in (folder / "set").rglob("*") if path.is_file())
        table = result.table(f"One loader process, wall time, an epoch, {arguments.rounds} interleaved rounds; S3 with "
                             f"{1000 * arguments.delay:.0f} ms added to each request", "from", "samples/s",
                             "of a folder", "first batch after, s", "memory of the process, MB",
                             "bytes read / bytes of the set")
        for name, rows in found.items():
            rates, firsts, memories, reads = np.array(rows).T
            share = np.median(rates) / np.median([row[0] for row in found["a folder"]])
            table.row(name, spread(rates), share, spread(firsts), spread(memories),
                      np.median(reads) / size if reads.any() else None)
        proxy.close()


def epoch(root: str, size: int) -> tuple[float, float, float]:
    """(samples per second once warm, seconds to the first batch, private memory of the loader process in MB)"""
    started = perf_counter()
    config = DataConfig(root=root, workers=1)
    reader = open_reader(config, "train")
    plan = TrainPlan(reader.table.samples, size, 0)
    total = len(reader) // size
    times, memory = [], 0.0
    for batch in train_loader(TrainCrops([TrainSource(reader, plan)], config), range(total), torch.device("cpu")):
        times.append(perf_counter())
        if batch.number == total * 3 // 4:
            memory = max(map(anonymous_megabytes, multiprocessing.active_children()))
    warm = total // 10
    return (total - 1 - warm) * size / (times[-1] - times[warm]), times[0] - started, memory


def anonymous_megabytes(process: multiprocessing.process.BaseProcess) -> float:
    """Anonymous memory of a process, from /proc."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return 0.0 if found is None else int(found[1]) / 1e3


def measured(rows: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Samples per second of CPU time of each row in each round, after one warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for number in tqdm(range(rounds + 1), unit="round", disable=None):
        for name, (count, run) in rows.items():
            started = process_time()
            run()
            if number:
                rates[name].append(count / (process_time() - started))
    return rates


def consume(batches: Callable[[], Iterator[object]]) -> Callable[[], None]:
    def run() -> None:
        for _ in batches():
            pass

    return run


def decode(how: Callable[[bytes, str], object], jpegs: list[bytes]) -> None:
    for one in jpegs:
        how(one, "benchmark")


def augmented_images_of(batch: Batch) -> None:
    augmented_images(batch.to(torch.device("cpu")))


def float_masks(batch: Batch) -> None:
    for masks in batch.masks or []:
        masks.float()


if __name__ == "__main__":
    main()
