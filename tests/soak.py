"""Train from an S3 server whose network fails at random, killing the training process at random; it must not matter.

An undisturbed run from the folder goes on beside it. The disturbed run is started again after each kill (-9) until it
is done. Each step's sample keys and loss, as the last process to reach the step saw them, must equal the undisturbed
ones.

example: python tests/soak.py --minutes 30
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.object_storage import (
    KEY,
    SECRET,
    FaultyProxy,
    cut,
    flip,
    internal_error,
    s3_server,
    short,
    stall,
    trickle,
    unavailable,
)

REPOSITORY = Path(__file__).resolve().parent.parent
FAULTS = (cut, flip, short, unavailable, internal_error, stall, trickle)


def train_and_note(root: str, folder: Path, steps: int) -> None:
    """The run of one process: trainer.loop, with a line per step in keys.jsonl."""
    import torch

    from trainer import loop
    from trainer.config import load_run_config
    from trainer.distributed import DistContext

    torch.use_deterministic_algorithms(True)
    config = load_run_config(REPOSITORY / "tests" / "tiny.yaml", [
        f"data.root={root}", f"output_dir={folder}", f"train.total_steps={steps}", "data.workers=2", "data.lanes=8",
        "data.span_samples=3", "data.timeout=2", "train.checkpoint_every=10", f"train.eval_every={steps}",
        "train.log_every=50"])
    whole_step = loop.train_step

    def noted(run: Any, micro_batches: list[Any]) -> dict[str, float]:
        losses = whole_step(run, micro_batches)
        with (folder / "keys.jsonl").open("a") as lines:
            print(json.dumps({"step": run.step, "keys": [batch.keys for batch in micro_batches],
                              "loss": losses["loss"], "at": time.time()}), file=lines, flush=True)
        return losses

    loop.train_step = noted
    loop.train(config, DistContext(rank=0, world_size=1, device=torch.device("cpu")))


def noted_steps(folder: Path) -> dict[int, dict[str, Any]]:
    """What the last process to reach each step saw, and when; a line that a kill cut short does not count."""
    found: dict[int, dict[str, Any]] = {}
    for line in (folder / "keys.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["step"]] = record
    return found


def seen(record: dict[str, Any]) -> tuple[Any, Any]:
    return record["keys"], record["loss"]


def child(root: str, folder: Path, steps: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, __file__, "--child", root, str(folder), "--steps", str(steps)],
                                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def disturb(proxy: FaultyProxy, rng: random.Random, stop: threading.Event, bursts: list[int]) -> None:
    """A few faults every now and then, and a note of how many."""
    while not stop.wait(rng.uniform(1.0, 5.0)):
        if proxy.faults:  # nobody is reading: faults would pile up beyond any patience
            continue
        bursts.append(rng.choice([1, 1, 2, 3]))
        proxy.faults += rng.choices(FAULTS, k=bursts[-1])


def soak(minutes: float, seed: int) -> None:
    from preprocess.make_scenes import write_scenes
    from shards.mirror import copy_set
    from tests.conftest import make_shards

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary, s3_server() as server:
        folder = Path(temporary)
        write_scenes(folder / "scenes", {"train": 24, "val": 2}, seed=0)
        local = make_shards(folder / "set", folder / "scenes")
        proxy = FaultyProxy(server.port)
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
                       "AWS_ENDPOINT": proxy.endpoint}
        copy_set(local, "s3://maskstream/soak")
        assert child(str(local), folder / "pilot", 60).wait() == 0
        pilot = noted_steps(folder / "pilot")
        steps = max(60, int(minutes * 60 / 3 / ((pilot[59]["at"] - pilot[9]["at"]) / 50)))  # kills and faults: the rest
        undisturbed = child(str(local), folder / "calm", steps)
        stop, bursts = threading.Event(), list[int]()
        threading.Thread(target=disturb, args=(proxy, random.Random(rng.random()), stop, bursts), daemon=True).start()
        kills, begun = 0, time.monotonic()
        with tqdm(total=steps, unit="step", disable=None) as bar:
            while True:
                running = child("s3://maskstream/soak", folder / "wild", steps)
                try:
                    code = running.wait(rng.uniform(15, 60))
                except subprocess.TimeoutExpired:
                    running.send_signal(signal.SIGKILL)
                    running.wait()
                    kills += 1
                    if (folder / "wild" / "keys.jsonl").exists():
                        bar.update(max(noted_steps(folder / "wild")) + 1 - bar.n)
                    continue
                break
        stop.set()
        proxy.close()
        assert undisturbed.wait() == 0, (folder / "calm" / "log").read_text()[-2000:]
        log = (folder / "wild" / "log").read_text()
        assert code == 0, log[-3000:]
        calm, wild = noted_steps(folder / "calm"), noted_steps(folder / "wild")
        assert sorted(wild) == sorted(calm) == list(range(steps))
        wrong = [step for step in calm if seen(calm[step]) != seen(wild[step])]
        print(f"{steps} steps in {(time.monotonic() - begun) / 60:.1f} minutes, {kills} kills, {sum(bursts)} faults, "
              f"{log.count('try 1 of')} reads that went on, {log.count('fetching it again')} samples fetched again; "
              f"steps whose keys or loss differ from the undisturbed run's: {len(wrong)}")
        if wrong:
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="roughly how long the disturbed run takes")
    parser.add_argument("--seed", type=int, default=0, help="seed of faults and kills (default: 0)")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train_and_note(arguments.child[0], Path(arguments.child[1]), arguments.steps)
    else:
        soak(arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
