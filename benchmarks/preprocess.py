"""How fast are shards made? Crops per second of one core, against two other pipelines; processes; memory.

    floor            decode the JPEG once (simplejpeg), resize each crop's region, encode it (simplejpeg): no labels, no
                     shards, no checksums
    straightforward  Pillow resizes the whole image and its labels for each crop, and writes a JPEG and a PNG
    MaskStream       what make_shards.py does with a block: labels, masks, tar, checksums, fsync

All three cut the same crops, from the same files.

example: python -m benchmarks.preprocess --data ../shared/data
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.results import REPOSITORY, Result, benchmark_parser, spread
from preprocess.blocks import Block, plan_blocks
from preprocess.config import PreprocessConfig
from preprocess.encoding import crop_rng
from preprocess.execution.block_store import BlockStore
from preprocess.execution.tasks import Job, WriteBlock
from preprocess.pairs import Dataset, open_dataset, read_pair
from shards.cli.config_file import load_config
from shards.crops.drawing import Crop, draw_crop
from shards.crops.label_runs import LabelRuns
from shards.crops.resampling import PADDING_COLOR

SIDE, PER_IMAGE = 512, 8
LARGE = 10_000  # pixels a side of the large image
Crops = list[list[Crop]]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains ade20k-sample/ and camvid/")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, in turns (default: 7)")
    parser.add_argument("--large", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.large is not None:
        shard_large(arguments.large)
        return
    result = Result("preprocess", arguments.results)
    one_core(result, arguments.data / "ade20k-sample", arguments.repeats)
    processes(result, arguments.data / "camvid", arguments.repeats)
    large_image(result)
    result.save()


def one_core(result: Result, root: Path, repeats: int) -> None:
    """Crops per second of one process; the three pipelines take turns."""
    config = load_config(PreprocessConfig, None, [
        "dataset.kind=ade20k", f"dataset.root={root}", "dataset.splits={train: validation}",
        f"crops.per_image={PER_IMAGE}"])
    dataset = open_dataset(config.dataset, "fail")
    block = plan_blocks(config, dataset)[0]
    crops = drawn(config, dataset, block)
    count = sum(map(len, crops))
    pipelines: dict[str, Callable[[], None]] = {
        "floor": lambda: floor(dataset, block, crops),
        "straightforward": lambda: straightforward(dataset, block, crops),
        "MaskStream": lambda: maskstream(config, dataset, block)}
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(repeats + 1):
        for name, run in pipelines.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    table = result.table(f"{count} crops of {SIDE}x{SIDE}, {PER_IMAGE} of each of {len(block.pairs)} ADE20K images, "
                         "one process; ratios of the same turn", "pipeline", "crops/s", "of the floor",
                         "times straightforward")
    for name, taken in seconds.items():
        table.row(name, spread([count / one for one in taken]),
                  *(spread([other / one for other, one in zip(seconds[base], taken, strict=True)])
                    for base in ("floor", "straightforward")))


def drawn(config: PreprocessConfig, dataset: Dataset, block: Block) -> Crops:
    """The crops that MaskStream draws, image by image."""
    found = []
    for pair in block.pairs:
        labels = LabelRuns(read_pair(dataset, pair).label_map, dataset.ignore_index)
        draws = (draw_crop(crop_rng(config.seed, pair.key, k), labels, config.crops.rules) for k in range(PER_IMAGE))
        found.append([crop for crop in draws if crop is not None])
    return found


def floor(dataset: Dataset, block: Block, crops: Crops) -> None:
    for pair, mine in zip(block.pairs, crops, strict=True):
        image = Image.fromarray(simplejpeg.decode_jpeg(dataset.tree.read(pair.image_path)))
        for crop in mine:
            ratios = image.width / crop.scaled_width, image.height / crop.scaled_height
            box = (crop.left * ratios[0], crop.top * ratios[1],
                   min((crop.left + crop.width) * ratios[0], image.width),
                   min((crop.top + crop.height) * ratios[1], image.height))
            resized = image.resize((crop.width, crop.height), Image.Resampling.BILINEAR, box)
            simplejpeg.encode_jpeg(np.asarray(resized), 95, colorsubsampling="420")


def straightforward(dataset: Dataset, block: Block, crops: Crops) -> None:
    for pair, mine in zip(block.pairs, crops, strict=True):
        image = Image.open(io.BytesIO(dataset.tree.read(pair.image_path))).convert("RGB")
        labels = Image.open(io.BytesIO(dataset.tree.read(pair.label_path)))
        for crop in mine:
            box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
            size = (crop.scaled_width, crop.scaled_height)
            for source, way, padding, kind in ((image, Image.Resampling.BILINEAR, PADDING_COLOR, "JPEG"),
                                               (labels, Image.Resampling.NEAREST, 0, "PNG")):
                padded = Image.new(source.mode, (SIDE, SIDE), padding)
                padded.paste(source.resize(size, way).crop(box))
                padded.save(io.BytesIO(), kind, **({"quality": 95} if kind == "JPEG" else {}))


def maskstream(config: PreprocessConfig, dataset: Dataset, block: Block) -> None:
    class Silent:
        def image_done(self, failed: bool = False) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        WriteBlock(block).run(Job(config, dataset, BlockStore(folder, ".staging")), Silent())


def processes(result: Result, root: Path, repeats: int) -> None:
    """A set smaller than one block, by one and by two processes; the whole command, start and publishing included."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(max(3, repeats // 2)):
        for workers, taken in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                subprocess.run([sys.executable, REPOSITORY / "preprocess/make_shards.py", "--dataset", "camvid",
                                "--root", root, "--output", f"{folder}/set", "--workers", str(workers),
                                "dataset.splits={train: train}", f"crops.per_image={PER_IMAGE}"], check=True,
                               capture_output=True)
                taken.append(time.perf_counter() - started)
    table = result.table(f"367 CamVid images, {PER_IMAGE} crops each: less than one block", "processes", "seconds",
                         "times one process")
    for workers, taken in seconds.items():
        table.row(workers, spread(taken), spread([one / mine for one, mine in zip(seconds[1], taken, strict=True)]))


def large_image(result: Result) -> None:
    """The peak memory of a process that shards one image of 100 megapixels."""
    with tempfile.TemporaryDirectory() as folder:
        write_large(Path(folder))
        done = subprocess.run([sys.executable, "-m", "benchmarks.preprocess", "--data", folder, "--large", folder],
                              check=True, capture_output=True, text=True, cwd=REPOSITORY)
    table = result.table(f"Peak memory for an image of {LARGE}x{LARGE} pixels, {PER_IMAGE} crops", "labels", "peak, MB",
                         "above an image of 512x512, MB")
    for line in done.stdout.splitlines():
        name, peak, more = line.split("\t")
        table.row(name, float(peak), float(more))


def write_large(folder: Path) -> None:
    """A large image with labels in areas, one with noise for labels, and a small one."""
    rng = np.random.default_rng(0)
    for name, side, zoom in (("small", SIDE, 64), ("areas", LARGE, 50), ("noise", LARGE, 1)):
        pixels = rng.integers(0, 255, (side // 10 + 1, side // 10 + 1, 3), np.uint8)
        labels = rng.integers(0, 2, (side // zoom + 1, side // zoom + 1), np.uint8)
        for top, small, suffix in (("images", pixels.repeat(10, 0).repeat(10, 1), "jpg"),
                                   ("annotations", labels.repeat(zoom, 0).repeat(zoom, 1), "png")):
            path = folder / name / top / "train" / f"0.{suffix}"
            path.parent.mkdir(parents=True)
            Image.fromarray(small[:side, :side]).save(path)
        (folder / name / "classes.txt").write_text("one\ntwo\n")


def shard_large(folder: Path) -> None:
    """In a process of its own: the peak after each image, from the smallest on."""
    base = 0.0
    for name in ("small", "areas", "noise"):
        config = load_config(PreprocessConfig, None, ["dataset.kind=folder", f"dataset.root={folder / name}",
                                                      f"crops.per_image={PER_IMAGE}"])
        dataset = open_dataset(config.dataset, "fail")
        maskstream(config, dataset, plan_blocks(config, dataset)[0])
        peak = peak_memory() / 1e6
        base = base or peak
        print(f"{name}\t{peak:.0f}\t{peak - base:.0f}")


def peak_memory() -> int:
    """Bytes; unlike `resource.getrusage`, without those of the process that started this one (Linux only)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
