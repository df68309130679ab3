"""Distributed set-up. `DistContext` describes this rank; a single process works the same way, without a group."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import ConfigError, RunError
from trainer.watchdog import Watchdog

# Collectives must not time out while any rank makes progress; trainer.watchdog ends the run when none does.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)
JOIN_TIMEOUT = datetime.timedelta(minutes=10)
_MIN_JOIN_SECONDS = 60.0  # imports can take this long on a busy machine
_POLL = 0.02  # seconds


@dataclass(frozen=True, kw_only=True)
class DistContext:
    """This process's rank and device."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and saves."""
        return self.rank == 0

    def beat(self, phase: str, step: int | None = None) -> None:
        """Report the start of a phase to the watchdog, if there is one; `step`: number of completed steps."""
        if self.watchdog is not None:
            self.watchdog.beat(phase, step)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns the tensor. Call it on every rank."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with rank 0's, in place. Call it on every rank."""
        if dist.is_available() and dist.is_initialized():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()


@contextmanager
def distributed(device: str, hang_timeout: float = JOIN_TIMEOUT.total_seconds()) -> Iterator[DistContext]:
    """Join the process group that torchrun describes (NCCL on CUDA, gloo on CPU), and leave it on exit. A watchdog
    monitors everything in between, loading included (see `trainer.watchdog`).

    Without torchrun's environment there is one rank and no group. Raises ConfigError when "cuda" is requested but not
    available, RunError when the launcher's store or other ranks do not answer.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    rank_device = pick_device(device, local_rank)
    if not is_launched():
        with Watchdog(0, 1, None, hang_timeout) as watchdog:
            yield DistContext(rank=0, world_size=1, device=rank_device, watchdog=watchdog)
        return
    if rank_device.type == "cuda":
        torch.cuda.set_device(rank_device)
    store, rank, world_size, prefix = _join(datetime.timedelta(seconds=max(hang_timeout, _MIN_JOIN_SECONDS)))
    with Watchdog(rank, world_size, partial(_connect_store, prefix), hang_timeout) as watchdog:
        dist.init_process_group(
            "nccl" if rank_device.type == "cuda" else "gloo",
            store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=rank_device if rank_device.type == "cuda" else None,
        )
        try:
            yield DistContext(rank=rank, world_size=world_size, device=rank_device, watchdog=watchdog)
        finally:
            dist.destroy_process_group()


def _connect_store(prefix: str) -> dist.Store:
    """A separate connection, for use by a thread, to the store shared by the ranks of this launch."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(prefix, dist.TCPStore(address, port, timeout=JOIN_TIMEOUT))


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def _join(timeout: datetime.timedelta) -> tuple[dist.Store, int, int, str]:
    """(launcher's store, rank, world size, key prefix of this launch). Raises RunError when nobody answers in time."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        return store, rank, world_size, agree_on_start(store, rank, world_size, timeout)
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"rank {os.environ.get('RANK')} could not join the others through the launcher's store at "
                       f"{place} within {timeout.total_seconds():.0f} s ({reason}); check that torchrun is still "
                       "running there and that the network allows the connection") from error


def agree_on_start(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta = JOIN_TIMEOUT) -> str:
    """A key prefix for this launch of the ranks, equal on all of them and never used by an earlier launch.

    When torchrun restarts ranks (after a death, or with other nodes) it keeps its store, and in it the addresses of
    dead ranks. A rank that reads one before its peer has written a new address makes gloo fail with "connection
    refused". So rank 0 numbers the launches and answers every greeting, those of dead ranks included, until all live
    ranks have confirmed the number.
    """
    if rank:
        greeting = store.add(f"greetings/{rank}", 1)
        answer = f"answers/{rank}/{greeting}"
        store.wait([answer], timeout)
        prefix = store.get(answer).decode()
        store.set(f"{prefix}/heard/{rank}", "")
        return prefix
    prefix = f"start-{store.add('starts', 1)}"
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"greetings/{other}"]):
                store.set(f"answers/{other}/{store.add(f'greetings/{other}', 0)}", prefix)
        missing = {other for other in missing if not store.check([f"{prefix}/heard/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RunError(f"ranks {sorted(missing)} did not start within {timeout.total_seconds():.0f} s")
        time.sleep(_POLL)
    return prefix


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """auto | cpu | cuda -> this process's device. Raises ConfigError when it is not available."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("device is 'cuda' but torch sees no CUDA device; set device=cpu or device=auto")
    if device == "cpu" or not has_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()}; "
            "lower torchrun's --nproc-per-node"
        )
    return torch.device("cuda", local_rank)
