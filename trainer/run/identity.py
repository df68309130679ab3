"""Whose checkpoints are these? A run's identity, and one run at a time in the place of its checkpoints.

    <output_dir>/run-id         made once; each checkpoint carries it
    <checkpoints>/owner.json    which run the place belongs to, and which of its starts writes there

A folder is locked besides. On object storage the owner is created by a conditional put, so of two new runs one wins; a
start of the same run takes over, as after kill -9, and a start that was taken over stops writing (`checkpoint_writer`).
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import getpid
from pathlib import Path

from shards.errors import ConfigError, ShardError, StorageError
from shards.files.atomic import write_atomically
from shards.files.outside_json import parse_json
from shards.files.storage import LocalStorage, RetryPolicy, Storage, open_storage
from shards.files.strict_json import to_json
from trainer.reporting.state import process_exists
from trainer.run.checkpoint import OWNER_NAME, has_checkpoints
from trainer.run.folder import lock_run_folder

ID_NAME = "run-id"
_RELEASE_PATIENCE = RetryPolicy(tries=2, timeout=5.0)  # the run has ended; the next start does without it


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who writes checkpoints to a place."""

    run_id: str
    output_dir: str
    host: str
    pid: int
    session: str  # of this start
    ended: bool = False


def run_id(folder: Path) -> str:
    """The identity of the run in `folder`; "" when it has none yet."""
    try:
        return (folder / ID_NAME).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""


@contextmanager
def lock_checkpoints(place: str | Path, folder: Path) -> Iterator[None]:
    """Make `place` that of the checkpoints of the run in `folder`, which is locked, and keep other runs out.

    Gives the run its identity if it has none. Raises ConfigError when the place belongs to another run, FolderInUse
    when one is there.
    """
    storage = open_storage(place)
    lock = isinstance(storage, LocalStorage) and storage.folder.resolve() != folder.resolve()
    with lock_run_folder(Path(place), setting="train.checkpoint_dir") if lock else nullcontext():
        owner = _claim(storage, folder)
        try:
            yield
        finally:
            _release(place, owner)


def check_identity(mine: str, folder: Path, theirs: str, output_dir: str | None) -> None:
    """Raise ConfigError unless a checkpoint of the run `theirs`, made in `output_dir`, is this run's own; either has
    none if it was begun before there were identities."""
    if mine and theirs and mine != theirs:
        raise ConfigError(_another_runs(f"the checkpoint in train.checkpoint_dir is of {output_dir} ({theirs})", mine,
                                        folder))


def _claim(storage: Storage, folder: Path) -> Owner:
    there = _owner_of(storage)
    mine = run_id(folder) or _adopted(storage, there, folder) or secrets.token_hex(8)
    owner = Owner(run_id=mine, output_dir=str(folder.resolve()), host=socket.gethostname(), pid=getpid(),
                  session=secrets.token_hex(8))
    if there is None:
        try:
            storage.write(OWNER_NAME, _content(owner), create=True)
        except StorageError:
            there = _owner_of(storage)
            if there is None:
                raise
    if there is not None and there.session != owner.session:  # else the answer to our own put was lost
        if there.run_id != mine and (has_checkpoints(storage) or not _is_gone(there, storage)):
            raise ConfigError(_another_runs(f"{storage.root} belongs to the run in {there.output_dir} ({there.run_id}),"
                                            f" process {there.pid} on {there.host}", mine, folder)
                              + f"; if that run is gone for good, remove {storage.where(OWNER_NAME)} and its "
                              "checkpoints")
        storage.write(OWNER_NAME, _content(owner))
    write_atomically(folder / ID_NAME, f"{mine}\n".encode())
    return owner


def _another_runs(found: str, mine: str, folder: Path) -> str:
    return (f"{found}, not of the run in {folder} ({mine}); choose another train.checkpoint_dir, give that run's "
            "output_dir to continue it, or name its best.pt in load.weights to start from its weights")


def _adopted(storage: Storage, there: Owner | None, folder: Path) -> str | None:
    """The identity of a run whose folder was lost, such as a node's own disk, and whose checkpoints were not."""
    same = there is not None and there.output_dir == str(folder.resolve()) and _is_gone(there, storage)
    return there.run_id if there is not None and same else None


def _is_gone(owner: Owner, storage: Storage) -> bool:
    """Whether no process of it can be there any more. A folder's lock, which is held here, says so."""
    if isinstance(storage, LocalStorage) or owner.ended:
        return True
    return owner.host == socket.gethostname() and (owner.pid == getpid() or not process_exists(owner.pid))


def _release(place: str | Path, owner: Owner) -> None:
    """Say that the run has ended, unless another start has taken over."""
    storage = open_storage(place, _RELEASE_PATIENCE)
    try:
        if _owner_of(storage) == owner:
            storage.write(OWNER_NAME, _content(dataclasses.replace(owner, ended=True)))
    except (OSError, ShardError, ConfigError) as error:
        warnings.warn(f"{storage.where(OWNER_NAME)} could not be written: {error}. The next start of this run does "
                      "not need it", stacklevel=2)


def _owner_of(storage: Storage) -> Owner | None:
    """Raises ConfigError when the file is malformed."""
    try:
        data = storage.read(OWNER_NAME)
    except FileNotFoundError:
        return None
    try:
        content = parse_json(data, storage.where(OWNER_NAME))
        owner = Owner(**content)
        if not all(type(value) is kind for value, kind in zip(content.values(), _KINDS, strict=True)):
            raise TypeError("a field has the wrong type")
        return owner
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{storage.where(OWNER_NAME)} does not say whose checkpoints these are: {error}; remove it "
                          "if no other run writes there") from error


_KINDS = (str, str, str, int, str, bool)  # of Owner's fields, in their order


def _content(owner: Owner) -> bytes:
    return (to_json(dataclasses.asdict(owner), indent=1) + "\n").encode()
