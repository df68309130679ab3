"""Multi-scale deformable attention in plain torch, trainable on any device (Deformable DETR, arXiv:2010.04159).

The adapter uses it with one level, the pixel decoder with three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import ConfigError

Sampling = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]  # see `deformable_sampling`


def pixel_centers(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Centres of all pixels of all levels as (x, y) in 0..1, level by level, row-major: float32 [sum HW, 2]."""
    levels = []
    for height, width in spatial_shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack((columns, rows), dim=-1).flatten(0, 1))  # [HW, 2]
    return torch.cat(levels)


def deformable_sampling(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples, with zeros outside the maps (arXiv:2010.04159 sec. 4.1, eq. 3).

    value      [B, sum HW, heads, d]         tokens of all levels, row-major
    locations  [B, Lq, heads, levels, P, 2]  (x, y) in 0..1
    weights    [B, Lq, heads, levels, P]     attention weights, summing to 1 over (levels, P)
    returns    [B, Lq, heads * d], in the common dtype of the inputs
    """
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [levels, B * heads, P, Lq, 2]
    weights = weights.permute(3, 4, 0, 2, 1).flatten(2, 3).unsqueeze(3)  # [levels, P, B * heads, 1, Lq]
    total = value.new_zeros(batch * heads, width, queries)
    tokens_per_level = value.split([height * width for height, width in spatial_shapes], dim=1)
    for tokens, shape, grid, point_weights in zip(tokens_per_level, spatial_shapes, grids, weights, strict=True):
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, width, *shape)  # [B * heads, d, H, W]
        samples = F.grid_sample(maps, grid, align_corners=False)  # [B * heads, d, P, Lq]
        # Point by point: all products at once would write and read a tensor of the samples' size for a single sum.
        for sample, weight in zip(samples.unbind(2), point_weights, strict=True):
            total = torch.addcmul(total, sample, weight)
    return total.view(batch, heads * width, queries).transpose(1, 2)


def gathered_sampling(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """`deformable_sampling`, up to float rounding, without `grid_sample`: TensorRT compiles that wrongly here.

    The four pixels around each position are gathered from all tokens of the batch at once; those outside of the map are
    replaced by ones inside and weigh nothing. Needs memory for all samples; only for graphs of other runtimes.
    """
    batch, tokens_per_image, heads, width = value.shape
    starts = [0]
    for rows, columns in spatial_shapes:
        starts.append(starts[-1] + rows * columns)
    table = [side for (rows, columns), start in zip(spatial_shapes, starts, strict=False)
             for side in (columns, rows, start)]
    geometry = torch.stack([torch.full((), number, dtype=torch.int64, device=value.device) for number in table])
    geometry = geometry.view(-1, 1, 3)  # [levels, 1, (columns, rows, first token)]
    sizes, row_length, start = geometry[..., :2].to(locations.dtype), geometry[..., 0], geometry[..., 2]
    first_tokens = torch.arange(batch, device=value.device).view(-1, 1, 1, 1, 1) * tokens_per_image + start
    head = torch.arange(heads, device=value.device).view(-1, 1, 1)

    positions = locations * sizes - 0.5  # in pixels from the centre of the first one
    low = positions.floor()
    neighbours = []  # (x, y) of the pixel before and after, and its share in the sample: [B, Lq, heads, levels, P] each
    for pixel in (low, low + 1):
        share = torch.where((pixel >= 0) & (pixel < sizes), 1 - (positions - pixel).abs(), 0)
        inside = torch.minimum(pixel.clamp(min=0), sizes - 1).to(torch.int64)
        neighbours.append((*inside.unbind(-1), *share.unbind(-1)))
    tokens = value.reshape(-1, width)  # [B * sum HW * heads, d]
    total: Tensor | float = 0.0
    for _, y, _, y_share in neighbours:
        row, row_weight = first_tokens + y * row_length, weights * y_share
        for x, _, x_share, _ in neighbours:
            index = (row + x) * heads + head
            samples = tokens.index_select(0, index.flatten()).view(*index.shape, width)
            total = total + samples * (row_weight * x_share).unsqueeze(-1)  # [B, Lq, heads, levels, P, d]
    assert isinstance(total, Tensor)
    return total.sum(dim=(3, 4)).flatten(2)


@contextmanager
def sampling_by_gathers(model: nn.Module) -> Iterator[None]:
    """Inside, all deformable attention of a model uses `gathered_sampling`."""
    before = [(layer, layer.sample) for layer in _layers(model)]
    for layer, _ in before:
        layer.sample = gathered_sampling
    try:
        yield
    finally:
        for layer, sample in before:
            layer.sample = sample


def sample_by_gathers(model: nn.Module) -> None:
    """Let all deformable attention of a model use `gathered_sampling`, whose gradients can be added in a fixed order on
    CUDA; those of `grid_sample` cannot."""
    for layer in _layers(model):
        layer.sample = gathered_sampling


def sample_by_triton(model: nn.Module, device: torch.device) -> None:
    """Let all deformable attention of a model use the kernels of `deform_attn_triton`. Raises ConfigError where there
    is none, or no CUDA or Triton."""
    from trainer.models.deform_attn_triton import is_installed, is_interpreted, triton_sampling

    layers = _layers(model)
    if not layers:
        raise ConfigError("train.triton is true, legal with decoder_head.type m2f: only that has deformable attention")
    if not is_installed() or (device.type != "cuda" and not is_interpreted()):
        raise ConfigError(f"train.triton is true on device {device.type}, Triton is "
                          f"{'' if is_installed() else 'not '}installed; legal: on cuda, with the package triton, "
                          "which comes with torch for CUDA on Linux")
    for layer in layers:
        layer.sample = triton_sampling


def _layers(model: nn.Module) -> list[MSDeformAttn]:
    return [module for module in model.modules() if isinstance(module, MSDeformAttn)]


class MSDeformAttn(nn.Module):
    """Every query samples `n_points` learned positions per head and level around its reference point.

    d_model   width of queries, value tokens and output
    ratio     width of the projected values, as a fraction of d_model; must be divisible by n_heads
    """

    sample: Sampling = staticmethod(deformable_sampling)  # changed by `sampling_by_gathers` and `sample_by_triton`

    def __init__(self, d_model: int, n_levels: int, n_heads: int, n_points: int, ratio: float) -> None:
        super().__init__()
        value_dim = int(d_model * ratio)
        if value_dim == 0 or value_dim % n_heads:
            raise ConfigError(f"deformable attention: the value width {value_dim} (= {ratio} * {d_model}) cannot be "
                              f"split into {n_heads} heads, legal: a multiple of {n_heads}")
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, value_dim)
        self.output_proj = nn.Linear(value_dim, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head h samples in direction 2 pi h / heads, point p at distance p + 1 pixels, all with equal weights."""
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)  # [heads, 2]
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32).view(1, 1, -1, 1)
        offsets = (direction[:, None, None] * distance).expand(-1, self.n_levels, -1, -1)  # [heads, levels, P, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference_points: Tensor, value_tokens: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Attend, always in float32: in half precision, sampling positions would be off by a visible part of a pixel.

        query             [B, Lq, D]
        reference_points  [B or 1, Lq, levels, 2]  (x, y) in 0..1
        value_tokens      [B, sum HW, D]
        spatial_shapes    (H, W) of each level, as Python ints so that nothing synchronises with the device
        returns           float32 [B, Lq, D]
        """
        with torch.autocast(query.device.type, enabled=False):
            query, value_tokens = query.float(), value_tokens.float()
            heads, levels, points = self.n_heads, self.n_levels, self.n_points
            value = self.value_proj(value_tokens).unflatten(-1, (heads, -1))  # [B, sum HW, heads, d]
            offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
            weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(dim=-1)
            weights = weights.unflatten(-1, (levels, points))  # [B, Lq, heads, levels, P]
            # Filled on the device: torch.tensor([...], device=...) would copy from the host and synchronise.
            sizes = torch.stack([offsets.new_full((), side) for h, w in spatial_shapes for side in (w, h)])
            locations = reference_points.float()[:, :, None, :, None] + offsets / sizes.view(levels, 1, 2)
            return self.output_proj(self.sample(value, spatial_shapes, locations, weights))
