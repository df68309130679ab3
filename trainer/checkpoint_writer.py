"""Writes checkpoints while training goes on: to a folder or object storage, whole or not at all, and thins them out.

Order of writing, each step published at once: `best.pt` and its hash (when it is the best), `step-N.pt.sha256`,
`step-N.pt`. A kill between them leaves the checkpoint before, and a hash nobody asks for.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shards.atomic import copy_atomically, sync_folder
from shards.errors import MaskStreamError, RunError
from shards.storage import LocalStorage, open_storage
from trainer.checkpoint import BEST_NAME, HASH_SUFFIX, Checkpoint, checkpoint_name, numbered

_SCRATCH = ".checkpoint.tmp"
_POLL = 0.05  # seconds


class CheckpointError(RunError):
    """A checkpoint could not be written; the message names place and cause."""


class CheckpointWriter:
    """The checkpoints of one run. At most one is being written; the next waits for it.

    A failure (a full disk, a network that is gone) is a warning, as the checkpoint before is still good; only that of
    the last one is an error (see `close`).
    """

    def __init__(self, place: str | Path, scratch: Path, keep: int, keep_every: int | None,
                 on_wait: Callable[[], None] = lambda: None) -> None:
        """`place`: folder or URL; `scratch`: local folder for what is on its way to a URL; `keep`: newest ones;
        `on_wait`: called again and again while the caller waits, as slow storage is no hang."""
        self.storage = open_storage(place)
        self.scratch = self.storage.folder if isinstance(self.storage, LocalStorage) else scratch
        self.keep, self.keep_every, self.on_wait = keep, keep_every, on_wait
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failure: str | None = None
        self.newest: str | None = None  # name of the last one that was published

    def save(self, checkpoint: Checkpoint, *, is_best: bool) -> None:
        """Copy the state to the host, then write it in the background."""
        self.wait()
        copied = Checkpoint(**_on_host(vars(checkpoint)))
        self._pending = self._thread.submit(self._write, copied, is_best)

    def wait(self) -> None:
        """Until nothing is being written; warns when that failed."""
        pending = self._pending
        if pending is None:
            return
        self._wait_for(pending)
        self._pending = None
        try:
            pending.result()
            self._failure = None
        except (OSError, RuntimeError, MaskStreamError) as error:  # torch reports a failed write as RuntimeError
            self._failure = f"a checkpoint could not be written to {self.storage.root}: {error}"
            warnings.warn(f"{self._failure}. Training goes on; the checkpoint before is still there", stacklevel=2)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """After an error what is being written is still finished."""
        if self._pending is not None:
            self._wait_for(self._pending)
        self._thread.shutdown()

    def close(self) -> None:
        """Wait for the last one. Raises CheckpointError when it could not be written."""
        self.wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise CheckpointError(f"{self._failure}. What was trained since the checkpoint before is lost unless the "
                                  "same command is given again with room to write")

    def _wait_for(self, pending: Future[None]) -> None:
        while not pending.done():
            self.on_wait()
            wait([pending], _POLL)

    def _write(self, checkpoint: Checkpoint, is_best: bool) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        temporary, name = self.scratch / _SCRATCH, checkpoint_name(checkpoint.step)
        try:
            with temporary.open("wb") as file:
                hashing = _Hashing(file)
                torch.save(vars(checkpoint), hashing)  # type: ignore[arg-type]  # only written to
                file.flush()
                os.fsync(file.fileno())
            if is_best:
                self.storage.delete(BEST_NAME + HASH_SUFFIX)  # at no moment is it that of another file
                self._publish_copy(temporary, BEST_NAME)
                self._publish_hash(hashing, BEST_NAME)
            self._publish_hash(hashing, name)
            if isinstance(self.storage, LocalStorage):
                temporary.replace(self.scratch / name)
                sync_folder(self.scratch)
            else:
                self.storage.upload(name, temporary)
        finally:
            temporary.unlink(missing_ok=True)
        self.newest = name
        self._remove_old(checkpoint.step)

    def _publish_hash(self, hashing: _Hashing, name: str) -> None:
        self.storage.write(name + HASH_SUFFIX, f"{hashing.sha256.hexdigest()}  {name}\n".encode())

    def _publish_copy(self, temporary: Path, name: str) -> None:
        if isinstance(self.storage, LocalStorage):
            copy_atomically(temporary, self.scratch / name)
        else:
            self.storage.upload(name, temporary)

    def _remove_old(self, newest: int) -> None:
        """Later ones than the newest were found damaged, or it would not be: they count for nothing, and may be
        looked at until the run comes to their steps again."""
        names = {step: name for step, name in numbered(self.storage).items() if step <= newest}
        for step, name in list(names.items())[: -self.keep]:
            if self.keep_every is None or step % self.keep_every:
                self.storage.delete(name)
                self.storage.delete(name + HASH_SUFFIX)


class _Hashing:
    """A file that is only written to, with the sha256 of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _on_host(value: Any) -> Any:
    """A copy that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value
