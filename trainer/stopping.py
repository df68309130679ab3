"""Graceful stop on SIGTERM, SIGUSR1 (Slurm, Kubernetes, spot instances) and Ctrl-C.

The current step is completed, a checkpoint is saved, and the program exits with EXIT_TO_BE_CONTINUED: the same command
resumes from there. A second Ctrl-C stops it at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from shards.errors import RunError
from shards.workers import die_with_parent

EXIT_TO_BE_CONTINUED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ANSWER_SECONDS = 5.0
_SAME_KEYPRESS = 1.0  # seconds; terminal and torchrun may both deliver the same Ctrl-C


class RunStopped(RunError):
    """A signal stopped the run after a completed step; the message names the signal and the step."""

    exit_code = EXIT_TO_BE_CONTINUED
    label = "stopped on request"


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and whether the ranks have agreed that one of them was."""

    signal_name: str | None = None
    agreed: bool = False

    @property
    def requested(self) -> bool:
        return self.signal_name is not None


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
        if not request.requested:
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
