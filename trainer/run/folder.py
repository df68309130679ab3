"""Lock output_dir, so that only one run uses it, and record the start in state.json."""

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
_WAIT_SECONDS = 120.0  # a run that was stopped or killed can take this long to release the lock
_POLL_SECONDS = 0.5


class FolderInUse(RunError):
    """Another process is training in this folder; the message names it."""


@contextmanager
def lock_run_folder(folder: Path, wait_seconds: float = _WAIT_SECONDS, setting: str = "output_dir") -> Iterator[None]:
    """Create `folder` and keep other runs out of it until the context exits or this process dies.

    Waits up to `wait_seconds` for a run already there, then removes partial files that killed runs left. Raises
    FolderInUse, whose message suggests changing `setting`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / LOCK_NAME) as file:
        if _lock(file, folder, time.monotonic() + wait_seconds, setting):
            remove_leftovers(folder)
        yield


def _lock(file: IO[str], folder: Path, deadline: float, setting: str) -> bool:
    """Acquire the lock. False on a file system without locks, which gets a warning."""
    announced = False
    while True:
        try:
            reason = try_lock(file)
            break
        except BlockingIOError:
            file.seek(0)
            holder = f"{folder} is in use by a run ({file.read().strip() or 'which has just started'})"
            if time.monotonic() > deadline:
                raise FolderInUse(f"{holder}; wait for its end, or choose another {setting}") from None
            if not announced:
                print(f"{holder}; waiting for its end", flush=True)
                announced = True
            time.sleep(_POLL_SECONDS)
    if reason is not None:
        warn_unlocked(folder, reason)
        return False
    with naming(folder / LOCK_NAME):
        file.seek(0)
        file.truncate()
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return True


def is_used(folder: Path) -> bool | None:
    """Whether a run is using the folder now; None if unknown (no lock file, or locking is not possible)."""
    try:
        with os.fdopen(open_plain(folder / LOCK_NAME), "rb") as file:
            return None if try_lock(file, shared=True) else False
    except BlockingIOError:
        return True
    except (OSError, StorageError):
        return None


@contextmanager
def record_start(folder: Path, total_steps: int, world_size: int) -> Iterator[None]:
    """Write state.json before data and model are loaded, so that a death or an error meanwhile is visible as such.

    On an error the state becomes "failed", or "stopped" on an interrupt, unless the training loop has written its own.
    """
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
    except (ConfigError, StorageError, OSError):  # damaged; state.json is only informative
        return None
