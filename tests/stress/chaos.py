"""Disturb a training run at random, again and again; it must end as if nothing had happened.

First a run that nobody disturbs. Then the same one, with one of these at a time: kill -9 a rank, a loader process or
the launcher; SIGTERM; kill -9 and a flipped bit in the newest checkpoint; kill -9 anything in the first five seconds of
a start, or during an evaluation; a full disk for a while. Whatever torchrun does not start again by itself is started
again with the same command, which must never be refused; after the death of a launcher nothing may be left. In the end
weights, optimiser moments and the step must be equal to the last bit.

With several numbers of ranks each start takes the next one. Sums are then rounded in another order, so the run is a
linear head without batch norm, and weights must be equal up to rounding.

example: python tests/stress/chaos.py --kills 50
         python tests/stress/chaos.py --kills 50 --ranks 1 2 3
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from tests.support.training_run import TrainingRun, assert_same_end, final_state, newest_step

KINDS = ("rank", "loader process", "launcher", "SIGTERM", "damaged checkpoint", "first seconds", "evaluation",
         "full disk")
DECK = (*KINDS, "first seconds", "first seconds", "evaluation")  # drawn to the end before it is shuffled again
FIRST_SECONDS = 5.0
LINEAR = ("decoder_head.type=linear", "decoder_head.use_batchnorm=false", "decoder_head.dropout=0",
          "train.global_batch_size=12")
EVAL_EVERY = 25
DISK_MEGABYTES = 24
_STARTED = re.compile(r": (?:new run|continuing at step (\d+)); ")
_PATIENCE = 180.0  # seconds


@dataclass
class Account:
    """What was done to the run, and what it cost."""

    disturbed: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    lost_steps: list[int] = field(default_factory=list)  # per resume: steps that had to be done again
    seconds_to_first_step: list[float] = field(default_factory=list)  # per resume, from the kill on

    @property
    def kills(self) -> int:
        return sum(count for kind, count in self.disturbed.items() if kind != "full disk")

    def lines(self) -> list[str]:
        half = len(self.seconds_to_first_step) // 2
        early, late = (statistics.median(part or [0.0]) for part in (self.seconds_to_first_step[:half],
                                                                     self.seconds_to_first_step[half:]))
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(self.disturbed.items()))
        return [f"{self.kills} kills ({kinds})",
                f"{self.resumes} resumes; steps done again: {sum(self.lost_steps)}, at most "
                f"{max(self.lost_steps, default=0)} at once",
                f"from a kill to the next step, median: {early:.1f} s in the first half of the run, {late:.1f} s in "
                "the second"]


def chaos(root: Path, folder: Path, kills: int, steps: int, seed: int, kinds: tuple[str, ...] = DECK,
          ranks: tuple[int, ...] = (2,)) -> Account:
    """The whole experiment. Raises AssertionError when the two runs end differently."""
    evaluations = (f"train.eval_every={EVAL_EVERY}", "eval.stride=8", "eval.max_images=null",
                   "eval.panels=0")  # long enough to be met
    settings = (f"train.total_steps={steps}", "train.checkpoint_every=3", "data.workers=1", "train.keep_checkpoints=3",
                *(evaluations if "evaluation" in kinds else (f"train.eval_every={steps}",)),
                *(LINEAR if len(ranks) > 1 else ()))
    calm = TrainingRun(root, folder / "calm", *settings, ranks=ranks[0])
    assert calm.wait(900) == 0, calm.text
    calm.assert_gone()
    disturbed = folder / "disturbed"
    disturbed.mkdir(exist_ok=True)
    if "full disk" in kinds and not mount_small_disk(disturbed):
        print("a small disk cannot be mounted here: no full disk")
        kinds = tuple(kind for kind in kinds if kind != "full disk")
    try:
        account = _Disturber(root, disturbed, settings, steps, random.Random(seed), ranks).go_on_until(kills, kinds)
        if len(ranks) > 1:
            assert_close_ends(folder / "calm", disturbed)
        else:
            assert_same_end(folder / "calm", disturbed)
    finally:
        subprocess.run(["umount", disturbed], capture_output=True, check=False)
    return account


def evaluated_steps(folder: Path) -> set[int]:
    """Steps with an evaluation in the run's record."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {json.loads(line)["step"] for line in lines if '"kind": "val"' in line and line.endswith("}")}


def assert_close_ends(one: Path, other: Path) -> None:
    """Two finished runs have equal weights, up to rounding from a different order of summation."""
    import torch

    ours, theirs = final_state(one), final_state(other)
    assert ours.step == theirs.step and ours.model.keys() == theirs.model.keys()
    for name, tensor in ours.model.items():
        torch.testing.assert_close(tensor, theirs.model[name], rtol=1e-3, atol=1e-5)


def mount_small_disk(folder: Path) -> bool:
    """A separate tmpfs for the run, where permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


class _Disturber:
    def __init__(self, root: Path, folder: Path, settings: tuple[str, ...], steps: int, rng: random.Random,
                 ranks: tuple[int, ...]) -> None:
        self.root, self.folder, self.settings, self.steps, self.rng = root, folder, settings, steps, rng
        self.ranks = itertools.cycle(ranks)
        self.account, self.deck = Account(), list[str]()
        self.logs: list[TrainingRun] = []
        self.run = self._start()

    def _start(self) -> TrainingRun:
        run = TrainingRun(self.root, self.folder, *self.settings, ranks=next(self.ranks),
                          launcher=("--standalone", "--max-restarts", "1000"))
        self.logs.append(run)
        return run

    def go_on_until(self, kills: int, kinds: tuple[str, ...]) -> Account:
        with tqdm(total=kills, unit="kill", disable=None) as bar:
            while self.account.kills < kills and self._ran_on(self.rng.uniform(0.2, 1.5)):
                if not self.deck:
                    self.deck = self.rng.sample(kinds, len(kinds))
                kind = self.deck.pop()
                if self._disturb(kind):
                    self.account.disturbed[kind] += 1
                    bar.update(kind != "full disk")
                else:
                    self.deck.insert(0, kind)  # later
        code = self.run.wait(900)
        assert code == 0, self.run.text
        assert self.account.kills >= kills, f"the run was done after {self.account.kills} kills: too few --steps"
        self.run.assert_gone()
        refused = [run.text for run in self.logs if "is in use by a run" in run.text and "waiting for its end" not in
                   run.text]
        assert not refused, refused[0]
        return self.account

    def _ran_on(self, seconds: float) -> bool:
        """Wait for a new step and some seconds more; False if the run finishes first."""
        before, deadline = newest_step(self.folder), time.monotonic() + _PATIENCE
        while newest_step(self.folder) == before and self.run.process.poll() is None:
            assert time.monotonic() < deadline, self.run.text
            time.sleep(0.02)
        time.sleep(seconds)
        return self.run.process.poll() is None and newest_step(self.folder) < self.steps - 3

    def _disturb(self, kind: str) -> bool:
        if kind == "full disk":
            self._fill_disk()
            return True
        if kind == "first seconds":
            self._kill_launcher()
            self.account.disturbed["launcher"] += 1
            time.sleep(self.rng.uniform(0, FIRST_SECONDS))
        elif kind == "evaluation" and not self._reaches_evaluation():
            return False
        if kind in ("first seconds", "evaluation"):
            return self._survives(self.rng.choice([self.run.process.pid, *self.run.processes()]))
        victims = {"rank": self.run.ranks(), "loader process": self.run.loader_workers()}
        pids = victims.get(kind, [self.run.process.pid])
        if not pids:
            return False
        began, step, starts = time.monotonic(), newest_step(self.folder), len(self._starts())
        os.kill(self.rng.choice(pids), signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        if kind not in victims:
            self.run.wait(_PATIENCE)
            self.run.assert_gone()
            if kind == "damaged checkpoint":
                self._damage_newest()
            self.run = self._start()
        deadline = began + _PATIENCE
        while len(self._starts()) == starts:
            assert time.monotonic() < deadline, self.run.text
            if self.run.process.poll() == 0:
                return True  # it was done already
            time.sleep(0.02)
        resumed = self._starts()[-1]
        while newest_step(self.folder) <= resumed:
            assert time.monotonic() < deadline, self.run.text
            time.sleep(0.02)
        self.account.resumes += 1
        self.account.lost_steps.append(max(0, step - resumed))
        self.account.seconds_to_first_step.append(time.monotonic() - began)
        return True

    def _kill_launcher(self) -> None:
        self.run.process.kill()
        self.run.wait(_PATIENCE)
        self.run.assert_gone(timeout=15)
        self.run = self._start()

    def _reaches_evaluation(self) -> bool:
        """Wait until an evaluation has started; False if the run finishes first."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            step = newest_step(self.folder)
            if step and step % EVAL_EVERY == 0 and step < self.steps - 3 and step not in evaluated_steps(self.folder):
                return True
            if self.run.process.poll() is not None or step >= self.steps - 3:
                return False
            assert time.monotonic() < deadline, self.run.text
            time.sleep(0.01)

    def _survives(self, pid: int) -> bool:
        """kill -9 some process of the run, and check that the run continues."""
        began, step = time.monotonic(), newest_step(self.folder)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if pid == self.run.process.pid:
            self.run.wait(_PATIENCE)
            self.run.assert_gone(timeout=15)
            self.run = self._start()
        while newest_step(self.folder) <= step or self.run.process.poll() is not None:
            assert time.monotonic() < began + _PATIENCE, self.run.text
            if self.run.process.poll() == 0:
                return True
            if self.run.process.poll() is not None:  # what died was more than torchrun starts again
                self.run.assert_gone()
                self.run = self._start()
            time.sleep(0.02)
        self.account.resumes += 1
        self.account.seconds_to_first_step.append(time.monotonic() - began)
        return True

    def _starts(self) -> list[int]:
        """The first step of every start so far."""
        return [int(found or 0) for run in self.logs for found in _STARTED.findall(run.text)]

    def _damage_newest(self) -> None:
        newest = max((self.folder / "checkpoints").glob("step-*.pt"), default=None)
        if newest is not None:
            data = bytearray(newest.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            newest.write_bytes(data)

    def _fill_disk(self) -> None:
        filler = self.folder / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                while file.write(bytes(64 << 10)):
                    pass
        except OSError:
            pass  # full
        time.sleep(self.rng.uniform(0.5, 2))
        filler.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="(default: 50)")
    parser.add_argument("--steps", type=int, default=None, help="length of the run (default: 40 for each kill)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done when (default: 0)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="ranks of each start in turn (default: 2)")
    arguments = parser.parse_args()
    from preprocess.make_scenes import write_scenes
    from tests.conftest import make_shards

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scenes(folder / "scenes", {"train": 12, "val": 5}, seed=0)
        root = make_shards(folder / "shards", folder / "scenes")
        account = chaos(root, folder, arguments.kills, arguments.steps or 40 * arguments.kills, arguments.seed,
                        ranks=tuple(arguments.ranks))
        equal = "up to rounding" if len(arguments.ranks) > 1 else "bit for bit"
        print("\n".join([*account.lines(), f"weights, moments and step equal to the undisturbed run's, {equal}",
                         "nothing left running, no command refused"]))


if __name__ == "__main__":
    main()
