"""`<run>/state.json`: a run's status and progress, for people and job scripts. Written by rank 0; needs no torch."""

from __future__ import annotations

import dataclasses
import os
import socket
import types
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ConfigError
from shards.files.atomic import write_atomically
from shards.files.outside_json import parse_json
from shards.files.plain_file import read_plain
from shards.files.strict_json import to_json
from shards.shown_text import masked_value

STATE_NAME = "state.json"
_MAX_BYTES = 16 << 20  # of the file
STATUSES = ("running", "stopped", "failed", "finished")
_MAX_NUMBER = 10**12  # for any number in it
_QUIET_SECONDS = 1800  # an evaluation or compilation can take this long without an update
_QUIET_INTERVALS = 10


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The last state that a run reported."""

    status: str  # one of STATUSES; "stopped": by a signal, the same command resumes it
    step: int  # optimiser updates done
    total_steps: int
    world_size: int
    host: str  # of rank 0, like pid
    pid: int
    started: float  # unix seconds; of this process, not of the run
    updated: float
    seconds_per_step: float | None  # mean since `started`, evaluations and checkpoints included
    best_miou: float | None
    checkpoint: str | None  # name of the newest one
    message: str = ""  # why it stopped, failed or finished early

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the last step, at the average pace so far."""
        return None if self.seconds_per_step is None else (self.total_steps - self.step) * self.seconds_per_step

    def is_lost(self, steps_between_updates: int, now: float, in_use: bool | None = None) -> bool:
        """True if the status is "running" but no process runs it: the process is gone, or has been silent for too long.

        `in_use`: result of `trainer.run.folder.is_used`, since process ids are reused. A held lock means it is running;
        a free one proves nothing about another host, whose locks may not be visible here.
        """
        if self.status != "running":
            return False
        if in_use:  # however long it has been silent: an evaluation can take hours
            return False
        if self.host == socket.gethostname() and (in_use is False or not process_exists(self.pid)):
            return True
        interval = steps_between_updates * (self.seconds_per_step or 0)
        return now - self.updated > max(_QUIET_SECONDS, _QUIET_INTERVALS * interval)


def write_state(run: Path, state: RunState) -> None:
    """Write the state atomically. A failure (full disk) is a warning and never ends a run."""
    try:
        content = masked_value(dataclasses.asdict(state))  # the message may quote another program's error
        write_atomically(run / STATE_NAME, (to_json(content, indent=1) + "\n").encode())
    except OSError as error:
        warnings.warn(f"{run / STATE_NAME} could not be written: {error}. Training continues", stacklevel=2)


def read_state(run: Path) -> RunState | None:
    """The state of a run; None when the folder has none. Raises ConfigError when the file is malformed, StorageError
    when it is not a plain file or is too large."""
    path = run / STATE_NAME
    try:
        content = parse_json(read_plain(path, _MAX_BYTES), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    known = typing.get_type_hints(RunState)
    for name, kind in known.items():
        if name not in content or not _is_a(content[name], kind):
            legal = getattr(kind, "__name__", kind)  # unions such as `float | None` have no __name__
            raise ConfigError(f"{path}: field {name!r} is {content.get(name)!r}, legal: {legal}")
        least = 1 if name == "total_steps" else 0
        if isinstance(content[name], int | float) and not least <= content[name] <= _MAX_NUMBER:
            problem = f"{path}: field {name!r} is {content[name]!r}, legal: from {least} to {_MAX_NUMBER}"
            raise ConfigError(problem[:300])
    if content["status"] not in STATUSES:
        raise ConfigError(f"{path}: field 'status' is {content['status']!r}, legal: {', '.join(STATUSES)}")
    return RunState(**{name: content[name] for name in known})  # fields of newer versions are ignored


def format_duration(seconds: float) -> str:
    """At most two units: 42s, 3m05s, 1h02m or 2d07h."""
    whole = max(0, round(seconds))
    for size, smaller, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= size:
            return f"{whole // size}{units[0]}{whole % size // smaller:02d}{units[1]}"
    return f"{whole}s"


def _is_a(value: Any, kind: Any) -> bool:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    return isinstance(value, kinds) and not isinstance(value, bool)


def process_exists(pid: int) -> bool:
    """Whether a process with this id exists on this host."""
    try:
        os.kill(pid, 0)  # signal 0 only checks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
