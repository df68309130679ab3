"""Run identity: which run owns a checkpoint location, and which process may write to it.

    <output_dir>/run-id         created once; stored in every checkpoint
    <checkpoints>/owner.json    the run that owns the location, and the process ("session") of it that writes there

A local folder is locked as well. On object storage owner.json is created by a conditional put, so of two new runs only
one succeeds. A new process of the same run takes over, as after kill -9, and the old one stops writing
(`checkpoint_writer`).
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
_RELEASE_RETRIES = RetryPolicy(tries=2, timeout=5.0)  # short: the run has ended, and the next start copes without it


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The run and process that write checkpoints to a location."""

    run_id: str
    output_dir: str
    host: str
    pid: int
    session: str  # random, one per process
    ended: bool = False


def run_id(folder: Path) -> str:
    """The id of the run in `folder`; "" if it has none yet."""
    try:
        return (folder / ID_NAME).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""


@contextmanager
def lock_checkpoints(place: str | Path, folder: Path) -> Iterator[None]:
    """Claim `place` for the checkpoints of the run in `folder` (already locked), and keep other runs out of it.

    Creates the run's id if it has none. Raises ConfigError when `place` belongs to another run, FolderInUse when
    another run is using it.
    """
    storage = open_storage(place)
    lock = isinstance(storage, LocalStorage) and storage.folder.resolve() != folder.resolve()
    with lock_run_folder(Path(place), setting="train.checkpoint_dir") if lock else nullcontext():
        owner = _claim(storage, folder)
        try:
            yield
        finally:
            _release(place, owner)


def check_identity(own_id: str, folder: Path, checkpoint_id: str, output_dir: str | None) -> None:
    """Raise ConfigError if a checkpoint, written by the run in `output_dir`, belongs to another run than the one in
    `folder`. Either id is empty if the run started before ids existed."""
    if own_id and checkpoint_id and own_id != checkpoint_id:
        found = f"the checkpoint in train.checkpoint_dir belongs to the run in {output_dir} ({checkpoint_id})"
        raise ConfigError(_wrong_owner(found, own_id, folder))


def _claim(storage: Storage, folder: Path) -> Owner:
    current = _owner_of(storage)
    own_id = run_id(folder) or _recovered_id(storage, current, folder) or secrets.token_hex(8)
    owner = Owner(run_id=own_id, output_dir=str(folder.resolve()), host=socket.gethostname(), pid=getpid(),
                  session=secrets.token_hex(8))
    if current is None:
        try:
            storage.write(OWNER_NAME, _content(owner), create=True)
        except StorageError:
            current = _owner_of(storage)
            if current is None:
                raise
    if current is not None and current.session != owner.session:  # equal: our put succeeded, its response was lost
        if current.run_id != own_id and (has_checkpoints(storage) or not _is_gone(current, storage)):
            found = (f"{storage.root} belongs to the run in {current.output_dir} ({current.run_id}), process "
                     f"{current.pid} on {current.host}")
            raise ConfigError(f"{_wrong_owner(found, own_id, folder)}; if that run no longer exists, remove "
                              f"{storage.where(OWNER_NAME)} and its checkpoints")
        storage.write(OWNER_NAME, _content(owner))
    write_atomically(folder / ID_NAME, f"{own_id}\n".encode())
    return owner


def _wrong_owner(found: str, own_id: str, folder: Path) -> str:
    return (f"{found}, not to the run in {folder} ({own_id}); choose another train.checkpoint_dir, set output_dir to "
            "that run's to continue it, or set load.weights to its best.pt to start from its weights")


def _recovered_id(storage: Storage, current: Owner | None, folder: Path) -> str | None:
    """The id of a run that lost its folder, for example with a node's local disk, but not its checkpoints."""
    same = current is not None and current.output_dir == str(folder.resolve()) and _is_gone(current, storage)
    return current.run_id if current is not None and same else None


def _is_gone(owner: Owner, storage: Storage) -> bool:
    """Whether the owner's process cannot be running any more. Holding a local folder's lock, as here, implies it."""
    if isinstance(storage, LocalStorage) or owner.ended:
        return True
    return owner.host == socket.gethostname() and (owner.pid == getpid() or not process_exists(owner.pid))


def _release(place: str | Path, owner: Owner) -> None:
    """Mark the owner as ended, unless another process has taken over."""
    storage = open_storage(place, _RELEASE_RETRIES)
    try:
        if _owner_of(storage) == owner:
            storage.write(OWNER_NAME, _content(dataclasses.replace(owner, ended=True)))
    except (OSError, ShardError, ConfigError) as error:
        warnings.warn(f"{storage.where(OWNER_NAME)} could not be written: {error}. This run can still be resumed",
                      stacklevel=2)


def _owner_of(storage: Storage) -> Owner | None:
    """The content of owner.json; None if there is none. Raises ConfigError when it is malformed."""
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
        raise ConfigError(f"{storage.where(OWNER_NAME)} is malformed, so the owner of these checkpoints is unknown: "
                          f"{error}; remove it if no other run writes there") from error


_KINDS = (str, str, str, int, str, bool)  # types of Owner's fields, in order


def _content(owner: Owner) -> bytes:
    return (to_json(dataclasses.asdict(owner), indent=1) + "\n").encode()
