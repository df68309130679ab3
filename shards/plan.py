"""Which samples, in which order, for which rank: pure functions of (seed, numbers), no state, no I/O.

Training samples form one endless sequence: epoch after epoch, each a seeded permutation of all samples.
Cut into micro-batches of equal size, micro-batch m is the same list of samples whoever works on it.
Optimiser step s consumes micro-batches s*M .. s*M + M - 1 (M = ranks x accumulation), so every rank gets
the same number of them, nothing is dropped or repeated within an epoch, and a run is described by the
number of steps done, whatever the numbers of ranks and workers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError


class Draw(NamedTuple):
    """One sample of the sequence; (epoch, sample) together seed its augmentation."""

    epoch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The order of training samples. Raises ConfigError when there is nothing to train on."""

    num_samples: int
    micro_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError("the training split holds no samples")
        if self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size is {self.micro_batch_size}, legal: at least 1")

    def micro_batch(self, number: int) -> list[Draw]:
        """The samples of micro-batch `number` (0, 1, 2, ... without end)."""
        first = number * self.micro_batch_size
        draws = []
        for position in range(first, first + self.micro_batch_size):
            epoch, place = divmod(position, self.num_samples)
            draws.append(Draw(epoch, int(epoch_order(self.num_samples, self.seed, epoch)[place])))
        return draws


@functools.lru_cache(maxsize=2)  # a micro-batch can straddle two epochs
def epoch_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Permutation of 0..num_samples-1 for one epoch."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)
    order.setflags(write=False)
    return order


def micro_batch_numbers(
    first_step: int, last_step: int, rank: int, world_size: int, accumulation: int
) -> Iterator[int]:
    """Numbers of the micro-batches that `rank` works on in steps first_step..last_step-1, in order."""
    per_step = world_size * accumulation
    for step in range(first_step, last_step):
        for turn in range(accumulation):
            yield step * per_step + turn * world_size + rank


def accumulation_for(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank and step. Raises ConfigError when the sizes do not divide."""
    per_turn = micro_batch_size * world_size
    if global_batch_size % per_turn:
        raise ConfigError(
            f"train.global_batch_size is {global_batch_size}, legal: a multiple of train.micro_batch_size x ranks "
            f"= {micro_batch_size} x {world_size} = {per_turn}"
        )
    return global_batch_size // per_turn


def validation_samples(num_samples: int, rank: int, world_size: int) -> range:
    """The samples `rank` evaluates: every sample exactly once over all ranks, counts may differ by one."""
    return range(rank, num_samples, world_size)
