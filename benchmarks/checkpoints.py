"""Cost of checkpoints per training step: none, written in the background, or waited for. The demo's model and scenes.

Interleaved blocks of steps with one checkpoint each, one thread for the steps; medians over the blocks.

example: python -m benchmarks.checkpoints
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks.results import Result, benchmark_parser, spread
from preprocess.config import PreprocessConfig
from preprocess.make_scenes import write_scenes
from preprocess.pairs import open_dataset
from preprocess.pipeline import write_shards
from shards.cli.config_file import load_config
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loop import train_step
from trainer.run.checkpoint_writer import CheckpointWriter
from trainer.run.run import Run, build_run, run_places

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps per checkpoint (default: 20)")
    parser.add_argument("--blocks", type=int, default=7, help="interleaved blocks of each kind (default: 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = Result("checkpoints", arguments.results)
        measure(folder, make_run(folder), arguments.steps, arguments.blocks, result)
        result.save()


def make_run(folder: Path) -> Run:
    write_scenes(folder / "scenes", {"train": 16, "val": 2}, seed=0)
    config = load_config(PreprocessConfig, CONFIGS / "scenes-shards.yaml", [
        f"dataset.root={folder / 'scenes'}", f"output={folder / 'set'}", "workers=1"])
    write_shards(config, open_dataset(config.dataset, config.on_error))
    settings = load_run_config(CONFIGS / "demo.yaml", [f"data.root={folder / 'set'}", f"output_dir={folder / 'run'}",
                                                       "data.workers=0"])
    alone = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
    return build_run(settings, alone, run_places(settings))


def measure(folder: Path, run: Run, steps: int, blocks: int, result: Result) -> None:
    batches = [[run.crops[2 * number], run.crops[2 * number + 1]] for number in range(4)]
    writer = CheckpointWriter(folder / "checkpoints", folder, 2, None)

    def save() -> None:
        writer.save(run.snapshot(), is_best=False)

    def save_and_wait() -> None:
        save()
        writer.wait()

    kinds: dict[str, Callable[[], None]] = {"none": lambda: None, "beside training": save, "waited for": save_and_wait}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    calls: list[float] = []
    for block in range(blocks + 1):
        for kind, at_end in kinds.items():
            started = perf_counter()
            at_end()
            called = perf_counter() - started
            for number in range(steps):
                train_step(run, batches[number % len(batches)])
                run.step = (run.step + 1) % run.config.train.total_steps
            taken = perf_counter() - started
            writer.wait()
            if block:  # the first one is a warm-up
                seconds[kind].append(taken)
                calls += [called] if kind == "beside training" else []
    writer.close()
    size = max(path.stat().st_size for path in (folder / "checkpoints").glob("*.pt"))
    base = np.array(seconds["none"])
    table = result.table(f"Checkpoints of {size / 1e6:.1f} MB, one in {steps} steps, {blocks} interleaved blocks",
                         "checkpoints", "seconds per step", "time relative to none, block by block")
    for kind, found in seconds.items():
        table.row(kind, spread(found, 1 / steps), spread(np.array(found) / base))
    result.note(f"The call that starts a checkpoint (the copy) takes {1000 * np.median(calls):.1f} ms.")


if __name__ == "__main__":
    main()
