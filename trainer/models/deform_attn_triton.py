"""`deformable_sampling` as Triton kernels, forward and backward, for CUDA: samples are never written to memory.

Each program computes one tile, BLOCK queries of one head of one image, in float32, one level per launch:

    forward   out[q] += sum over points, corners of  weight * share * value[corner]
    backward  d value[corner] += weight * share * d out[q]                             (atomic additions)
              d weight = sum over corners of share * <value[corner], d out[q]>
              d x, d y = weight * sum over corners of d share / d x, y * <value[corner], d out[q]>

`share` is bilinear: (1 - |x - column|) (1 - |y - row|) for the four pixels around (x, y), none outside of the map. At a
whole x or y the derivative is that of the pixels from there on, as in `grid_sample`. Atomic additions come in any
order, so the last bits of value's gradient differ from run to run, as with `grid_sample` on CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CUDA brings it along; others need not have it
    triton = None

_BLOCK = 32  # queries per program


def is_installed() -> bool:
    """Whether Triton can be imported."""
    return triton is not None


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python on the CPU, for tests (TRITON_INTERPRET=1)."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def triton_sampling(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """`deformable_sampling`, up to float rounding, for float32 tensors; see there for the shapes."""
    found: Tensor = _Sampling.apply(value, locations, weights, tuple(spatial_shapes))
    return found


class _Sampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor,
                shapes: tuple[tuple[int, int], ...]) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        batch, _, heads, width = value.shape
        out = value.new_zeros(batch, locations.shape[1], heads * width)
        _launch(_forward, shapes, (value, locations, weights, out))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, locations, weights = ctx.saved_tensors
        found = (torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights))
        _launch(_backward, ctx.shapes, (value, locations, weights, gradients[0].contiguous(), *found))
        return (*found, None)


def _launch(kernel: Any, shapes: tuple[tuple[int, int], ...], tensors: tuple[Tensor, ...]) -> None:
    value, locations = tensors[:2]
    batch, tokens, heads, width = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    first = 0
    with torch.cuda.device_of(value):  # Triton launches on the current one
        for level, (rows, columns) in enumerate(shapes):
            kernel[(triton.cdiv(queries, _BLOCK), batch * heads)](
                *tensors, level, first, rows, columns, tokens, queries, heads, levels, POINTS=points, WIDTH=width,
                BLOCK=_BLOCK, PADDED=triton.next_power_of_2(width))
            first += rows * columns


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _corner(x: Any, y: Any, dx: tl.constexpr, dy: tl.constexpr, rows: Any, columns: Any) -> Any:
    """One of the four pixels around (x, y): (number within the level, whether it is inside, horizontal and vertical
    share)."""
    column, row = tl.floor(x) + dx, tl.floor(y) + dy
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    horizontal = x - tl.floor(x) if dx else 1.0 - (x - tl.floor(x))
    vertical = y - tl.floor(y) if dy else 1.0 - (y - tl.floor(y))
    return (row * columns + column).to(tl.int32), inside, horizontal, vertical


@_jit
def _forward(value: Any, locations: Any, weights: Any, out: Any, level: Any, first: Any, rows: Any, columns: Any,
             tokens: Any, queries: Any, heads: Any, levels: Any, POINTS: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK: tl.constexpr, PADDED: tl.constexpr) -> None:
    """Adds one level's samples to `out`."""
    query, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    image, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    exists, used = query < queries, channel < WIDTH
    row = (image * queries + query) * heads + head  # of the tensors per query and head
    tile = row[:, None] * WIDTH + channel[None, :]
    mask = exists[:, None] & used[None, :]
    total = tl.load(out + tile, mask=mask, other=0.0)
    for point in tl.static_range(POINTS):
        place = (row * levels + level) * POINTS + point
        x = tl.load(locations + 2 * place, mask=exists, other=0.0) * columns - 0.5
        y = tl.load(locations + 2 * place + 1, mask=exists, other=0.0) * rows - 0.5
        weight = tl.load(weights + place, mask=exists, other=0.0)
        for corner in tl.static_range(4):
            pixel, inside, horizontal, vertical = _corner(x, y, corner % 2, corner // 2, rows, columns)
            token = (image * tokens + first + pixel) * heads + head
            sample = tl.load(value + token[:, None] * WIDTH + channel[None, :], mask=mask & inside[:, None], other=0.0)
            total += (weight * horizontal * vertical)[:, None] * sample
    tl.store(out + tile, total, mask=mask)


@_jit
def _backward(value: Any, locations: Any, weights: Any, out_gradient: Any, value_gradient: Any,
              locations_gradient: Any, weights_gradient: Any, level: Any, first: Any, rows: Any, columns: Any,
              tokens: Any, queries: Any, heads: Any, levels: Any, POINTS: tl.constexpr, WIDTH: tl.constexpr,
              BLOCK: tl.constexpr, PADDED: tl.constexpr) -> None:
    """Adds one level's part to `value_gradient`, and writes that of the other two."""
    query, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    image, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    exists, used = query < queries, channel < WIDTH
    row = (image * queries + query) * heads + head
    mask = exists[:, None] & used[None, :]
    gradient = tl.load(out_gradient + row[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)
    for point in tl.static_range(POINTS):
        place = (row * levels + level) * POINTS + point
        x = tl.load(locations + 2 * place, mask=exists, other=0.0) * columns - 0.5
        y = tl.load(locations + 2 * place + 1, mask=exists, other=0.0) * rows - 0.5
        weight = tl.load(weights + place, mask=exists, other=0.0)
        along_x, along_y, of_weight = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        for corner in tl.static_range(4):
            pixel, inside, horizontal, vertical = _corner(x, y, corner % 2, corner // 2, rows, columns)
            token = (image * tokens + first + pixel) * heads + head
            cells, reached = token[:, None] * WIDTH + channel[None, :], mask & inside[:, None]
            sample = tl.load(value + cells, mask=reached, other=0.0)
            product = tl.sum(sample * gradient, axis=1)
            of_weight += horizontal * vertical * product
            along_x += vertical * product if corner % 2 else -vertical * product
            along_y += horizontal * product if corner // 2 else -horizontal * product
            tl.atomic_add(value_gradient + cells, (weight * horizontal * vertical)[:, None] * gradient, mask=reached)
        tl.store(weights_gradient + place, of_weight, mask=exists)
        tl.store(locations_gradient + 2 * place, along_x * weight * columns, mask=exists)
        tl.store(locations_gradient + 2 * place + 1, along_y * weight * rows, mask=exists)
