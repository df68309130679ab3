"""Differences to a pretrained ViT are added to the right one only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shards.errors import ConfigError
from trainer.models.deltas import with_deltas

SHA = "0123456789abcdef" * 4


def state(seed: int, scale: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in (("a", (60, 50)), ("b", (70,)))}


def add(base: dict[str, Tensor], deltas: dict[str, Tensor], told: str | None = None) -> dict[str, Tensor]:
    return with_deltas(base, deltas, what="the differences", base_sha256=SHA, told_sha256=told)


def fine_tuned(base: dict[str, Tensor], change: float, seed: int = 1) -> dict[str, Tensor]:
    noise = state(seed, scale=1.0)
    return {name: tensor + change * 0.05 * noise[name] for name, tensor in base.items()}


def differences(tuned: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tuned[name] - base[name] for name in base}


@given(st.integers(0, 1000), st.floats(1e-6, 0.3), st.floats(1e-3, 10.0))
def test_the_right_base_is_proven_and_gives_the_fine_tuned_weights(seed: int, change: float, scale: float) -> None:
    base = state(seed, scale)
    tuned = fine_tuned(base, change * scale / 0.05, seed + 1)
    found = add(base, differences(tuned, base))
    torch.testing.assert_close(found, tuned, rtol=1e-6, atol=1e-9 * scale)


@given(st.integers(0, 1000), st.floats(1e-6, 0.3))
def test_another_base_is_refused(seed: int, change: float) -> None:
    base = state(seed)
    deltas = differences(fine_tuned(base, change, seed + 1), base)
    with pytest.raises(ConfigError, match=r"were made from another ViT .*\d+ of \d+ sums had to be rounded"):
        add(state(seed + 2), deltas)


def test_even_a_base_that_was_only_rounded_or_trained_on_is_refused() -> None:
    base = state(0)
    deltas = differences(fine_tuned(base, 0.01), base)
    for other in (fine_tuned(base, 1e-3, 3), {name: tensor.half().float() for name, tensor in base.items()}):
        with pytest.raises(ConfigError, match="were made from another ViT"):
            add(other, deltas)


def test_what_cannot_be_proven_must_be_told() -> None:
    base = state(0)
    halved = {name: tensor.half() for name, tensor in differences(fine_tuned(base, 0.01), base).items()}
    with pytest.raises(ConfigError, match=rf"do not prove .*load\.base_sha256={SHA[:16]}"):
        add(base, halved)
    told = add(base, halved, told=SHA[:16].upper())
    assert told["a"].dtype == torch.float32 and torch.equal(told["a"], base["a"] + halved["a"].float())
    with pytest.raises(ConfigError, match=f"load.base_sha256 is {'fedc' * 4}, but the configured backbone has {SHA}"):
        add(base, halved, told="fedc" * 4)


@pytest.mark.parametrize("change, message", [
    (lambda deltas: deltas.pop("b"), "missing: b"),
    (lambda deltas: deltas.update(c=torch.zeros(1)), "unexpected: c"),
    (lambda deltas: deltas.update(b=torch.zeros(71)), r"of another shape: b \(71,\) instead of \(70,\)"),
    (lambda deltas: deltas.update(state(5)), "too large to be differences"),
    (lambda deltas: deltas.update(b=torch.full((70,), torch.nan)), "too large to be differences: their norm is nan"),
])
def test_what_does_not_fit_is_refused_even_if_told(change: Any, message: str) -> None:
    base = state(0)
    deltas = differences(fine_tuned(base, 0.01), base)
    change(deltas)
    for told in (None, SHA[:16]):
        with pytest.raises(ConfigError, match=message):
            add(base, deltas, told)
