"""Which samples, in which order, for which rank: pure functions of (seed, numbers), no state, no I/O.

Training samples form one endless sequence of positions: epoch after epoch, each a seeded permutation of all samples.
Position p belongs to micro-batch p // size, whichever rank processes it. Optimiser step s consumes micro-batches
s*M .. s*M + M - 1 (M = ranks x accumulation), so all ranks get equally many, nothing is dropped or repeated within an
epoch, and the number of completed steps alone defines the state of a run, for any number of ranks and workers.

An epoch is shuffled so that few bytes are read twice and the sample at any position is computed directly:

    shards, permuted   |---c---|--a--|----d----|--b--|        one row of samples
    lanes, permuted    |  2   |  0   |  3   |  1   |          equal sections; position p is in lane p mod lanes
    spans              |..|..|..|                             consecutive samples, read in one request; spans are
                                                              permuted within a lane, samples within a span

With `repeats`, an epoch holds sample i floor or ceil of r_i times, by systematic sampling: with C_i the sum of r up to
i and u one random number in [0, 1) per epoch, it holds floor(C_i + u) - floor(C_(i-1) + u) copies. The sum of all r is
a whole number, so every epoch is equally long; the mean number of copies is r_i; and copies are neighbours in a shard's
part of the row, so the sample at a place is found by a search in C. Within a lane, they are `lanes` or more positions
apart.

With `dealing`, lanes are as long as that says, and a position is in the lane that it says: `shards.mixing`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError

LANES, SPAN_SAMPLES = 128, 16
REPEAT_BITS = 20  # repeats are counted in units of 2**-20, exactly
_EPOCHS_KEPT = 2  # a micro-batch can straddle two epochs
_SHARDS, _LANES, _SPANS, _SAMPLES, _REPEATS = range(5)  # what a random generator is used to permute


class PlannedSample(NamedTuple):
    """One sample of the sequence; (epoch, sample, repeat) together seed its augmentation."""

    epoch: int
    sample: int
    repeat: int = 0  # copies of the sample before it in the row of the epoch


class Span(NamedTuple):
    """Consecutive samples in the row of an epoch: `size` of them, starting at index `first` of the row."""

    epoch: int
    first: int
    size: int


class Dealing(Protocol):
    """Which lane each position of a plan is in, in place of position mod lanes."""

    lanes: int

    def place(self, position: int) -> tuple[int, int]:
        """(its lane, how many earlier positions are in that lane)"""

    def before(self, position: int) -> npt.NDArray[np.int64]:
        """[lanes]: how many earlier positions are in each lane."""


class TrainPlan:
    """The order of training samples, numbered in storage order. Raises ConfigError when there are no samples.

    `repeats`, int64 [samples]: C in units of 2**-REPEAT_BITS (`shards.sampling`); None: each sample once an epoch.
    `dealing` takes the place of `lanes`. Memory grows with the number of shards and, for the lanes in use, the number
    of spans (samples / span_samples).
    """

    def __init__(self, shard_samples: Sequence[int] | npt.NDArray[np.int64], micro_batch_size: int, seed: int,
                 lanes: int = LANES, span_samples: int = SPAN_SAMPLES,
                 repeats: npt.NDArray[np.int64] | None = None, dealing: Dealing | None = None) -> None:
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.num_samples = int(self.shard_samples.sum())
        if self.num_samples < 1:
            raise ConfigError("the training split holds no samples")
        for name, value in (("micro_batch_size", micro_batch_size), ("lanes", lanes), ("span_samples", span_samples)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, legal: at least 1")
        self.micro_batch_size, self.seed, self.repeats = micro_batch_size, seed, repeats
        self.epoch_size = self.num_samples if repeats is None else int(repeats[-1]) >> REPEAT_BITS  # positions
        if repeats is not None and (len(repeats) != self.num_samples or self.epoch_size < 1):
            raise ConfigError(f"repeats are of {len(repeats)} samples and add up to {self.epoch_size}, legal: of all "
                              f"{self.num_samples}, and at least 1")
        self.dealing, self.lanes = dealing, min(lanes, self.epoch_size) if dealing is None else dealing.lanes
        self.span_samples = min(span_samples, -(-self.epoch_size // self.lanes))  # at most the longest lane
        self._first_samples = np.cumsum(self.shard_samples) - self.shard_samples
        self._row = functools.lru_cache(maxsize=_EPOCHS_KEPT)(self._make_row)
        self._offset = functools.lru_cache(maxsize=_EPOCHS_KEPT)(self._make_offset)
        self._dealt_before = functools.lru_cache(maxsize=_EPOCHS_KEPT + 1)(self._count_dealt_before)
        self._lane_starts = functools.lru_cache(maxsize=_EPOCHS_KEPT)(self._make_lane_starts)
        self._span_order = functools.lru_cache(maxsize=_EPOCHS_KEPT * self.lanes)(self._make_span_order)
        self._sample_order = functools.lru_cache(maxsize=_EPOCHS_KEPT * self.lanes)(self._make_sample_order)

    def __reduce__(self) -> tuple[type[TrainPlan], tuple[Any, ...]]:
        return TrainPlan, (self.shard_samples, self.micro_batch_size, self.seed, self.lanes, self.span_samples,
                           self.repeats, self.dealing)

    def micro_batch(self, number: int) -> list[PlannedSample]:
        """The samples of micro-batch `number` (0, 1, 2, ..., unbounded)."""
        return [self.sample_at(position) for position in self.positions(number)]

    def positions(self, number: int) -> range:
        """The positions of micro-batch `number` in the endless sequence."""
        return range(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)

    def sample_at(self, position: int) -> PlannedSample:
        """The sample at a position (0, 1, 2, ..., unbounded)."""
        span, turn = self._locate(position)
        inside = int(self._sample_order(span)[turn])
        places = self._places(Span(span.epoch, span.first + inside, 1))
        samples = self._samples_at(span.epoch, places)
        if self.repeats is None:
            return PlannedSample(span.epoch, int(samples[0]))
        return PlannedSample(span.epoch, int(samples[0]), int((places - self._copies_before(span.epoch, samples))[0]))

    def span(self, position: int) -> Span:
        """The span containing the sample at a position."""
        return self._locate(position)[0]

    def samples(self, span: Span) -> npt.NDArray[np.int64]:
        """Sample numbers of a span; consecutive except where it crosses into another shard. With `repeats`, some may
        occur more than once, one after the other, or not at all."""
        return self._samples_at(span.epoch, self._places(span))

    def _places(self, span: Span) -> npt.NDArray[np.int64]:
        """Places of a span's samples in storage order, where each is as often as in this epoch."""
        _, ends, shift = self._row(span.epoch)
        places = np.arange(span.first, span.first + span.size)
        return places + shift[np.searchsorted(ends, places, side="right")]

    def _samples_at(self, epoch: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The first i with floor(C_i + u) > place, for each place."""
        if self.repeats is None:
            return places
        return np.searchsorted(self.repeats, (places + 1 << REPEAT_BITS) - self._offset(epoch), side="left")

    def _copies_before(self, epoch: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """floor(C_(i-1) + u): copies of all samples before each of these, in storage order."""
        if self.repeats is None:
            return samples
        sums = np.where(samples > 0, self.repeats[np.maximum(samples, 1) - 1], 0)
        return sums + self._offset(epoch) >> REPEAT_BITS

    def _make_offset(self, epoch: int) -> int:
        """u of an epoch, in units of 2**-REPEAT_BITS."""
        return int(self._rng(epoch, _REPEATS).integers(1 << REPEAT_BITS))

    def _locate(self, position: int) -> tuple[Span, int]:
        """(span, index into its sample order) of a position."""
        epoch, in_epoch = divmod(position, self.epoch_size)
        if self.dealing is None:
            in_lane, lane = divmod(in_epoch, self.lanes)
        else:
            lane, earlier = self.dealing.place(position)
            in_lane = earlier - int(self._dealt_before(epoch)[lane])
        first, length = (int(numbers[lane]) for numbers in self._lane_starts(epoch))
        order, short = self._span_order(epoch, lane, length)
        lacking = len(order) * self.span_samples - length  # samples that the short span has less than the others
        number = in_lane // self.span_samples
        if number > short or (number == short and in_lane >= (short + 1) * self.span_samples - lacking):
            number = (in_lane + lacking) // self.span_samples  # after the short one
        start = number * self.span_samples - (lacking if number > short else 0)
        offset = int(order[number]) * self.span_samples
        span = Span(epoch, first + offset, min(self.span_samples, length - offset))
        return span, in_lane - start

    def _make_row(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(shards in the epoch's order; of each, its end in the row, and what leads from places in the row to places in
        storage order)"""
        order = self._rng(epoch, _SHARDS).permutation(len(self.shard_samples))
        first = self._copies_before(epoch, self._first_samples)
        sizes = self._copies_before(epoch, self._first_samples + self.shard_samples) - first
        ends = np.cumsum(sizes[order])
        return order, ends, first[order] - (ends - sizes[order])

    def _make_lane_starts(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(start of each lane in the row, its length); lanes are permuted so that a batch does not draw from adjacent
        sections."""
        if self.dealing is None:
            size, longer = divmod(self.epoch_size, self.lanes)
            lengths = size + (np.arange(self.lanes) < longer)
        else:
            lengths = self._dealt_before(epoch + 1) - self._dealt_before(epoch)
        order = self._rng(epoch, _LANES).permutation(self.lanes)
        starts = np.empty(self.lanes, np.int64)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        return starts, lengths

    def _count_dealt_before(self, epoch: int) -> npt.NDArray[np.int64]:
        """[lanes]: positions of earlier epochs in each lane."""
        assert self.dealing is not None
        return self.dealing.before(epoch * self.epoch_size)

    def _make_span_order(self, epoch: int, lane: int, length: int) -> tuple[npt.NDArray[np.int32], int]:
        """(permuted spans of a lane, place of its last one, which may be short, among them)"""
        count = -(-length // self.span_samples)
        order = self._rng(epoch, _SPANS, lane).permutation(np.arange(count, dtype=np.int32))
        return order, int(np.flatnonzero(order == count - 1)[0])

    def _make_sample_order(self, span: Span) -> npt.NDArray[np.int64]:
        return self._rng(span.epoch, _SAMPLES, span.first).permutation(span.size)

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *numbers]))


@dataclass(frozen=True, kw_only=True)
class MicroBatchNumbers:
    """Iterable over the micro-batches that `rank` processes in steps first_step..last_step-1, in order."""

    first_step: int
    last_step: int
    rank: int
    world_size: int
    accumulation: int

    def __iter__(self) -> Iterator[int]:
        per_step = self.world_size * self.accumulation
        for step in range(self.first_step, self.last_step):
            for turn in range(self.accumulation):
                yield step * per_step + turn * self.world_size + self.rank


def accumulation_for(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank and step. Raises ConfigError when the batch sizes do not divide evenly."""
    per_turn = micro_batch_size * world_size
    if global_batch_size % per_turn:
        raise ConfigError(
            f"train.global_batch_size is {global_batch_size}, legal: a multiple of train.micro_batch_size x ranks "
            f"= {micro_batch_size} x {world_size} = {per_turn}"
        )
    return global_batch_size // per_turn


def validation_groups(num_samples: int, size: int) -> list[range]:
    """All samples, in groups of consecutive ones that are predicted together; rank r of n takes every n-th, from r on.

    Groups do not depend on the number of ranks, as batches of other samples could round a prediction differently.
    """
    return [range(first, min(first + size, num_samples)) for first in range(0, num_samples, size)]
