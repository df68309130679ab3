"""Multi-scale deformable attention in plain torch, trainable on any device (Deformable DETR, arXiv:2010.04159).

The adapter uses it with one level, the pixel decoder with three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import ConfigError


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


class MSDeformAttn(nn.Module):
    """Every query samples `n_points` learned positions per head and level around its reference point.

    d_model   width of queries, value tokens and output
    ratio     width of the projected values, as a fraction of d_model; must be divisible by n_heads
    """

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
            return self.output_proj(deformable_sampling(value, spatial_shapes, locations, weights))
