"""Sampling by gathers, for the graphs of other runtimes, and by Triton kernels equals sampling by `grid_sample`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import REPOSITORY
from trainer.models.deform_attn import (
    MSDeformAttn,
    deformable_sampling,
    gathered_sampling,
    pixel_centers,
    sampling_by_gathers,
)

SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def inputs(shapes: list[tuple[int, int]], locations: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """value and weights for `locations` [B, Lq, heads, levels, P, 2]"""
    generator = torch.Generator().manual_seed(seed)
    batch, queries, heads, levels, points, _ = locations.shape
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, 4, generator=generator)
    weights = torch.rand(batch, queries, heads, levels * points, generator=generator).softmax(-1)
    return value, weights.view(batch, queries, heads, levels, points)


@settings(max_examples=60, deadline=None)
@given(st.lists(SIDES, min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3), st.floats(0.2, 4), st.integers(0))
def test_gathers_sample_what_grid_sample_does(shapes: list[tuple[int, int]], batch: int, heads: int, spread: float,
                                              seed: int) -> None:
    """Inside the maps, across their edges and far outside, for any maps."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    locations = 0.5 + spread * (torch.rand(batch, 5, heads, len(shapes), 2, 2, generator=generator) - 0.5)
    value, weights = inputs(shapes, locations)
    torch.testing.assert_close(gathered_sampling(value, shapes, locations, weights),
                               deformable_sampling(value, shapes, locations, weights), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("location", [(0.0, 0.0), (1.0, 1.0), (0.5, 1.0), (-1.0, 0.5), (0.5, 7.0), (-1e6, 1e6)],
                         ids=str)
def test_what_lies_outside_of_a_map_contributes_nothing(location: tuple[float, float]) -> None:
    """Compared with the definition: the sum over all pixels of the products of two tents."""
    rows, columns = 3, 5
    locations = torch.tensor(location).expand(1, 1, 1, 1, 1, 2)
    value, _ = inputs([(rows, columns)], locations)
    x, y = location[0] * columns - 0.5, location[1] * rows - 0.5
    expected = sum(max(0.0, 1 - abs(row - y)) * max(0.0, 1 - abs(column - x)) * value[0, row * columns + column, 0]
                   for row in range(rows) for column in range(columns))
    found = gathered_sampling(value, [(rows, columns)], locations, torch.ones(1, 1, 1, 1, 1))
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-5, atol=1e-6)
    assert bool(found.any()) == (max(map(abs, location)) <= 1 and min(location) >= 0)


def layer_with_inputs() -> tuple[MSDeformAttn, tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]]:
    torch.manual_seed(0)
    shapes = [(4, 6), (2, 3)]
    attention = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3, ratio=0.5)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    centers = pixel_centers(shapes, torch.device("cpu"))[None, :, None].expand(-1, -1, 2, -1)
    query, tokens = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    return attention, (query, centers, tokens, shapes)


def test_a_model_samples_by_gathers_only_inside_of_the_context() -> None:
    attention, given = layer_with_inputs()
    expected = attention(*given)
    model = torch.nn.Sequential(attention)
    with sampling_by_gathers(model):
        assert attention.sample is gathered_sampling
        torch.testing.assert_close(attention(*given), expected, rtol=1e-5, atol=1e-5)
    assert attention.sample is deformable_sampling
    with pytest.raises(RuntimeError, match="inside"), sampling_by_gathers(model):
        raise RuntimeError("inside")
    assert attention.sample is deformable_sampling


def test_triton_kernels_sample_what_grid_sample_does() -> None:
    """In a process of its own: Triton decides when it is first imported whether it interprets kernels on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
                           REPOSITORY / "tests/support/triton_kernels.py"], env={**os.environ, "TRITON_INTERPRET": "1"},
                          cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
