"""Asking a run to stop: SIGTERM and SIGUSR1 (Slurm, Kubernetes, spot instances) and Ctrl-C.

The step under way is finished, a checkpoint is written, and the program exits with EXIT_TO_BE_CONTINUED: the same
command goes on from there. A second Ctrl-C ends it at once.
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
_SAME_KEYPRESS = 1.0  # seconds; a terminal and torchrun may both pass on one Ctrl-C


class RunStopped(RunError):
    """A signal stopped the run after a whole step; the message says which, and where it goes on."""

    exit_code = EXIT_TO_BE_CONTINUED
    label = "stopped as asked"


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and whether the ranks agreed that one of them was."""

    signal_name: str | None = None
    agreed: bool = False

    @property
    def requested(self) -> bool:
        return self.signal_name is not None


class LauncherGone(RunError):
    """The launcher died before this rank had begun."""


def die_with_launcher() -> None:
    """Call first in a program: a rank ends with the torchrun that started it, however that died.

    Raises LauncherGone when it has died already, before the kernel was asked to watch it: on the node whose launcher
    holds the store, nobody listens there any more.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    die_with_parent()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # the store is rank 0's, which may start later
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "0")
    try:
        socket.create_connection((address, int(port)), timeout=_ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        raise LauncherGone(f"rank {os.environ.get('RANK')} ends: the launcher (torchrun) is gone, nobody answers at "
                           f"{address}:{port}") from None
    except (OSError, ValueError):
        pass  # a slow or odd network is for joining the other ranks to report


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Note the signals above in `request` instead of dying of them. Only in the main thread, as Python has it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last_interrupt = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal last_interrupt
        before, now = last_interrupt, time.monotonic()
        if number == signal.SIGINT:
            last_interrupt = now
            if before and now - before > _SAME_KEYPRESS:
                raise KeyboardInterrupt
        if not request.requested:
            request.signal_name = signal.Signals(number).name
            again = "; Ctrl-C again: at once, without a checkpoint" if number == signal.SIGINT else ""
            print(f"{request.signal_name}: stopping after this step{again}", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    ends = False
    try:
        yield
    except RunError:
        ends = True  # torchrun kills the ranks that are left: no signal may keep them from saying why they end
        raise
    finally:
        for number, handler in before.items() if not ends else ():
            signal.signal(number, handler)
