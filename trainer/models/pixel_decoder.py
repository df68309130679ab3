"""Mask2Former's pixel decoder: a deformable encoder over three levels and one top-down step to stride 4.

See arXiv:2112.01527 sec. 3.2.2; the encoder is Deformable DETR's (arXiv:2010.04159). Parameter names equal the
reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.deform_attn import MSDeformAttn, pixel_centers
from trainer.models.recompute import RecomputingModule

NUM_LEVELS = 3
_NUM_POINTS = 4
_NUM_GROUPS = 32


def sine_position_code(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """2-D sine position encoding of a map's pixels, row-major: float32 [HW, channels]; the y half, then the x half.

    DETR's encoding (arXiv:2005.12872, appendix A.4) with positions normalised to (0, 2 pi].
    """
    half = channels // 2
    pair = torch.arange(half, dtype=torch.float32, device=device).div(2, rounding_mode="floor")
    divisor = 10000 ** (2 * pair / half)  # [half]
    codes = []
    for length in (height, width):
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angle = (position / (length + 1e-6) * (2 * math.pi))[:, None] / divisor  # [length, half]
        codes.append(torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1))
    y = codes[0][:, None].expand(-1, width, -1)
    x = codes[1][None].expand(height, -1, -1)
    return torch.cat((y, x), dim=-1).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; post-norm."""

    def __init__(self, dim: int, nheads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, NUM_LEVELS, nheads, _NUM_POINTS, ratio=1.0)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """x [B, sum HW, D], position [1, sum HW, D], reference_points [1, sum HW, 3, 2] -> new x."""
        x = self.norm1(x + self.self_attn(x + position, reference_points, x, spatial_shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class LayerStack(nn.Module):
    """The encoder's layers, nested because the reference's keys are `encoder.encoder.layers`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DeformableEncoder(RecomputingModule):
    """Deformable self-attention across three feature maps, coarse to fine."""

    def __init__(self, dim: int, nheads: int, ffn_dim: int, num_layers: int) -> None:
        super().__init__()
        self.level_encoding = nn.Parameter(torch.empty(NUM_LEVELS, dim))
        self.encoder = LayerStack([EncoderLayer(dim, nheads, ffn_dim) for _ in range(num_layers)])
        nn.init.normal_(self.level_encoding)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps: [B, D, H_l, W_l] per level -> the same shapes."""
        device, dim = maps[0].device, maps[0].shape[1]
        shapes = [(level.shape[2], level.shape[3]) for level in maps]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)  # [B, sum HW, D]
        position = torch.cat([sine_position_code(h, w, dim, device) + self.level_encoding[level]
                              for level, (h, w) in enumerate(shapes)])[None]
        reference_points = pixel_centers(shapes, device)[None, :, None].expand(-1, -1, NUM_LEVELS, -1)
        for layer in self.encoder.layers:
            x = self.run(layer, x, position, reference_points, shapes)
        levels = x.split([h * w for h, w in shapes], dim=1)
        return [tokens.transpose(1, 2).unflatten(2, shape)
                for tokens, shape in zip(levels, shapes, strict=True)]


class ConvGroupNorm(nn.Conv2d):
    """Convolution without bias, followed by group norm (a child module, as the keys require)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(_NUM_GROUPS, out_channels)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]"""
        return self.norm(super().forward(x))


def _input_conv(in_channels: int, hidden_dim: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, hidden_dim, 1)
    nn.init.xavier_uniform_(conv.weight)
    _zero_bias(conv)
    return nn.Sequential(conv, nn.GroupNorm(_NUM_GROUPS, hidden_dim))


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


class MSDeformAttnPixelDecoder(nn.Module):
    """Computes mask features at stride 4 and three encoded maps from the pyramid {"1".."4"} (fine to coarse).

    Always float32, with autocast off, as in the reference: attention masks are thresholded from its outputs.
    """

    def __init__(
        self, in_channels: Sequence[int], hidden_dim: int, *, nheads: int, ffn_dim: int, num_layers: int
    ) -> None:
        super().__init__()
        finest, *others = in_channels
        self.input_convs = nn.ModuleList(_input_conv(c, hidden_dim) for c in reversed(others))  # coarse to fine
        self.encoder = DeformableEncoder(hidden_dim, nheads, ffn_dim, num_layers)
        # Lists of one, because the reference's keys allow for more top-down steps.
        self.lateral_convs = nn.ModuleList([ConvGroupNorm(finest, hidden_dim, 1)])
        self.output_convs = nn.ModuleList([ConvGroupNorm(hidden_dim, hidden_dim, 3)])
        self.mask_feature = nn.Conv2d(hidden_dim, hidden_dim, 1)
        nn.init.kaiming_uniform_(self.mask_feature.weight, a=1)
        _zero_bias(self.mask_feature)

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Mask features [B, hidden, H/4, W/4] and maps [B, hidden, h, w] at strides 32, 16, 8; all float32."""
        with torch.autocast(features["1"].device.type, enabled=False):
            inputs = [features[name].float() for name in ("4", "3", "2")]
            multi_scale = self.encoder([conv(x) for conv, x in zip(self.input_convs, inputs, strict=True)])
            fine = self.lateral_convs[0](features["1"].float())
            fine = fine + F.interpolate(multi_scale[-1], size=fine.shape[-2:], mode="bilinear", align_corners=False)
            return self.mask_feature(F.relu(self.output_convs[0](fine))), multi_scale
