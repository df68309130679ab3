"""Write checkpoints atomically to a folder or object storage, in the background, and delete old ones.

For `best.pt` (if this is the best), then for `step-N.pt`: delete the old file's hash, publish the new file atomically,
then write its hash. So a kill at any point leaves either the old or the new file, complete, and never with the other's
hash; a file without a hash file still contains its own hash (`trainer.models.integrity`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import MaskStreamError, RunError
from shards.files.atomic import copy_atomically, sync_folder
from shards.files.storage import LocalStorage, open_storage
from trainer.models.integrity import HASH_SUFFIX, SealedFile, hash_line
from trainer.run.checkpoint import BEST_NAME, OWNER_NAME, Checkpoint, checkpoint_name, numbered

_SCRATCH = ".checkpoint.tmp"
_POLL = 0.05  # seconds


class CheckpointError(RunError):
    """A checkpoint could not be written; the message names location and cause."""


class TakenOver(RunError):
    """Another process now writes this run's checkpoints; the message names it."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; `save` waits for the one before.

    A failed write (full disk, network down) is only a warning, as the previous checkpoint is still valid; failing to
    write the last one is an error (see `close`).
    """

    def __init__(self, place: str | Path, scratch: Path, keep: int, keep_every: int | None) -> None:
        """`place`: folder or URL; `scratch`: local folder to stage uploads in; `keep`: how many newest ones to keep."""
        self.storage = open_storage(place)
        self.scratch = self.storage.folder if isinstance(self.storage, LocalStorage) else scratch
        self.keep, self.keep_every = keep, keep_every
        self.on_wait: Callable[[], None] = lambda: None  # called repeatedly while the caller waits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failure: str | None = None
        self._owner: bytes | None = None
        self.newest: str | None = None  # file name of the last checkpoint published

    def save(self, checkpoint: Checkpoint, *, is_best: bool, is_copy: bool = False) -> None:
        """Copy the state to the host, unless `is_copy`, then write it in the background."""
        self.wait()
        copied = checkpoint if is_copy else Checkpoint(**_on_host(vars(checkpoint)))
        self._pending = self._thread.submit(self._write, copied, is_best)

    def wait(self) -> None:
        """Wait for a write in progress; warns if it failed."""
        pending = self._pending
        if pending is None:
            return
        self._wait_for(pending)
        self._pending = None
        try:
            pending.result()
            self._failure = None
        except TakenOver:
            raise
        except (OSError, RuntimeError, MaskStreamError) as error:  # torch reports a failed write as RuntimeError
            self._failure = f"a checkpoint could not be written to {self.storage.root}: {error}"
            warnings.warn(f"{self._failure}. Training continues; the previous checkpoint is intact", stacklevel=2)

    def __enter__(self) -> CheckpointWriter:
        self._owner = self._read_owner()
        return self

    def __exit__(self, *_: object) -> None:
        """Let a write in progress finish, also after an error."""
        if self._pending is not None:
            self._wait_for(self._pending)
        self._thread.shutdown()

    def close(self) -> None:
        """Wait for the last checkpoint. Raises CheckpointError if it could not be written."""
        self.wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise CheckpointError(f"{self._failure}. Steps since the previous checkpoint are lost; make sure that it "
                                  "can be written there, then run the same command to repeat them")

    def _wait_for(self, pending: Future[None]) -> None:
        while not pending.done():
            self.on_wait()
            wait([pending], _POLL)

    def _write(self, checkpoint: Checkpoint, is_best: bool) -> None:
        self._check_owner()
        self.scratch.mkdir(parents=True, exist_ok=True)
        temporary, name = self.scratch / _SCRATCH, checkpoint_name(checkpoint.step)
        try:
            with temporary.open("wb") as file:
                sealed = SealedFile(file)
                torch.save(vars(checkpoint), sealed)  # type: ignore[arg-type]  # only written to
                digest = sealed.seal()
            if is_best:
                self._publish(temporary, BEST_NAME, digest, keep=True)
            self._publish(temporary, name, digest)
        finally:
            temporary.unlink(missing_ok=True)
        self.newest = name
        self._remove_old(checkpoint.step)

    def _check_owner(self) -> None:
        """Raise TakenOver if another process now writes here."""
        owner = self._read_owner()
        if self._owner is not None and owner is not None and owner != self._owner:
            text = " ".join(owner.decode(errors="replace").split())[:300]
            raise TakenOver(f"another process has taken over {self.storage.root}: {text}; this one exits, that one "
                            "continues the run")

    def _read_owner(self) -> bytes | None:
        """None for a local folder as well: its lock keeps other processes out."""
        if isinstance(self.storage, LocalStorage):
            return None
        try:
            return self.storage.read(OWNER_NAME)
        except FileNotFoundError:
            return None

    def _publish(self, temporary: Path, name: str, digest: str, *, keep: bool = False) -> None:
        """Publish a file in the order above; `temporary` may be moved unless `keep` is set."""
        self.storage.delete(name + HASH_SUFFIX)
        if not isinstance(self.storage, LocalStorage):
            self.storage.upload(name, temporary)
        elif keep:
            copy_atomically(temporary, self.scratch / name)
        else:
            temporary.replace(self.scratch / name)
            sync_folder(self.scratch)
        self.storage.write(name + HASH_SUFFIX, hash_line(digest, name))

    def _remove_old(self, newest: int) -> None:
        """Later checkpoints than `newest` must be damaged, or the run would have resumed from them: they do not count
        towards `keep`, and stay for inspection until the run overwrites them."""
        names = {step: name for step, name in numbered(self.storage).items() if step <= newest}
        for step, name in list(names.items())[: -self.keep]:
            if self.keep_every is None or step % self.keep_every:
                self.storage.delete(name)
                self.storage.delete(name + HASH_SUFFIX)


def _on_host(value: Any) -> Any:
    """A copy on the host, unaffected by later steps."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value
