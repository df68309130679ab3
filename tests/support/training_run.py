"""Training runs as processes to be killed: start them, follow their progress, find everything they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY
from tests.support.zygote import Forked
from trainer.run.checkpoint import Checkpoint, load_latest

TINY = REPOSITORY / "tests" / "support" / "tiny.yaml"
_MARK = "MASKSTREAM_TEST_RUN"  # in the environment of all processes of a run


class TrainingRun:
    """One start of trainer/train.py (or another program), under torchrun if `ranks` is given."""

    def __init__(self, root: Path | str, folder: Path, *overrides: str, ranks: int = 0,
                 launcher: tuple[str, ...] = ("--standalone",),
                 program: Path = REPOSITORY / "trainer/train.py") -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}-{self.mark[:8]}.log"  # the run's own disk may be full
        arguments = [str(program), "--config", str(TINY), f"data.root={root}", f"output_dir={folder}",
                     "train.log_every=1", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", _MARK: self.mark}
        self.process: Forked | subprocess.Popen[bytes]
        if not ranks:
            self.process = Forked(arguments, self.log, environment)
            return
        command = [str(Path(sys.executable).parent / "torchrun"), *launcher, "--nproc-per-node", str(ranks)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, start_new_session=True,
                                            cwd=REPOSITORY, env=environment)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 180) -> int:
        """Wait for its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text}") from None

    def wait_for_step(self, step: int, timeout: float = 180) -> None:
        """Wait until this or a later step is logged."""
        deadline = time.monotonic() + timeout
        while newest_step(self.folder) < step:
            assert self.process.poll() is None, f"ended too early:\n{self.text}"
            assert time.monotonic() < deadline, f"step {step} was not reached:\n{self.text}"
            time.sleep(0.05)

    def processes(self) -> dict[int, str]:
        """pid -> command line of every living process of this run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_forked = isinstance(self.process, Forked) and folder.name == str(self.process.pid)
                if is_forked or self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it ended meanwhile, or is not ours
                continue
        return {pid: command for pid, command in found.items() if command}  # zombies have none

    def ranks(self) -> list[int]:
        """pids of the training processes, by rank."""
        found = {}
        for pid, command in self.processes().items():
            if "/torchrun " not in command and "train.py" in command:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((int(item[5:]) for item in environment if item.startswith(b"RANK=")), None)
                if rank is not None:
                    found[rank] = pid
        return [found[rank] for rank in sorted(found)]

    def loader_workers(self) -> list[int]:
        """pids of loader processes: children of the fork servers."""
        servers = {pid for pid, command in self.processes().items() if "forkserver" in command}
        return [pid for pid in servers if _parent(pid) in servers]

    def zombies(self) -> list[int]:
        """pids of zombies: dead children that its processes have not waited for."""
        alive = self.processes()
        stats = [Path(folder, "stat") for folder in Path("/proc").glob("[0-9]*")]
        return [int(stat.parent.name) for stat in stats if _parent(int(stat.parent.name)) in alive and _is_dead(stat)]

    def assert_gone(self, timeout: float = 60) -> None:
        """Wait until none of its processes is alive."""
        deadline = time.monotonic() + timeout
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.text}"
            time.sleep(0.1)


def newest_step(folder: Path) -> int:
    """The newest step in a run's record; 0 without a record."""
    step = 0
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        try:
            step = max(step, json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return step


def final_state(folder: Path) -> Checkpoint:
    checkpoint = load_latest(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def assert_equal_states(one: Any, other: Any, where: str = "") -> None:
    """Assert that two values are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_states(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        for number, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal_states(ours, theirs, f"{where}[{number}]")
    else:
        assert one == other, where


def assert_same_end(one: Path, other: Path) -> None:
    """Two finished runs have the same weights and moments, averages, loss scale and count of early stopping."""
    ours, theirs = final_state(one), final_state(other)
    assert ours.step == theirs.step
    assert_equal_states(ours.model, theirs.model)
    assert_equal_states(ours.optimizer, theirs.optimizer)
    for part in ("averaged", "loss_scale", "early_stopping"):
        assert_equal_states(getattr(ours, part), getattr(theirs, part), part)


def _is_dead(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
