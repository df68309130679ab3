"""The DINOv2 vision transformer (arXiv:2304.07193), with or without registers (arXiv:2309.16588), built from
transformers' layers.

Its patches have 14 pixels, and heads need one token per 16 (TOKEN_STRIDE). `patch_resize` says how that is reached:

    weights   the patch embedding is resampled to 16x16 pixels (FlexiViT, arXiv:2212.08013), as EoMT's models do
    image     images are scaled by 14/16

Either way the learned positions are interpolated to the grid as in transformers: bicubic, with registers antialiased.
(Meta's code for the models without registers adds 0.1 to the grid before scaling; features differ in the third digit.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.model_config import TOKEN_STRIDE
from trainer.models.backbones.base import Backbone, Tokens, patch_grid
from trainer.models.backbones.dinov2_keys import (
    HEAD_DIM,
    LAYER_NORM_EPS,
    MASK_TOKEN,
    Dinov2,
    check_dinov2,
    dinov2_to_meta,
    dinov2_to_transformers,
)


class Dinov2Backbone(Backbone):
    """DINOv2 with square patches of any size, and learned positions on a square grid."""

    vit: Dinov2
    to_stride: Tensor
    family, is_gated, license = "DINOv2", False, "Apache-2.0"
    usual_epsilon = LAYER_NORM_EPS

    def __init__(self, vit: Dinov2, layers: Sequence[int], *, patch_resize: str = "weights", trainable: bool = False,
                 use_norm: bool = True) -> None:
        """`patch_resize`: see above; `layers` and `use_norm` as in `Backbone`."""
        super().__init__(vit, layers, trainable=trainable, use_norm=use_norm)
        self.embed_dim, self.num_heads = vit.config.hidden_size, vit.config.num_attention_heads
        self.num_prefix_tokens = 1 + getattr(vit.config, "num_register_tokens", 0)
        self.activation, self.layer_norm_eps = vit.config.hidden_act, float(vit.config.layer_norm_eps)
        self.patch_size: int = self._projection.weight.shape[-1]
        self.patch_resize = patch_resize
        to_stride = resampling(self.patch_size, TOKEN_STRIDE)
        self.register_buffer("to_stride", to_stride, persistent=False)  # [stride^2, patch^2]

    @property
    def embeddings(self) -> nn.Module:
        return self.vit.embeddings

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], self.vit.encoder.layer)

    @property
    def final_norm(self) -> nn.Module:
        return self.vit.layernorm

    @property
    def _projection(self) -> nn.Conv2d:
        return self.vit.embeddings.patch_embeddings.projection

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        mask_token = self.vit.embeddings.mask_token
        return [] if mask_token is None else [mask_token]

    def embed(self, images: Tensor) -> Tokens:
        grid = patch_grid(images)
        embeddings, batch = self.vit.embeddings, images.shape[0]
        patches = self._patches(images, grid).flatten(2).transpose(1, 2)  # [B, N, D]
        positions = embeddings.position_embeddings  # [1, 1 + G * G, D]
        prefix = [embeddings.cls_token + positions[:, :1]]
        if has_registers := self.num_prefix_tokens > 1:
            prefix.append(cast(Tensor, embeddings.register_tokens))  # they have no position
        patches = patches + interpolated(positions[:, 1:], grid, antialias=has_registers)
        tokens = torch.cat([*(token.expand(batch, -1, -1).to(patches.dtype) for token in prefix), patches], dim=1)
        return Tokens(tokens, grid, None)

    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch embeddings [B, D, rows, columns]: the one place where the patch size meets the stride of the tokens."""
        projection = self._projection
        if self.patch_size != TOKEN_STRIDE and self.patch_resize == "image":
            images = F.interpolate(images, (grid[0] * self.patch_size, grid[1] * self.patch_size), mode="bilinear",
                                   align_corners=False, antialias=True)
        elif self.patch_size != TOKEN_STRIDE:
            weight = projection.weight.flatten(2) @ self.to_stride.T  # [D, 3, stride^2]
            return F.conv2d(images, weight.unflatten(2, (TOKEN_STRIDE, TOKEN_STRIDE)), projection.bias, TOKEN_STRIDE)
        return projection(images)

    def identity(self) -> dict[str, Tensor]:
        state = {key: tensor for key, tensor in self.exact().state_dict().items() if not key.endswith(MASK_TOKEN)}
        if self.layer_norm_eps != LAYER_NORM_EPS:
            state["layer_norm_eps"] = torch.tensor(self.layer_norm_eps)
        if self.embed_dim != self.num_heads * HEAD_DIM:
            state["num_heads"] = torch.tensor(self.num_heads)
        if self.patch_size != TOKEN_STRIDE:
            state[f"patch_resize.{self.patch_resize}"] = torch.tensor(self.patch_size)
        return state

    def meta_state_dict(self) -> dict[str, Tensor]:
        return dinov2_to_meta(self.exact().state_dict())

    def check_meta_file(self) -> None:
        super().check_meta_file()
        if self.embed_dim != self.num_heads * HEAD_DIM:
            raise ConfigError("Meta's layout of a DINOv2 does not contain the number of heads; it is "
                              f"{self.num_heads}, legal at this width: {self.embed_dim // HEAD_DIM}. Leave out "
                              "--formats meta")

    def converted(self, state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        own = self.vit.embeddings.mask_token
        if own is None:
            state = {key: tensor for key, tensor in state.items() if key != MASK_TOKEN}
        check_dinov2(self.vit, state, what)
        return dinov2_to_transformers(self.completed(state))

    def completed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask_token = self.vit.embeddings.mask_token
        return dict(state) if mask_token is None else {MASK_TOKEN: mask_token.detach(), **state}


def interpolated(positions: Tensor, grid: tuple[int, int], *, antialias: bool) -> Tensor:
    """Learned positions [1, G * G, D] on another grid: bicubic in float32 -> [1, rows * columns, D]."""
    side = math.isqrt(positions.shape[1])
    maps = positions.float().transpose(1, 2).unflatten(2, (side, side))  # [1, D, G, G]
    if torch.are_deterministic_algorithms_enabled() and positions.requires_grad:
        rows, columns = (bicubic(side, target, antialias, positions.device) for target in grid)
        return (rows.T @ maps @ columns).flatten(2).transpose(1, 2)
    resized = F.interpolate(maps, grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.flatten(2).transpose(1, 2)


def bicubic(side: int, target: int, antialias: bool, device: torch.device) -> Tensor:
    """float32 [side, target]: bicubic interpolation along one axis as a product, whose gradients are added in a fixed
    order on CUDA; those of torch's interpolation are not."""
    pixels = torch.eye(side, device=device)[None, None]  # not as columns of width 1, which torch 2.13 resizes wrongly
    return F.interpolate(pixels, (side, target), mode="bicubic", align_corners=False, antialias=antialias)[0, 0]


@functools.cache
def resampling(patch_size: int, target: int) -> Tensor:
    """float32 [target^2, patch_size^2]: resamples a patch embedding so that patches enlarged to `target` give what the
    original gave (the pseudo-inverse of bilinear resizing, transposed; FlexiViT, arXiv:2212.08013, eq. 4)."""
    pixels = torch.eye(patch_size**2, dtype=torch.float64, device="cpu").unflatten(1, (1, patch_size, patch_size))
    resized = F.interpolate(pixels, (target, target), mode="bilinear", align_corners=False)
    return torch.linalg.pinv(resized.flatten(1)).float()  # rows of `resized` are the images of the original pixels
