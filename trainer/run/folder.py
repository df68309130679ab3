"""A run's folder before the run is in it: one run at a time, and a word in state.json from the first moment."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shards.errors import ConfigError, RunError, StorageError
from shards.files.atomic import naming, remove_leftovers
from shards.files.locks import open_lock, try_lock, warn_unlocked
from shards.files.plain_file import open_plain
from trainer.reporting.state import RunState, read_state, write_state

LOCK_NAME = ".lock"
_WAIT_SECONDS = 120.0  # seconds; a run that was stopped or killed may take so long to let go
_PAUSE = 0.5


class FolderInUse(RunError):
    """Another process trains into the folder; the message says which."""


@contextmanager
def lock_run_folder(folder: Path, wait_seconds: float = _WAIT_SECONDS, setting: str = "output_dir") -> Iterator[None]:
    """Keep other runs out of `folder`, which is made, until the end or this process's death.

    Waits `wait_seconds` for a run that is there, then removes what killed ones left half-written. Raises FolderInUse,
    which says to change `setting`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / LOCK_NAME) as file:
        if _lock(file, folder, time.monotonic() + wait_seconds, setting):
            remove_leftovers(folder)
        yield


def _lock(file: IO[str], folder: Path, deadline: float, setting: str) -> bool:
    """Whether the lock is held now; it is not on a file system without locks."""
    told = False
    while True:
        try:
            reason = try_lock(file)
            break
        except BlockingIOError:
            file.seek(0)
            holder = f"{folder} is in use by a run ({file.read().strip() or 'which has just begun'})"
            if time.monotonic() > deadline:
                raise FolderInUse(f"{holder}; wait for its end, or choose another {setting}") from None
            if not told:
                print(f"{holder}; waiting for its end", flush=True)
                told = True
            time.sleep(_PAUSE)
    if reason is not None:
        warn_unlocked(folder, reason)
        return False
    with naming(folder / LOCK_NAME):
        file.seek(0)
        file.truncate()
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return True


def is_used(folder: Path) -> bool | None:
    """Whether a run is in the folder now; None when that cannot be told (there is no lock, or none can be had)."""
    try:
        with os.fdopen(open_plain(folder / LOCK_NAME), "rb") as file:
            return None if try_lock(file, shared=True) else False
    except BlockingIOError:
        return True
    except (OSError, StorageError):
        return None


@contextmanager
def record_start(folder: Path, total_steps: int, world_size: int) -> Iterator[None]:
    """The run's state from before its data and model are there: a death while they load is not "no run was started",
    and an error then is not "stopped". What the loop says later stays."""
    before, now = _state_of(folder), time.time()
    state = RunState(
        status="running", step=before.step if before else 0, total_steps=total_steps, world_size=world_size,
        host=socket.gethostname(), pid=os.getpid(), started=now, updated=now, seconds_per_step=None,
        best_miou=before.best_miou if before else None, checkpoint=before.checkpoint if before else None,
    )  # fmt: skip
    write_state(folder, state)
    try:
        yield
    except BaseException as error:
        if _state_of(folder) == state:
            status = "failed" if isinstance(error, Exception) else "stopped"
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            write_state(folder, dataclasses.replace(state, status=status, updated=time.time(), message=message))
        raise


def _state_of(folder: Path) -> RunState | None:
    try:
        return read_state(folder)
    except (ConfigError, StorageError, OSError):  # damaged; it is only for looking at
        return None
