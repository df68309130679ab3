"""The DINOv3 vision transformer (arXiv:2508.10104), built from transformers' layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTModel

from shards.errors import ConfigError
from trainer.model_config import TOKEN_STRIDE
from trainer.models.backbones.base import Backbone, Rope, Tokens, patch_grid
from trainer.models.backbones.dinov3_keys import (
    LAYER_NORM_EPS,
    META_ONLY,
    PERIODS,
    check_meta_vit,
    meta_vit_to_transformers,
    rope_periods,
    transformers_vit_to_meta,
    used_periods,
)


class DINOv3Backbone(Backbone):
    """DINOv3: patches of 16 pixels, positions as a rotary code."""

    vit: DINOv3ViTModel
    family, is_gated = "DINOv3", True
    license = "DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license/)"
    usual_epsilon = LAYER_NORM_EPS

    def __init__(
        self,
        vit: DINOv3ViTModel,
        layers: Sequence[int],
        meta_only: Mapping[str, Tensor] | None = None,
        *,
        trainable: bool = False,
        use_norm: bool = True,
        rope_rescale: float | None = None,
    ) -> None:
        """`layers` and `use_norm` as in `Backbone`; `rope_rescale` as in the settings.

        `meta_only`: tensors of a Meta file for which transformers has no place (see `dinov3_keys.META_ONLY`). Among
        them, local_cls_norm is used only in pretraining and kept only for export. The rotary periods are used: Meta's
        files store them rounded to bfloat16, and Meta's code uses the stored values.
        """
        if vit.config.patch_size != TOKEN_STRIDE:
            raise ConfigError(f"the backbone's patch size is {vit.config.patch_size}, legal for a DINOv3 ViT: "
                              f"{TOKEN_STRIDE}")
        super().__init__(vit, layers, trainable=trainable, use_norm=use_norm)
        self.embed_dim, self.num_heads = vit.config.hidden_size, vit.config.num_attention_heads
        self.num_prefix_tokens = 1 + vit.config.num_register_tokens
        self.activation, self.layer_norm_eps = vit.config.hidden_act, float(vit.config.layer_norm_eps)
        self.rope_rescale = rope_rescale
        self._set_meta_only(meta_only or {})

    @property
    def embeddings(self) -> nn.Module:
        return self.vit.embeddings

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], self.vit.model.layer)

    @property
    def final_norm(self) -> nn.Module:
        return self.vit.norm

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        return [self.vit.embeddings.mask_token]

    def embed(self, images: Tensor) -> Tokens:
        rows, columns = patch_grid(images)
        return Tokens(self.vit.embeddings(images), (rows, columns), self._rope(rows, columns))

    def _rope(self, rows: int, columns: int) -> Rope:
        """Rotary embedding of a patch grid: centres in -1..1 per axis times 2 pi / period, y part then x part, twice.

        Not transformers' own module: it caches grids globally, and torch.export would fill the cache with symbols.
        """
        frequencies = self.vit.rope_embeddings.inv_freq  # [head_dim / 4]
        y, x = (2.0 * ((torch.arange(count, dtype=torch.float32, device=frequencies.device) + 0.5) / count) - 1.0
                for count in (rows, columns))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
        if self.augments and self.rope_rescale is not None:  # one factor from 1/r to r, as in DINOv3's pretraining
            exponent = 2.0 * torch.rand(1, device=frequencies.device) - 1.0
            centres = centres * (math.log(self.rope_rescale) * exponent).exp()
        angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).tile(2)  # [N, head_dim]
        return angles.cos(), angles.sin()

    def identity(self) -> dict[str, Tensor]:
        state, periods = self.exact().state_dict(), self._periods(self.meta_only)
        if not torch.equal(periods, rope_periods(self._head_dim)):
            state[PERIODS] = periods
        if self.layer_norm_eps != LAYER_NORM_EPS:
            state["layer_norm_eps"] = torch.tensor(self.layer_norm_eps)
        return state

    def meta_state_dict(self) -> dict[str, Tensor]:
        """The ViT in Meta's layout, including local_cls_norm if the file it came from had it."""
        return transformers_vit_to_meta(self.exact().state_dict(), self.num_heads) | self.meta_only

    def converted(self, state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        check_meta_vit(self.vit, state, what)
        return meta_vit_to_transformers(state)

    def completed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        left_out = {key: tensor for key, tensor in self.meta_state_dict().items()
                    if key in ("mask_token", *META_ONLY) or key.endswith("bias_mask")}
        return {**left_out, **state}

    def load_meta_state_dict(self, state: Mapping[str, Tensor], what: str = "the ViT's weights") -> None:
        super().load_meta_state_dict(state, what)
        self._set_meta_only(state)

    def differences(self, state: Mapping[str, Tensor], what: str) -> list[str]:
        same_periods = torch.equal(self._periods(state), self._periods(self.meta_only))
        return super().differences(state, what) + ([] if same_periods else [PERIODS])

    def _set_meta_only(self, state: Mapping[str, Tensor]) -> None:
        self.meta_only = {key: state[key].float().cpu() for key in META_ONLY if key in state}
        if PERIODS in self.meta_only:
            rope = self.vit.rope_embeddings
            rope.inv_freq = (1 / self.meta_only[PERIODS]).to(rope.inv_freq.device)

    @property
    def _head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def _periods(self, state: Mapping[str, Tensor]) -> Tensor:
        return used_periods(state, self._head_dim)
