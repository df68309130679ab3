"""Ranks: one small object says who we are; everything works the same with one process and no group."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import ConfigError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a rank that is this late is taken for dead


@dataclass(frozen=True, kw_only=True)
class DistContext:
    """This process's place among the ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and saves."""
        return self.rank == 0

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
def distributed(device: str) -> Iterator[DistContext]:
    """Join the process group that torchrun describes (NCCL on CUDA, gloo on CPU), and leave it at the end.

    Without torchrun's environment there is no group and one rank. Raises ConfigError when "cuda" is asked
    for and absent.
    """
    launched = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local_rank)
    if not launched:
        yield DistContext(rank=0, world_size=1, device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield DistContext(rank=dist.get_rank(), world_size=dist.get_world_size(), device=chosen)
    finally:
        dist.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """auto | cpu | cuda -> this process's device. Raises ConfigError when it is not there."""
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
