"""Graceful stop on SIGTERM, SIGUSR1 (Slurm, Kubernetes, spot instances) and Ctrl-C, and after `train.max_hours`.

The current step is completed, a checkpoint is saved, and the program exits with EXIT_TO_BE_CONTINUED: the same command
resumes from there. A second Ctrl-C stops it at once.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shards.errors import RunError
from shards.workers import die_with_parent

EXIT_TO_BE_CONTINUED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ANSWER_SECONDS = 5.0
_SAME_KEYPRESS = 1.0  # seconds; terminal and torchrun may both deliver the same Ctrl-C
_IMPORTED = time.monotonic()
_LONGEST_IMPORT = 3600.0  # seconds; what /proc says of an earlier start is not believed


class RunStopped(RunError):
    """A signal or a time limit stopped the run after a completed step; the message names it and the step."""

    exit_code = EXIT_TO_BE_CONTINUED
    label = "stopped on request"


@dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    signal_name: str | None = None
    max_hours: float | None = None
    deadline: float = math.inf  # of time.monotonic(): when time is up

    def limit(self, max_hours: float | None, seconds_gone: float) -> None:
        """Set the time limit, of which some seconds are gone already; None: no limit."""
        self.max_hours = max_hours
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours - seconds_gone

    @property
    def reason(self) -> str | None:
        """The signal, or that time is up; None: go on."""
        if self.signal_name is None and time.monotonic() >= self.deadline:
            return f"time is up (train.max_hours={self.max_hours:g})"
        return self.signal_name

    @property
    def requested(self) -> bool:
        return self.reason is not None


def process_seconds() -> float:
    """Seconds since this process started, or the torchrun that did so: after a restart of the ranks no time is given
    anew. Where the kernel does not say, seconds since this module was imported."""
    since_import, own = time.monotonic() - _IMPORTED, _age("self")
    if not 0 <= own <= since_import + _LONGEST_IMPORT:
        return since_import
    return max(own, _age(str(os.getppid()))) if "TORCHELASTIC_RUN_ID" in os.environ else own


def _age(pid: str) -> float:
    """Seconds since a process started; -1 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime
    except (OSError, AttributeError, ValueError, IndexError):
        return -1.0


class LauncherGone(RunError):
    """The launcher died before this rank started."""


def die_with_launcher() -> None:
    """Make this rank exit when the torchrun that started it dies, however it dies. Call first in a program.

    Raises LauncherGone when it died before the kernel was asked to watch it: then, on the node whose launcher holds
    the store, the store's port refuses connections.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    die_with_parent()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # rank 0 holds the store, and may start later
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "0")
    try:
        socket.create_connection((address, int(port)), timeout=_ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        raise LauncherGone(f"rank {os.environ.get('RANK')} exits: the launcher (torchrun) is gone, {address}:{port} "
                           "refuses connections") from None
    except (OSError, ValueError):
        pass  # other network problems are reported when the ranks join


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Record the signals above in `request` instead of terminating. Does nothing outside the main thread, as Python
    allows signal handlers only there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last_interrupt = 0.0

    def record(number: int, _frame: FrameType | None) -> None:
        nonlocal last_interrupt
        before, now = last_interrupt, time.monotonic()
        if number == signal.SIGINT:
            last_interrupt = now
            if before and now - before > _SAME_KEYPRESS:
                raise KeyboardInterrupt
        if request.signal_name is None:
            request.signal_name = signal.Signals(number).name
            again = "; press Ctrl-C again to stop at once, without a checkpoint" if number == signal.SIGINT else ""
            print(f"{request.signal_name}: stopping after this step{again}", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, record) for number in _SIGNALS}
    ends = False
    try:
        yield
    except RunError:
        ends = True  # keep our handlers: torchrun now signals the remaining ranks, which must still report their errors
        raise
    finally:
        for number, handler in before.items() if not ends else ():
            signal.signal(number, handler)
