"""The order of samples: exactly once an epoch, the same global batches at any topology, directly computable."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.plan import Draw, TrainPlan, accumulation_for, epoch_order, micro_batch_numbers, validation_samples


def draws(plan: TrainPlan, count: int) -> list[Draw]:
    """The first samples of the endless sequence."""
    batches = -(-count // plan.micro_batch_size)
    return [draw for number in range(batches) for draw in plan.micro_batch(number)][:count]


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_sample_exactly_once_per_epoch(samples: int, batch: int, seed: int, epochs: int) -> None:
    plan = TrainPlan(num_samples=samples, micro_batch_size=batch, seed=seed)
    seen = Counter(draws(plan, epochs * samples))
    assert seen == Counter(Draw(epoch, sample) for epoch in range(epochs) for sample in range(samples))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_global_batches_do_not_depend_on_the_topology(
    samples: int, batch: int, ranks: int, accumulation: int, first: int
) -> None:
    def global_batches(world: int, turns: int, size: int) -> list[list[Draw]]:
        plan = TrainPlan(num_samples=samples, micro_batch_size=size, seed=7)
        per_rank = [list(micro_batch_numbers(first, first + 3, rank, world, turns)) for rank in range(world)]
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
    plan = TrainPlan(num_samples=1000, micro_batch_size=3, seed=1)
    everything = [plan.micro_batch(number) for number in range(1200)]
    assert plan.micro_batch(1111) == everything[1111]
    assert plan.micro_batch(333) == [*draws(plan, 1002)[999:]]  # straddles the seam of two epochs
    assert {draw.epoch for draw in plan.micro_batch(333)} == {0, 1}


def test_epochs_and_seeds_differ() -> None:
    orders = {epoch_order(30, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 60), st.integers(1, 9))
def test_validation_covers_every_sample_once(samples: int, ranks: int) -> None:
    shares = [list(validation_samples(samples, rank, ranks)) for rank in range(ranks)]
    assert sorted(number for share in shares for number in share) == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sizes_that_do_not_divide_are_refused_with_the_legal_ones() -> None:
    assert accumulation_for(16, 2, 4) == 2
    with pytest.raises(ConfigError, match=r"global_batch_size is 16, legal: a multiple of .* = 3 x 2 = 6"):
        accumulation_for(16, 3, 2)
    with pytest.raises(ConfigError, match="no samples"):
        TrainPlan(num_samples=0, micro_batch_size=1, seed=0)


def test_the_order_is_a_contract() -> None:
    """A change of these numbers changes every running job's data: bump nothing silently."""
    plan = TrainPlan(num_samples=10, micro_batch_size=4, seed=0)
    assert [tuple(draw) for draw in draws(plan, 5)] == [(0, 4), (0, 6), (0, 2), (0, 7), (0, 3)]
