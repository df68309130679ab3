"""Train from an S3 server whose network fails at random, killing the training process at random; it must not matter.

An undisturbed run from the folder goes on beside it. The disturbed run is started again after each kill (-9) until the
time is over. Each step's sample keys and loss, as the last process to reach the step saw them, must equal those of the
undisturbed run.

example: python tests/stress/soak.py --minutes 30
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from tests.support.object_storage import (
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

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STEPS = 100_000  # more than there is time for
FAULTS = (cut, flip, short, unavailable, internal_error, stall, trickle)


def train_and_note(root: str, folder: Path) -> None:
    """The run of one process: trainer.loop, with one line per step in keys.jsonl."""
    import torch

    from trainer import loop
    from trainer.config import load_run_config
    from trainer.distributed import DistContext

    torch.use_deterministic_algorithms(True)
    config = load_run_config(REPOSITORY / "tests" / "support" / "tiny.yaml", [
        f"data.root={root}", f"output_dir={folder}", f"train.total_steps={STEPS}", "data.workers=2", "data.lanes=8",
        "data.span_samples=3", "data.timeout=2", "train.checkpoint_every=10", f"train.eval_every={STEPS}",
        "train.log_every=50"])
    whole_step = loop.train_step

    def noted(run: Any, micro_batches: list[Any]) -> loop.StepResult:
        result = whole_step(run, micro_batches)
        with (folder / "keys.jsonl").open("a") as lines:
            print(json.dumps({"step": run.step, "keys": [batch.keys for batch in micro_batches],
                              "loss": result.losses["loss"]}), file=lines, flush=True)
        return result

    loop.train_step = noted
    loop.train(config, DistContext(rank=0, world_size=1, device=torch.device("cpu")))


def noted_steps(folder: Path) -> dict[int, dict[str, Any]]:
    """What the last process to reach each step saw; a line truncated by a kill does not count."""
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


def child(root: str, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, __file__, "--child", root, str(folder)],
                                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def disturb(proxy: FaultyProxy, rng: random.Random, stop: threading.Event, bursts: list[int]) -> None:
    """Inject a few faults now and then, and count them."""
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
        undisturbed = child(str(local), folder / "calm")
        stop, bursts = threading.Event(), list[int]()
        threading.Thread(target=disturb, args=(proxy, random.Random(rng.random()), stop, bursts), daemon=True).start()
        kills = run_and_kill(folder / "wild", 60 * minutes, rng)
        stop.set()
        proxy.close()
        wild = noted_steps(folder / "wild")
        while undisturbed.poll() is None and len(noted_steps(folder / "calm")) <= max(wild):
            time.sleep(1.0)
        undisturbed.kill()
        undisturbed.wait()
        calm, log = noted_steps(folder / "calm"), (folder / "wild" / "log").read_text()
        assert sorted(wild) == list(range(len(wild))) and len(calm) >= len(wild), log[-3000:]
        wrong = [step for step in wild if seen(calm[step]) != seen(wild[step])]
        print(f"{len(wild)} steps in {minutes:g} minutes, {kills} kills, {sum(bursts)} faults, "
              f"{log.count('try 1 of')} reads that went on, {log.count('fetching it again')} samples fetched again; "
              f"steps whose keys or loss differ from the undisturbed run's: {len(wrong)}")
        if wrong:
            raise SystemExit(1)


def run_and_kill(folder: Path, seconds: float, rng: random.Random) -> int:
    """Train for a given time, killing and restarting the run; returns the number of kills."""
    kills, ends = 0, time.monotonic() + seconds
    with tqdm(total=round(seconds), unit="s", disable=None) as bar:
        while (left := ends - time.monotonic()) > 0:
            running = child("s3://maskstream/soak", folder)
            try:
                running.wait(min(left, rng.uniform(15, 60)))
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGKILL)
                running.wait()
                kills += 1
            else:
                raise AssertionError((folder / "log").read_text()[-3000:])  # it should not end by itself
            bar.update(round(seconds - left) - bar.n)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long the disturbed run goes on")
    parser.add_argument("--seed", type=int, default=0, help="seed of faults and kills (default: 0)")
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train_and_note(arguments.child[0], Path(arguments.child[1]))
    else:
        soak(arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
