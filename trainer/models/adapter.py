"""DINOv3_Adapter: a ViT-Adapter (arXiv:2205.08534) without injectors, so that the ViT can stay frozen.

A small convolutional network (the spatial prior) produces tokens at strides 8, 16 and 32; in four extractors these
attend to the ViT's tokens by deformable attention; the result is a feature pyramid at strides 4, 8, 16 and 32.
Parameter names equal the reference's, so its released weights load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.model_config import SIZE_DIVISORS, AdapterConfig
from trainer.models.backbones.base import Backbone
from trainer.models.deform_attn import MSDeformAttn, pixel_centers
from trainer.models.recompute import RecomputingModule

_NUM_BLOCKS = 4  # one per tapped layer of the ViT


def _tokens(maps: Tensor) -> Tensor:
    """[B, D, H, W] -> [B, HW, D]"""
    return maps.flatten(2).transpose(1, 2)


def _maps(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, HW, D] -> [B, D, H, W]"""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drops the residual branch of random samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> same shape and expectation."""
        if not self.training or self.rate == 0:
            return x
        keep_rate = 1 - self.rate
        is_kept = torch.rand(x.shape[0], 1, 1, device=x.device) < keep_rate
        return x * (is_kept.to(x.dtype) / keep_rate)


class DepthwiseConv(nn.Module):
    """One depthwise 3x3 convolution shared by the maps at strides 8, 16 and 32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, 21 HW / 4, D]; height and width are those of the stride 16 map."""
        shapes = [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]
        levels = x.split([h * w for h, w in shapes], dim=1)
        # Contiguous, because otherwise the weight's gradient is channels-last, which DDP copies (and warns about).
        return torch.cat([_tokens(self.dwconv(_maps(level, *shape).contiguous()))
                          for level, shape in zip(levels, shapes, strict=True)], dim=1)


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution between its linear layers."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, 21 HW / 4, D] -> same shape."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), height, width)))


class Extractor(nn.Module):
    """Pyramid tokens attend to ViT tokens (arXiv:2205.08534 sec. 3.4)."""

    def __init__(self, dim: int, config: AdapterConfig) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 1, config.deform_num_heads, config.n_points, config.deform_ratio)
        self.ffn = ConvFFN(dim, int(dim * config.cffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop_path = DropPath(config.drop_path)

    def forward(self, c: Tensor, reference_points: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
        """c [B, 21 HW / 4, D], reference_points [1, 21 HW / 4, 1, 2], feat [B, HW, D] -> new c."""
        c = c + self.attn(self.query_norm(c), reference_points, self.feat_norm(feat), [(height, width)])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), height, width))


class InteractionBlock(nn.Module):
    """The extractor of one ViT layer; the last block has extra extractors on the same tokens."""

    def __init__(self, dim: int, config: AdapterConfig, num_extra: int) -> None:
        super().__init__()
        self.extractor = Extractor(dim, config)
        self.extra_extractors = nn.ModuleList(Extractor(dim, config) for _ in range(num_extra))

    def forward(self, c: Tensor, reference_points: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
        """Shapes as in `Extractor.forward`."""
        c = self.extractor(c, reference_points, feat, height, width)
        for extractor in self.extra_extractors:
            c = extractor(c, reference_points, feat, height, width)
        return c


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class StemPool(nn.MaxPool2d):
    """Max pooling whose gradients can be added in a fixed order on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]"""
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(x)
        _, largest = F.max_pool2d(x.detach(), self.kernel_size, self.stride, self.padding, return_indices=True)
        return x.flatten(2).gather(2, largest.flatten(2)).view(largest.shape)


class SpatialPriorModule(nn.Module):
    """Convolutions on the image, for the local detail that a ViT's patches lose (arXiv:2205.08534 sec. 3.2)."""

    def __init__(self, inplanes: int, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn_relu(3, inplanes, stride=2),
            *_conv_bn_relu(inplanes, inplanes, stride=1),
            *_conv_bn_relu(inplanes, inplanes, stride=1),
            StemPool(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_bn_relu(inplanes, 2 * inplanes, stride=2))
        self.conv3 = nn.Sequential(*_conv_bn_relu(2 * inplanes, 4 * inplanes, stride=2))
        self.conv4 = nn.Sequential(*_conv_bn_relu(4 * inplanes, 4 * inplanes, stride=2))
        self.fc1 = nn.Conv2d(inplanes, dim, 1)
        self.fc2 = nn.Conv2d(2 * inplanes, dim, 1)
        self.fc3 = nn.Conv2d(4 * inplanes, dim, 1)
        self.fc4 = nn.Conv2d(4 * inplanes, dim, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images [B, 3, H, W] -> maps with D channels at strides 4, 8, 16 and 32."""
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class DINOv3Adapter(RecomputingModule):
    """Feature pyramid from four layers of a ViT. Raises ConfigError for another number of layers."""

    def __init__(self, backbone: Backbone, config: AdapterConfig) -> None:
        super().__init__()
        if len(backbone.layers) != _NUM_BLOCKS:
            raise ConfigError(f"the adapter needs features of {_NUM_BLOCKS} layers, the backbone gives "
                              f"{len(backbone.layers)}; set backbone.layers to FOUR_EVEN_INTERVALS or FOUR_LAST")
        dim = backbone.embed_dim
        self.embed_dim = dim
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPriorModule(config.conv_inplane, dim)
        self.interactions = nn.ModuleList(
            InteractionBlock(dim, config, num_extra=2 if block == _NUM_BLOCKS - 1 else 0)
            for block in range(_NUM_BLOCKS)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)
        self._reset_parameters()
        self.backbone = backbone  # assigned last, so that the initialisation above does not affect it

    def _reset_parameters(self) -> None:
        self.apply(_reset_layer)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, 3, H, W] -> {"1", "2", "3", "4"}: [B, D, H/s, W/s] at strides s = 4, 8, 16, 32.

        Raises ValueError when H or W is not a multiple of 32 (the strides would not nest).
        """
        height, width = images.shape[-2:]
        divisor = SIZE_DIVISORS["m2f"]
        if height % divisor or width % divisor:
            raise ValueError(f"image is {height}x{width}, legal: height and width multiples of {divisor}")
        # A single decoded picture, permuted, has the memory layout of the transposed views described in _pyramid.
        c1, c2, c3, c4 = self.spm(images.contiguous())
        shapes = [(height // stride, width // stride) for stride in (8, 16, 32)]
        c = torch.cat([_tokens(level) + self.level_embed[i] for i, level in enumerate((c2, c3, c4))], dim=1)
        reference_points = pixel_centers(shapes, images.device)[None, :, None]  # [1, 21 HW / 4, 1, 2]
        vit_tokens = self.backbone(images).patch_tokens  # 4 x [B, HW, D]
        for block, feat in zip(self.interactions, vit_tokens, strict=True):
            c = self.run(block, c, reference_points, feat, *shapes[1])
        c2, c3, c4 = (_maps(tokens, *shape) for tokens, shape in
                      zip(c.split([h * w for h, w in shapes], dim=1), shapes, strict=True))
        return self._pyramid([c1 + self.up(c2), c2, c3, c4], [_maps(tokens, *shapes[1]) for tokens in vit_tokens])

    def _pyramid(self, levels: list[Tensor], vit_maps: list[Tensor]) -> dict[str, Tensor]:
        """Add the ViT's maps, the shallowest layer's to the finest level, and normalise."""
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        pyramid = {}
        for number, (level, vit_map, norm) in enumerate(zip(levels, vit_maps, norms, strict=True), start=1):
            added = level + F.interpolate(vit_map, size=level.shape[-2:], mode="bilinear", align_corners=False)
            # Maps rebuilt from tokens are transposed views. For these, at batch size 1, BatchNorm2d on the CPU
            # (torch 2.13) silently returns wrong gradients when the incoming gradient is in row-major layout.
            pyramid[str(number)] = norm(added.contiguous())  # [B, D, H/s, W/s]
        return pyramid


def _reset_layer(module: nn.Module) -> None:
    """Initial weights as in the reference; norms keep torch's weight 1 and bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
