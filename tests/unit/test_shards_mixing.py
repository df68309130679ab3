"""Mixtures: exact over each period, to within one sample up to any position, and each source's own epochs whole."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.mixing import LONGEST_PERIOD, Mixture, whole_weights
from shards.plan import MicroBatchNumbers, PlannedSample, TrainPlan

WEIGHTS = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 99).map(lambda hundredths: hundredths / 100)),
                   min_size=1, max_size=7)


@given(WEIGHTS, st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_shares_are_within_one_sample_of_exact_up_to_any_position(weights: list[float], length: int) -> None:
    mixture, exact = Mixture(weights), [Fraction(repr(weight)) for weight in weights]
    positions = 2 * min(mixture.period, 1000) + 3
    turns = [mixture.locate(position) for position in range(positions)]
    window, places = min(length, positions), np.arange(positions + 1)
    for source, weight in enumerate(exact):
        share = weight / sum(exact)
        count = np.cumsum([0, *(turn.source == source for turn in turns)])
        error = count * share.denominator - places * share.numerator  # of the count, times the denominator
        assert (abs(error) < share.denominator).all()
        assert (abs(error[window:] - error[: positions + 1 - window]) < 2 * share.denominator).all()
        if 2 * mixture.period <= positions:
            assert set(count[mixture.period :] - count[: -mixture.period]) == {mixture.counts[source]}
    seen = Counter[int]()
    for turn in turns:
        assert turn.position == seen[turn.source], "a source's own positions follow each other"
        seen[turn.source] += 1


@given(WEIGHTS, st.integers(0, 10**15))
@settings(max_examples=40, deadline=None)
def test_any_position_is_computed_without_the_ones_before(weights: list[float], position: int) -> None:
    mixture = Mixture(weights)
    turn, later = mixture.locate(position), mixture.locate(position + mixture.period)
    assert later == (turn.source, turn.position + mixture.counts[turn.source])
    share = Fraction(mixture.counts[turn.source], mixture.period)
    assert abs(turn.position - position * share) < 1


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4),
       st.integers(0, 99), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_each_source_is_seen_exactly_once_in_each_of_its_epochs(sources: list[tuple[int, int, int]], seed: int,
                                                                lanes: int) -> None:
    mixture = Mixture([weight for *_, weight in sources])
    plans = [TrainPlan([samples] * shards, 3, seed + number, span_samples=3, dealing=mixture.lanes_of(number, lanes))
             for number, (shards, samples, _) in enumerate(sources)]
    drawn: list[list[PlannedSample]] = [[] for _ in sources]
    for position in range(200):
        turn = mixture.locate(position)
        drawn[turn.source].append(plans[turn.source].sample_at(turn.position))
    for plan, draws in zip(plans, drawn, strict=True):
        epochs = len(draws) // plan.epoch_size
        whole = Counter((draw.epoch, draw.sample) for draw in draws[: epochs * plan.epoch_size])
        assert whole == Counter((epoch, sample) for epoch in range(epochs) for sample in range(plan.num_samples))
        assert len(set(draws)) == len(draws)
        for number in range(0, len(draws), 7):
            assert plan.sample_at(number) == draws[number]
            assert draws[number].sample in plan.samples(plan.span(number))


@given(WEIGHTS, st.integers(1, 40), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_a_lane_holds_what_is_read_at_its_positions_of_the_mixture(weights: list[float], lanes: int, first: int
                                                                   ) -> None:
    mixture = Mixture(weights)
    dealt = [mixture.lanes_of(source, lanes) for source in range(len(weights))]
    held: dict[int, list[int]] = {}
    for position in range(first, first + 150):
        turn = mixture.locate(position)
        dealing = dealt[turn.source]
        lane, place = dealing.place(turn.position)
        assert lane == position % lanes
        before = dealing.before(turn.position)
        assert before.sum() == turn.position and before[lane] == place
        last = held.setdefault(turn.source, before.tolist())
        assert last[lane] == place, "each position of the source since the first counts"
        last[lane] += 1


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [3, 1, 1], [0.05, 0.95]])
@pytest.mark.parametrize(("batch", "ranks", "workers"), [(1, 1, 1), (2, 2, 2), (1, 4, 4), (2, 1, 8)])
def test_a_span_belongs_to_one_worker_when_all_divide_the_lanes(weights: list[float], batch: int, ranks: int,
                                                                workers: int) -> None:
    mixture = Mixture(weights)
    plans = [TrainPlan([7] * 30, batch, 3, span_samples=5, dealing=mixture.lanes_of(source, 16))
             for source in range(len(weights))]
    owners: dict[object, set[tuple[int, int]]] = {}
    for position in range(1600):
        turn, number = mixture.locate(position), position // batch
        owner = number % ranks, number // ranks % workers
        owners.setdefault((turn.source, plans[turn.source].span(turn.position)), set()).add(owner)
    assert len(owners) > 100
    assert {len(who) for who in owners.values()} == {1}


@given(WEIGHTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_global_batches_do_not_depend_on_the_topology(
    weights: list[float], batch: int, ranks: int, accumulation: int, first: int
) -> None:
    mixture = Mixture(weights)

    def global_batches(world: int, turns: int, size: int) -> list[list[tuple[int, int]]]:
        per_rank = [list(MicroBatchNumbers(first_step=first, last_step=first + 3, rank=rank, world_size=world,
                                           accumulation=turns)) for rank in range(world)]
        steps = [sorted(n for mine in per_rank for n in mine[step * turns : (step + 1) * turns]) for step in range(3)]
        return [[mixture.locate(position) for number in numbers
                 for position in range(number * size, (number + 1) * size)] for numbers in steps]

    together = global_batches(1, 1, batch * ranks * accumulation)
    assert together == global_batches(ranks, accumulation, batch) == global_batches(accumulation, ranks, batch)


def test_weights_are_the_decimal_numbers_they_are_written_as() -> None:
    assert whole_weights([0.7, 0.3]) == [7, 3]
    assert whole_weights([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_weights([4, 2.0, 6]) == [2, 1, 3]
    assert whole_weights([1e-5, 2e-5]) == [1, 2]
    assert whole_weights([118287, 20210]) == [118287, 20210]
    assert whole_weights([3.5]) == [1]


def test_weights_that_cannot_be_are_refused() -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight is .*, legal: above 0"):
            whole_weights([1.0, wrong])
    with pytest.raises(ConfigError, match="are 0.333333, 0.666668, which is 333333 : 666668: they repeat after 1000001 "
                                          f"samples, legal: at most {LONGEST_PERIOD}; round them"):
        Mixture([0.333333, 0.666668])


def test_the_pattern_is_a_contract() -> None:
    """Changing it changes the data of every running job: never update it silently."""
    mixture = Mixture([0.5, 0.3, 0.2])
    assert [mixture.locate(position).source for position in range(20)] == 2 * [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert [mixture.locate(position) for position in (12, 13)] == [(0, 6), (2, 2)]
    dealing = mixture.lanes_of(1, 4)  # positions 1, 5, 7, 11, 15, 17 of the mixture
    assert [dealing.place(position) for position in range(6)] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2), (1, 2)]
    plan = TrainPlan([4, 6], 4, 0, span_samples=3, dealing=dealing)
    assert [tuple(plan.sample_at(position)[:2]) for position in range(5)] == [(0, 8), (0, 9), (0, 3), (0, 4), (0, 0)]
