"""Simulate an epoch across ranks and workers, and count how often each sample is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from shards.plan import MicroBatchNumbers, Span, TrainPlan
from shards.reader import ShardReader
from shards.sample import CropSample


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Counts from one simulated epoch."""

    samples: int
    seen: Counter[int]  # sample number -> times used
    keys: Counter[str]  # key -> times read
    micro_batches: list[int]  # per rank
    spans: int
    shared_spans: int  # read by more than one worker, so more than once

    @property
    def is_exact(self) -> bool:
        """Every sample was used once, every key is unique, and all ranks had equally many micro-batches."""
        return (len(self.seen) == len(self.keys) == self.samples and set(self.seen.values()) == {1}
                and set(self.keys.values()) == {1} and len(set(self.micro_batches)) == 1)


def audit(reader: ShardReader, plan: TrainPlan, ranks: int, workers: int, accumulation: int,
          progress: Callable[[CropSample], object] = lambda sample: None) -> Audit:
    """Read and verify every sample of the first epoch as `workers` per rank would, which take turns.

    The time grows with the number of samples, and with ranks x accumulation. Raises as `ShardReader.read`.
    """
    per_step = plan.micro_batch_size * ranks * accumulation
    steps = -(-plan.num_samples // per_step)
    seen: Counter[int] = Counter()
    keys: Counter[str] = Counter()
    owners: dict[Span, set[tuple[int, int]]] = {}
    micro_batches = []
    for rank in range(ranks):
        numbers = MicroBatchNumbers(first_step=0, last_step=steps, rank=rank, world_size=ranks,
                                    accumulation=accumulation)
        micro_batches.append(0)
        for turn, number in enumerate(numbers):
            micro_batches[rank] += 1
            for position in plan.positions(number):
                if position >= plan.num_samples:  # of later epochs
                    break
                draw = plan.sample_at(position)
                sample = reader.read(draw.sample)
                seen[draw.sample] += 1
                keys[sample.key] += 1
                owners.setdefault(plan.span(position), set()).add((rank, turn % workers))
                progress(sample)
    return Audit(samples=len(reader), seen=seen, keys=keys, micro_batches=micro_batches, spans=len(owners),
                 shared_spans=sum(len(who) > 1 for who in owners.values()))
