"""Triton's kernels for deformable attention on the CPU, by its interpreter: run with TRITON_INTERPRET=1 (see
tests/unit/test_trainer_models_deform_attn.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shards.errors import ConfigError
from tests.unit.test_trainer_models_deform_attn import SIDES, layer_with_inputs
from trainer.models import deform_attn_triton as kernels
from trainer.models.deform_attn import deformable_sampling, sample_by_triton


def with_gradients(sample: Any, *tensors: Any, seed: int) -> list[Tensor]:
    """The samples, and the gradients of a random linear function of them."""
    value, shapes, locations, weights = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    found = sample(leaves[0], shapes, leaves[1], leaves[2])
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (found * direction.to(found.dtype)).sum().backward()
    return [found.detach(), *(leaf.grad for leaf in leaves)]


@settings(max_examples=6, deadline=None)
@given(shapes=st.lists(SIDES, min_size=1, max_size=3), batch=st.integers(1, 2), heads=st.integers(1, 3),
       queries=st.integers(1, 40), width=st.integers(1, 9), points=st.integers(1, 3), spread=st.floats(0.2, 4),
       seed=st.integers(0, 2**31))
def test_the_kernels_compute_what_grid_sample_does(shapes: list[tuple[int, int]], batch: int, heads: int,
                                                   queries: int, width: int, points: int, spread: float,
                                                   seed: int) -> None:
    """Against float64, forward and backward: inside the maps, across their edges and far outside."""
    generator = torch.Generator().manual_seed(seed)
    locations = 0.5 + spread * (torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator) - 0.5)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=generator)
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=generator)
    found = with_gradients(kernels.triton_sampling, value, shapes, locations, weights, seed=seed)
    exact = with_gradients(deformable_sampling, value.double(), shapes, locations.double(), weights.double(), seed=seed)
    ours = with_gradients(deformable_sampling, value, shapes, locations, weights, seed=seed)
    for name, tensor, expected, torchs in zip(("samples", "value", "locations", "weights"), found, exact, ours,
                                              strict=True):
        error = float((tensor - expected).abs().max())  # rounding of a position can move it across a pixel's centre
        assert error <= max(1e-5 * float(expected.abs().max()), 2 * float((torchs - expected).abs().max())), name


def test_layers_use_the_kernels_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, given = layer_with_inputs()

    def step() -> list[Tensor]:
        attention.zero_grad()
        found = attention(*given)
        found.square().sum().backward()
        return [found.detach(), *(parameter.grad.clone() for parameter in attention.parameters())]

    before = step()
    sample_by_triton(attention, torch.device("cpu"))
    assert attention.sample is kernels.triton_sampling
    for tensor, expected in zip(step(), before, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"train\.triton is true, legal with decoder_head.type m2f"):
        sample_by_triton(torch.nn.Linear(2, 2), torch.device("cuda"))
    monkeypatch.setattr(kernels, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="on device cpu, Triton is installed; legal: on cuda"):
        sample_by_triton(attention, torch.device("cpu"))
    monkeypatch.setattr(kernels, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match="Triton is not installed; legal: on cuda, with the package triton"):
        sample_by_triton(attention, torch.device("cuda"))
