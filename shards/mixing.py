"""Which of several sets each position of a run takes its sample from: a pure function of the sets' weights.

The weights become whole numbers w_k without a common divisor. Positions follow a pattern of w_0 + w_1 + ... entries
that repeats for ever, in which set k occurs w_k times:

    weights 0.5, 0.3, 0.2    whole numbers 5, 3, 2    pattern 0 1 0 2 0 1 0 1 0 2 | 0 1 0 ...

It is spread as evenly as possible: among the first n positions, for any n, set k has fewer than one more or less than
its share of n. So each batch has the shares to within two samples, and any whole number of periods has them exactly.
The j-th position of set k (from 0) keeps to that if it is not before floor(j / share), nor after ceil((j + 1) / share)
- 1; such positions exist for all sets at once (Steiner and Yeomans, Management Science 39, 1993), and choosing, among
the sets that may come, the one that must come first finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError

LONGEST_PERIOD = 1_000_000  # positions; takes two seconds to compute, and 6 MB


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
