"""Which of several sets each position of a run takes its sample from: a pure function of the sets' weights.

The weights become whole numbers w_k without a common divisor. Positions follow a pattern of w_0 + w_1 + ... entries
that repeats for ever, in which set k occurs w_k times:

    weights 0.5, 0.3, 0.2    whole numbers 5, 3, 2    pattern 0 1 0 2 0 1 0 1 0 2 | 0 1 0 ...

It is spread as evenly as possible: among the first n positions, for any n, set k has fewer than one more or less than
its share of n. So each batch has the shares to within two samples, and any whole number of periods has them exactly.
The j-th position of set k (from 0) keeps to that if it is not before floor(j / share), nor after ceil((j + 1) / share)
- 1; such positions exist for all sets at once (Steiner and Yeomans, Management Science 39, 1993), and choosing, among
the sets that may come, the one that must come first finds them.

Each set has a plan of its own, whose positions it takes one after the other. Where ranks and workers divide the lanes,
position p of the mixture, modulo the number of lanes, says which worker reads it. So a lane of a set holds what is read
at positions of one p mod lanes (`MixedLanes`), and each span has one worker. Were a set's own positions dealt to lanes
in turn, as without a mixture, all workers would fetch all spans, and each use a few samples of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError

LONGEST_PERIOD = 200_000  # positions; takes half a second to compute, and some MB


class Turn(NamedTuple):
    """A position of the mixture: its set, and how many earlier positions have the same set."""

    source: int
    position: int


class Mixture:
    """The endless sequence of sets with the given weights. Raises ConfigError (see `whole_weights`)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = whole_weights(weights)  # of each set in a period
        self.period = sum(self.counts)
        self._sources, self._before = _pattern(self.counts)

    def locate(self, position: int) -> Turn:
        """The turn at a position (0, 1, 2, ..., unbounded)."""
        periods, place = divmod(position, self.period)
        source = int(self._sources[place])
        return Turn(source, periods * self.counts[source] + int(self._before[place]))

    def first_of(self, source: int) -> int:
        """The first position of a set."""
        return int(np.flatnonzero(self._sources == source)[0])

    def lanes_of(self, source: int, lanes: int) -> MixedLanes:
        """The lanes of a set's plan (`TrainPlan` takes them as `dealing`)."""
        return MixedLanes(self._sources == source, lanes)


class MixedLanes:
    """Lanes of one set: lane g holds its samples at the positions p of the mixture with p mod lanes = g.

    `is_own`, bool [period]: the positions of a period that the set has. Lane g sees the places (g + row * lanes) mod
    period, row by row: a cycle of period / d places, d their common divisor. Sums along the d cycles make counting a
    look-up.
    """

    def __init__(self, is_own: npt.NDArray[np.bool_], lanes: int) -> None:
        self.lanes, self.period = lanes, is_own.size
        self._own = np.flatnonzero(is_own)
        self._cycles = gcd(lanes, self.period)
        self._length = self.period // self._cycles
        rows = np.arange(self._length, dtype=np.int64) * lanes
        cycles = (np.arange(self._cycles)[:, None] + rows) % self.period
        self._row_of = np.empty(self.period, np.int32)  # of each place, in its cycle
        self._row_of[cycles] = np.arange(self._length)
        twice = np.tile(is_own[cycles], 2)  # a count may go past the end of a cycle
        self._sums = np.zeros((self._cycles, 2 * self._length + 1), np.int32)
        np.cumsum(twice, axis=1, out=self._sums[:, 1:])

    def place(self, position: int) -> tuple[int, int]:
        """See `shards.plan.Dealing`."""
        mixed = self._mixed(position)
        lane = mixed % self.lanes
        return lane, int(self._counts(np.array([lane]), mixed)[0])

    def before(self, position: int) -> npt.NDArray[np.int64]:
        """See `shards.plan.Dealing`."""
        return self._counts(np.arange(self.lanes), self._mixed(position))

    def _mixed(self, position: int) -> int:
        """The position in the mixture of a position of the set."""
        periods, turn = divmod(position, self._own.size)
        return periods * self.period + int(self._own[turn])

    def _counts(self, lanes: npt.NDArray[np.int64], mixed: int) -> npt.NDArray[np.int64]:
        """Positions of the set before this one of the mixture, in each of these lanes."""
        rows = (mixed - lanes + self.lanes - 1) // self.lanes
        whole, more = np.divmod(rows, self._length)
        cycle, first = lanes % self._cycles, self._row_of[lanes % self.period]
        found: npt.NDArray[np.int64] = whole * self._sums[cycle, self._length]
        found += self._sums[cycle, first + more] - self._sums[cycle, first]
        return found


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, which are taken as the decimal numbers they are written as: 0.7 is
    7/10, not the nearest binary number. Raises ConfigError where one is not above 0, or the period is too long."""
    for number, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.sources[{number}].weight is {weight}, legal: above 0")
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = gcd(*whole)
    if sum(whole) // divisor > LONGEST_PERIOD:
        ratio = " : ".join(str(count // divisor) for count in whole)
        raise ConfigError(f"the weights of data.sources are {', '.join(map(str, weights))}, which is {ratio}: they "
                          f"repeat after {sum(whole) // divisor} samples, legal: at most {LONGEST_PERIOD}; round them")
    return [count // divisor for count in whole]


def _pattern(counts: Sequence[int]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]:
    """(set of each position of a period, earlier positions of the same set in the period)"""
    period = sum(counts)
    sources, before = np.zeros(period, np.uint16), np.zeros(period, np.int32)
    taken = [0] * len(counts)
    for place in range(period):
        may_come = [number for number, count in enumerate(counts) if taken[number] * period < (place + 1) * count]
        first = min(may_come, key=lambda number: -(-(taken[number] + 1) * period // counts[number]))
        sources[place], before[place] = first, taken[first]
        taken[first] += 1
    return sources, before
