"""Sampling by class: `<split>.classes`, which lists the classes of each sample, and how often a plan repeats samples.

    repeat_factor     sample i counts max over its classes c of max(1, sqrt(t / f_c)) times, with f_c the share of
                      samples that hold c (LVIS, arXiv:1908.03195, appendix B)
    class_balanced    as if a class were drawn first, all alike, and then a sample that holds it, all alike
                      (class-aware sampling, arXiv:1512.05830, sec. 3.1): sample i counts in proportion to the sum over
                      its classes of 1 / n_c, with n_c the samples that hold c. An epoch keeps its length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError, CorruptShardError, ShardError
from shards.files.storage import Storage
from shards.manifest import CLASS_DTYPE, SplitInfo
from shards.plan import REPEAT_BITS
from shards.shard_table import read_records

SAMPLINGS = ("none", "repeat_factor", "class_balanced")


class ClassLists(NamedTuple):
    """The classes of each sample of a split, in storage order."""

    counts: npt.NDArray[np.uint16]  # [N]: classes of each sample
    ids: npt.NDArray[np.uint16]  # those of one sample after the other's, ascending in each

    @classmethod
    def of(cls, samples: Sequence[Sequence[int]]) -> ClassLists:
        """From the classes of each sample."""
        return cls(np.array([len(labels) for labels in samples], CLASS_DTYPE),
                   np.array([label for labels in samples for label in labels], CLASS_DTYPE))

    @classmethod
    def load(cls, storage: Storage, info: SplitInfo) -> ClassLists:
        """Read and check a split's. Raises ShardError when it has none or it cannot be read, CorruptShardError when it
        is damaged or contradicts the manifest."""
        if info.classes is None:
            raise ShardError(f"{storage.root} does not list the classes of its samples, as sets of format versions 1 "
                             "and 2 do not; make it again with preprocess/make_shards.py")
        numbers = read_records(storage, info.classes, CLASS_DTYPE, "list of classes")
        found, where = cls(numbers[: info.samples], numbers[info.samples :]), storage.where(info.classes.name)
        if int(found.counts.sum(dtype=np.int64)) != len(found.ids):
            raise CorruptShardError(f"{where}: {len(found.ids)} ids, but the samples' counts do not add up to that")
        starts = found.starts[found.counts > 0]
        falls = np.flatnonzero(found.ids[1:] <= found.ids[:-1]) + 1
        if not np.isin(falls, starts).all():
            raise CorruptShardError(f"{where}: the ids of a sample are not ascending")
        if np.bincount(found.ids, minlength=len(info.class_samples)).tolist() != info.class_samples:
            raise CorruptShardError(f"{where}: the classes do not occur as often as class_samples in the manifest says")
        return found

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each sample's ids begin."""
        counts = self.counts.astype(np.int64)
        return np.cumsum(counts) - counts

    def part(self, first: int, last: int) -> ClassLists:
        """Of the samples [first, last)."""
        start = int(self.counts[:first].sum(dtype=np.int64))
        counts = self.counts[first:last]
        return ClassLists(counts, self.ids[start : start + int(counts.sum(dtype=np.int64))])

    def tobytes(self) -> bytes:
        """Counts, then ids."""
        return self.counts.tobytes() + self.ids.tobytes()


def cumulative_repeats(lists: ClassLists, info: SplitInfo, sampling: str, threshold: float
                       ) -> npt.NDArray[np.int64] | None:
    """What `TrainPlan` takes as `repeats`, for a `sampling` of SAMPLINGS: int64 [N]; None for "none"."""
    if sampling == "none":
        return None
    held = np.array(info.class_samples, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # classes that no sample holds
        if sampling == "repeat_factor":
            of_class = np.maximum(1.0, np.sqrt(threshold * info.samples / held))
            return fixed_point(_of_samples(np.maximum, of_class, lists, 1.0))
        expected = _of_samples(np.add, 1.0 / held, lists, 0.0)
    return fixed_point(expected * (info.samples / expected.sum()), info.samples)


def fixed_point(expected: npt.NDArray[np.float64], total: int | None = None) -> npt.NDArray[np.int64]:
    """Cumulative sums in units of 2**-REPEAT_BITS, scaled so that they add up to `total`, or else to the next whole
    number; then no factor is lowered. Raises ConfigError for an epoch of 2**40 samples."""
    one = 1 << REPEAT_BITS
    if not expected.sum() < 1 << 40:
        raise ConfigError(f"an epoch would have {expected.sum():.3g} samples, legal: fewer than {1 << 40}; lower "
                          "data.sampling_threshold")
    units = np.rint(expected * one) if total is not None else np.ceil(expected * one - 1e-3)
    sums = np.cumsum(units.astype(np.int64))
    lacking = -int(sums[-1]) % one if total is None else total * one - int(sums[-1])
    raised: npt.NDArray[np.int64] = sums + np.rint(lacking * (sums / sums[-1])).astype(np.int64)
    return raised


def _of_samples(combine: np.ufunc, of_class: npt.NDArray[np.float64], lists: ClassLists, empty: float
                ) -> npt.NDArray[np.float64]:
    """The values of each sample's classes, combined; `empty` for samples without a class."""
    found = np.full(len(lists.counts), empty)
    holding = lists.counts > 0
    found[holding] = combine.reduceat(of_class[lists.ids], lists.starts[holding])
    return found
