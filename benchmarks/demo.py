"""All of MaskStream in a few minutes on two CPU cores: draw scenes, shard, train, evaluate, predict.

With --shared, on real photographs instead: CamVid and a pretrained DINOv2 ViT-S (`make demo-camvid`).

Runs and prints the commands a user would type, then reports their cost in seconds and in units of a fixed calibration
loop timed in the same run (seconds alone mean little on a shared machine). `--results` also saves the numbers for
docs/benchmarks.md.

example: python -m benchmarks.demo --output runs/demo --results benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}  # one thread per rank: two ranks fill two cores
CALIBRATION_SIDE, CALIBRATION_ROUNDS = 256, 10
MARKER = ".maskstream-demo"  # in folders that may be emptied
Command = list[object]  # program and arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for all output of the demo (emptied first)")
    parser.add_argument("--shared", type=Path, help="folder with data/camvid and weights/dinov2-vits14")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: as in configs/demo.yaml)")
    parser.add_argument("--results", type=Path, default=None, help="folder for demo.json (default: not written; only "
                        "with `python -m benchmarks.demo`)")
    arguments = parser.parse_args()
    output = Path(arguments.output).resolve()
    if output.exists() and not (output / MARKER).exists() and any(output.iterdir()):
        sys.exit(f"error: {output} is not a folder that this demo made; choose another --output, or remove it")
    commands = demo_commands(output) if arguments.shared is None else camvid_commands(output, arguments.shared)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    before = calibration_seconds()
    if arguments.steps is not None:
        commands["train"].append(f"train.total_steps={arguments.steps}")
    seconds = {name: call(*command) for name, command in commands.items()}
    unit = (before + calibration_seconds()) / 2
    report(output, seconds, unit)
    if arguments.results is not None:
        save("demo" if arguments.shared is None else "demo-camvid", output, seconds, unit, arguments.results)


def demo_commands(output: Path) -> dict[str, Command]:
    """The five commands of the demo on drawn scenes, by what they do."""
    scenes = output / "scenes"
    images = [scenes / "images" / "val" / f"scene_val_{number:05}.jpg" for number in range(4)]
    return {
        "draw scenes": ["python", "preprocess/make_scenes.py", "--output", scenes],
        "shard": ["python", "preprocess/make_shards.py", "--config", "configs/scenes-shards.yaml", "--root", scenes,
                  "--output", output / "shards"],
        **training_commands(output, "configs/demo.yaml", [], images),
    }


def camvid_commands(output: Path, shared: Path) -> dict[str, Command]:
    """The same on photographs. Exits when they, or the ViT, are not there."""
    camvid, vit = shared.resolve() / "data" / "camvid", shared.resolve() / "weights" / "dinov2-vits14"
    for folder in (camvid, vit):
        if not folder.is_dir():
            sys.exit(f"error: {folder} does not exist; set MASKSTREAM_SHARED to a folder with data/camvid and "
                     "weights/dinov2-vits14. `make demo` needs neither")
    return {
        "shard": ["python", "preprocess/make_shards.py", "--config", "configs/camvid-shards.yaml", "--root", camvid,
                  "--output", output / "shards"],
        **training_commands(output, "configs/demo-camvid.yaml", [f"backbone.source={vit}"],
                            sorted((camvid / "val").iterdir())[:4]),
    }


def training_commands(output: Path, config: str, overrides: list[str], images: list[Path]) -> dict[str, Command]:
    """Train, evaluate, predict."""
    run = output / "run"
    checkpoint = run / "checkpoints" / "best.pt"
    return {
        "train": ["torchrun", "--standalone", "--nproc-per-node", "2", "trainer/train.py", "--config", config,
                  f"data.root={output / 'shards'}", f"output_dir={run}", *overrides],
        "evaluate": ["python", "trainer/eval.py", "--config", run / "config.yaml", "--checkpoint", checkpoint],
        "predict": ["python", "trainer/predict.py", "--checkpoint", checkpoint, "--output", output / "predictions",
                    *images],
    }


def call(*command: object) -> float:
    """Print and run a command from the repository root; returns its wall seconds."""
    program, *words = map(str, command)
    shown = [str(Path(word).relative_to(REPOSITORY)) if word.startswith(str(REPOSITORY)) else word for word in words]
    print(f"\n$ {program} {' '.join(shown)}", flush=True)
    started = time.perf_counter()
    subprocess.run([str(BIN / program), *words], cwd=REPOSITORY, check=True, env=ENVIRONMENT)
    return time.perf_counter() - started


def calibration_seconds() -> float:
    """Median seconds of one unit: a fixed number of Fourier transforms, single-threaded in numpy."""
    matrix = np.random.default_rng(0).standard_normal((CALIBRATION_SIDE, CALIBRATION_SIDE), np.float32)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(CALIBRATION_ROUNDS):
            np.fft.fft2(matrix)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def save(name: str, output: Path, seconds: dict[str, float], unit: float, folder: Path) -> None:
    from benchmarks.results import Result  # not importable from `python benchmarks/demo.py`, which saves nothing

    metrics = json.loads((output / "run" / "evaluation" / "metrics.json").read_text())
    result = Result(name, folder)
    table = result.table("Cost; a unit is the calibration loop", "step", "seconds", "units")
    for step, value in {**seconds, "total": sum(seconds.values())}.items():
        table.row(step, value, round(value / unit))
    result.note(f"Validation mIoU {metrics['mIoU']:.3f} (best checkpoint, step {metrics['step']}); predicting the most "
                f"frequent class everywhere gives {metrics['baseline_mIoU']:.3f}.")
    result.save()


def report(output: Path, seconds: dict[str, float], unit: float) -> None:
    metrics = json.loads((output / "run" / "evaluation" / "metrics.json").read_text())
    print(f"\none calibration unit ({CALIBRATION_ROUNDS} transforms of {CALIBRATION_SIDE}x{CALIBRATION_SIDE} numbers): "
          f"{unit:.3f} s")
    for name, value in seconds.items():
        print(f"  {name:12s} {value:7.1f} s  {value / unit:9.0f} units")
    print(f"  {'total':12s} {sum(seconds.values()):7.1f} s  {sum(seconds.values()) / unit:9.0f} units; best checkpoint "
          f"at step {metrics['step']}")
    print(f"\nval mIoU {metrics['mIoU']:.3f}; predicting the most frequent class everywhere gives "
          f"{metrics['baseline_mIoU']:.3f}")
    run = output / "run"
    places = {
        "shards": output / "shards",
        "run, checkpoints, metrics": run,
        "curves": run / "curves.png",
        "image, truth, prediction": run / "evaluation" / "panels.png",
        "overlay pictures": output / "predictions",
    }
    for what, where in places.items():
        print(f"  {what:26s} {where}")


if __name__ == "__main__":
    main()
