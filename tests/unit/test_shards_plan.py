"""The order of samples: each exactly once per epoch, the same global batches for any topology, directly computable."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.plan import MicroBatchNumbers, PlannedSample, TrainPlan, accumulation_for, validation_groups


def draws(plan: TrainPlan, count: int) -> list[PlannedSample]:
    """The first samples of the endless sequence."""
    batches = -(-count // plan.micro_batch_size)
    return [draw for number in range(batches) for draw in plan.micro_batch(number)][:count]


SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(SHARDS, st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 3), st.integers(1, 20), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_every_sample_exactly_once_per_epoch(
    shards: list[int], batch: int, seed: int, epochs: int, lanes: int, span: int
) -> None:
    plan = TrainPlan(shards, batch, seed, lanes, span)
    seen = Counter(draws(plan, epochs * sum(shards)))
    assert seen == Counter(PlannedSample(epoch, sample) for epoch in range(epochs) for sample in range(sum(shards)))


@given(SHARDS, st.integers(0, 99), st.integers(1, 20), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_spans_are_neighbours_that_hold_their_samples(shards: list[int], seed: int, lanes: int, size: int) -> None:
    plan, samples = TrainPlan(shards, 1, seed, lanes, size), sum(shards)
    spans = {plan.span(position) for position in range(samples)}
    assert sorted(number for span in spans for number in plan.samples(span).tolist()) == list(range(samples))
    for position in range(samples):
        assert plan.sample_at(position).sample in plan.samples(plan.span(position))
    seams = {sum(shards[:number]) for number in range(1, len(shards) + 1)}
    for span in spans:
        numbers = plan.samples(span).tolist()
        assert len(numbers) <= size
        assert all(after == before + 1 or before + 1 in seams for before, after in pairwise(numbers))


@pytest.mark.parametrize(("batch", "ranks", "workers"), [(1, 1, 1), (2, 2, 2), (4, 2, 1), (1, 4, 4), (2, 1, 8)])
def test_a_span_belongs_to_one_worker_when_all_divide_the_lanes(batch: int, ranks: int, workers: int) -> None:
    plan, micro_batches = TrainPlan([7] * 50, batch, 3, lanes=16, span_samples=5), 3 * 350 // (batch * ranks) * ranks
    owners: dict[object, set[tuple[int, int]]] = {}
    for number in range(micro_batches):
        for position in plan.positions(number):
            owner = number % ranks, number // ranks % workers
            owners.setdefault(plan.span(position), set()).add(owner)
    assert len(owners) > 100
    assert {len(who) for who in owners.values()} == {1}


def test_neighbours_are_shuffled_far_apart() -> None:
    """Consecutive samples of a shard, and shards per batch: close to a full permutation, far from storage order."""
    plan = TrainPlan([100] * 200, 16, 0)
    order = np.array([draw.sample for draw in draws(plan, 20_000)])
    place = np.argsort(order)
    distance = np.abs(np.diff(place))
    assert np.median(distance) >= 4 * 128
    assert (distance < 16).mean() < 2 * 16 / 20_000 * 2, "neighbours meet in a batch hardly more often than any two do"
    shards_per_batch = np.array([len(set(batch // 100)) for batch in order.reshape(-1, 16)]).mean()
    full_shards = np.array([len(set(b // 100)) for b in np.random.default_rng(0).permutation(20_000).reshape(-1, 16)])
    assert shards_per_batch > 0.95 * full_shards.mean()
    small = np.array([draw.sample for draw in draws(TrainPlan([3000], 16, 0), 3000)])[:2992].reshape(-1, 16)
    assert np.std(small, axis=1).mean() > 0.9 * 3000 / 12**0.5, "a batch reaches over the whole of a single shard"


def test_a_huge_plan_starts_anywhere_at_once() -> None:
    """In all lanes, across the boundary of two epochs. For timings see benchmarks/shuffling.py."""
    tracemalloc.start()
    plan = TrainPlan([1000] * 100_000, 4, 0)  # 10^8 samples
    found = [draw for number in range(25 * 10**6 - 64, 25 * 10**6 + 64) for draw in plan.micro_batch(number)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(found)) == 512 and {draw.epoch for draw in found} == {0, 1}
    assert peak < 200e6


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_global_batches_do_not_depend_on_the_topology(
    samples: int, batch: int, ranks: int, accumulation: int, first: int
) -> None:
    def global_batches(world: int, turns: int, size: int) -> list[list[PlannedSample]]:
        plan = TrainPlan([5] * samples, size, 7, lanes=8)
        per_rank = [list(MicroBatchNumbers(first_step=first, last_step=first + 3, rank=rank, world_size=world,
                                           accumulation=turns)) for rank in range(world)]
        assert {len(numbers) for numbers in per_rank} == {3 * turns}  # equal counts on all ranks
        steps = []
        for step in range(3):
            numbers = sorted(n for mine in per_rank for n in mine[step * turns : (step + 1) * turns])
            steps.append([draw for number in numbers for draw in plan.micro_batch(number)])
        return steps

    together = global_batches(1, 1, batch * ranks * accumulation)
    assert together == global_batches(ranks, accumulation, batch) == global_batches(accumulation, ranks, batch)
    assert together == global_batches(1, ranks * accumulation, batch)


def test_any_position_is_computed_without_the_ones_before() -> None:
    plan = TrainPlan([125] * 8, 3, 1)
    everything = [plan.micro_batch(number) for number in range(1200)]
    assert plan.micro_batch(1111) == everything[1111]
    assert plan.micro_batch(333) == [*draws(plan, 1002)[999:]]  # straddles the seam of two epochs
    assert {draw.epoch for draw in plan.micro_batch(333)} == {0, 1}


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(plan.sample_at(epoch * 30 + place).sample for place in range(30))
              for plan in (TrainPlan([10] * 3, 1, seed) for seed in range(3)) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
def test_validation_covers_every_sample_once(samples: int, size: int, ranks: int) -> None:
    groups = validation_groups(samples, size)
    assert [number for group in groups for number in group] == list(range(samples))
    assert all(1 <= len(group) <= size for group in groups) and all(len(group) == size for group in groups[:-1])
    shares = [groups[rank::ranks] for rank in range(ranks)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sizes_that_do_not_divide_are_refused_with_the_legal_ones() -> None:
    assert accumulation_for(16, 2, 4) == 2
    with pytest.raises(ConfigError, match=r"global_batch_size is 16, legal: a multiple of .* = 3 x 2 = 6"):
        accumulation_for(16, 3, 2)
    with pytest.raises(ConfigError, match="no samples"):
        TrainPlan([], 1, 0)


def test_spans_longer_than_any_lane_are_whole_lanes_and_reach_over_shards() -> None:
    whole, longer = (TrainPlan([4, 6, 1], 4, 0, lanes=2, span_samples=span) for span in (6, 10**30))
    assert draws(whole, 50) == draws(longer, 50)
    short_shards = TrainPlan([1] * 40, 4, 0, lanes=2, span_samples=16)
    assert {short_shards.span(position).size for position in range(40)} == {16, 4}


def test_the_order_is_a_contract() -> None:
    """Changing these numbers changes the data of every running job: never update them silently."""
    plan = TrainPlan([4, 6], 4, 0, lanes=2, span_samples=3)
    assert [tuple(draw)[:2] for draw in draws(plan, 5)] == [(0, 8), (0, 3), (0, 9), (0, 4), (0, 7)]
