"""Detect a hung run in bounded time and name the ranks responsible; detect that the launcher has died.

Each rank records its progress (`beat`), and a thread publishes it in the group's store. A rank that waits for another
makes no progress either, so the run hangs when no rank has made any for `timeout` seconds. Every rank's thread then
determines which ranks are responsible: those whose threads are silent too (stopped, or their host is gone), otherwise
those behind the others. Loading data and models may take any time: in that phase only silence counts as a hang.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from shards.files.strict_json import to_json

EXIT_HUNG = 70  # EX_SOFTWARE
PHASES = ("loading", "evaluation", "checkpoint", "waiting for data", "counting masks", "forward pass", "backward pass")
_MAX_PERIOD = 2.0  # seconds between two reports of a rank
_SILENT_PERIODS = 3  # a live rank reports at least once in this many periods
_LOADING = 0  # index into PHASES
_LOADING_SILENCE = 30.0  # seconds; imports and model building sometimes keep other threads from running


class LastHeard(NamedTuple):
    """What a rank last published."""

    rank: int
    host: str
    step: int  # completed steps
    phase: int  # index into PHASES, which are in the order in which they follow a step
    age: float  # seconds since its last progress
    published: int  # number of reports; if it does not grow, the process is stopped or gone


class Watchdog:
    """Context manager around everything a rank does. On a hang it prints which ranks hang, and where, and exits.

    `connect_store` opens a connection to the store shared by the ranks; None without a launcher.
    """

    def __init__(self, rank: int, world_size: int, connect_store: Callable[[], dist.Store] | None,
                 timeout: float) -> None:
        self.rank, self.world_size, self.connect_store, self.timeout = rank, world_size, connect_store, timeout
        self.period = min(_MAX_PERIOD, timeout / 4)
        self._at, self._since = (0, 0), time.monotonic()
        self._published = 0
        self._launcher = os.getppid() if connect_store is not None else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, phase: str, step: int | None = None) -> None:
        """Record progress: the phase, one of PHASES, begins after `step` completed steps (None: unchanged). Cheap
        enough to call at any rate."""
        self._at = (self._at[0] if step is None else step, PHASES.index(phase))
        self._since = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join(self.period)

    def _watch(self) -> None:
        store = self.connect_store() if self.connect_store is not None else None
        suspected: tuple[float, dict[int, LastHeard]] | None = None  # since when, and all ranks' reports at that time
        while not self._done.wait(self.period if self._published else 0):
            if self._launcher is not None and os.getppid() != self._launcher:
                _end("the launcher (torchrun) is gone")
            self._published += 1
            if store is not None:
                try:
                    store.set(f"progress/{self.rank}", to_json(self._own()))
                except RuntimeError as error:  # torch's store errors: the node that holds the store is gone
                    if not self._done.is_set():
                        _end(f"the launcher's store does not answer ({str(error).splitlines()[0]})")
            now = time.monotonic()
            if now - self._since < self.timeout:
                suspected = None
            elif suspected is None:
                suspected = now, self._progress_of_all(store)
            elif now - suspected[0] > self._confirmation_time():
                message = describe_hang(suspected[1], self._progress_of_all(store), self.timeout)
                if message is not None and not self._done.is_set():
                    _end(message)
                suspected = None

    def _confirmation_time(self) -> float:
        """Seconds between suspecting a hang and deciding on it."""
        seconds = _SILENT_PERIODS * self.period
        return max(seconds, min(self.timeout, _LOADING_SILENCE)) if self._at[1] == _LOADING else seconds

    def _own(self) -> LastHeard:
        age = time.monotonic() - self._since
        return LastHeard(self.rank, socket.gethostname(), *self._at, age, self._published)

    def _progress_of_all(self, store: dist.Store | None) -> dict[int, LastHeard]:
        if store is None:
            return {0: self._own()}
        reports = {}
        for rank in range(self.world_size):
            reports[rank] = LastHeard(rank, "an unknown host", 0, 0, self.timeout, 0)
            if store.check([f"progress/{rank}"]):
                reports[rank] = LastHeard(*json.loads(store.get(f"progress/{rank}")))
        return reports


def describe_hang(before: Mapping[int, LastHeard], now: Mapping[int, LastHeard], timeout: float) -> str | None:
    """Name the ranks responsible for a hang, given all ranks' reports at two times further apart than a report takes.

    None when there is no hang because some rank made progress.
    """
    silent = [progress for rank, progress in now.items() if progress.published == before[rank].published]
    answering = [progress for progress in now.values() if progress not in silent]
    if any(progress.age < timeout for progress in answering):
        return None
    if not silent and any(progress.phase == _LOADING for progress in answering):
        return None
    behind = min((progress.step, progress.phase) for progress in now.values())
    blamed = silent or [progress for progress in answering if (progress.step, progress.phase) == behind]
    verb = "does not answer, last seen" if silent else "is"
    names = "; ".join(f"rank {progress.rank} on {progress.host} {verb} at step {progress.step + 1}, "
                      f"{PHASES[progress.phase]}, for {progress.age:.0f} s" for progress in blamed)
    others = len(now) - len(blamed)
    waiting = f"; {others} other rank(s) wait for it" if others else ""
    return (f"no progress for {timeout:g} s (train.hang_timeout): {names}{waiting}. All ranks exit; the same command "
            "resumes training from the newest checkpoint")


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # a stuck loader process would not notice that we exit
        child.kill()
    os._exit(EXIT_HUNG)  # the main thread is stuck where no exception reaches it
