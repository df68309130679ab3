"""The DINOv3 vision transformer (arXiv:2508.10104), built from transformers' layers; frozen by default."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTModel

from shards.errors import ConfigError
from trainer.model_config import BackboneConfig
from trainer.models.fitting import listed
from trainer.models.recompute import RecomputingModule
from trainer.models.vit_keys import (
    LAYER_NORM_EPS,
    META_ONLY,
    PATCH_SIZE,
    PERIODS,
    check_meta_vit,
    meta_vit_to_transformers,
    rope_periods,
    transformers_vit_to_meta,
    used_periods,
)
from trainer.models.vit_sources import load_vit

Rope = tuple[Tensor, Tensor]  # cosines and sines [N, head_dim] of the patches' rotary position embedding


def tapped_layers(depth: int, choice: str) -> list[int]:
    """Indices (from 0) of the blocks whose output is used, for `backbone.layers`. ConfigError if there are too few."""
    if choice == "LAST":
        return [depth - 1]
    if depth < 4:
        raise ConfigError(f"backbone.layers {choice} needs at least 4 blocks, the backbone has {depth}")
    if choice == "FOUR_LAST":
        return list(range(depth - 4, depth))
    if depth == 24:  # the released ViT-L heads were trained with block 4 where the rule gives 5
        return [4, 11, 17, 23]
    return [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]


class DINOv3Backbone(RecomputingModule):
    """A ViT that is always in eval mode; its weights are trained only with `trainable`.

    Training mode must not reach it: DINOv3 has neither dropout nor batch norm, and transformers would only rescale the
    rotary position embedding at random in every forward pass. Under autocast it runs in the surrounding autocast's
    dtype.
    """

    def __init__(
        self,
        vit: DINOv3ViTModel,
        layers: Sequence[int],
        meta_only: Mapping[str, Tensor] | None = None,
        *,
        trainable: bool = False,
        use_norm: bool = True,
    ) -> None:
        """`layers`: blocks whose output tokens are returned; `use_norm`: apply the ViT's final norm to them.

        `meta_only`: tensors of a Meta file for which transformers has no place (see `vit_keys.META_ONLY`). Among them,
        local_cls_norm is used only in pretraining and kept only for export. The rotary periods are used: Meta's files
        store them rounded to bfloat16, and Meta's code uses the stored values.
        """
        super().__init__()
        if vit.config.patch_size != PATCH_SIZE:
            raise ConfigError(f"the backbone's patch size is {vit.config.patch_size}, legal: {PATCH_SIZE}")
        self.vit = vit
        self.layers = list(layers)
        self.embed_dim: int = vit.config.hidden_size
        self.num_prefix_tokens: int = 1 + vit.config.num_register_tokens  # class token and registers
        self.trainable, self.use_norm = trainable, use_norm
        self._set_meta_only(meta_only or {})
        self.requires_grad_(trainable)
        if trainable:  # DDP would wait for the gradients of parameters that no forward pass uses
            vit.embeddings.mask_token.requires_grad_(False)
            vit.norm.requires_grad_(use_norm)
        self.train(False)

    def train(self, mode: bool = True) -> DINOv3Backbone:
        """Stay in eval mode, whatever mode the surrounding model switches to."""
        super().train(False)
        return self

    @property
    def layer_norm_eps(self) -> float:
        """Epsilon of the ViT's layer norms: not part of any state dict, and it may differ in published EoMTs."""
        return float(self.vit.config.layer_norm_eps)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.model.layer)

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Patch tokens [B, N, D] (row-major) and class token [B, D] of each layer in `layers`, normed if `use_norm`.

        images: normalised [B, 3, H, W]. Raises ValueError when H or W is not a multiple of 16.
        """
        outputs = []
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            tokens, rope = self.embed(images)
            for number in range(max(self.layers) + 1):
                tokens = self.block(number, tokens, rope)
                if number in self.layers:
                    outputs.append(self.vit.norm(tokens) if self.use_norm else tokens)
        return [(tokens[:, self.num_prefix_tokens:], tokens[:, 0]) for tokens in outputs]

    def embed(self, images: Tensor) -> tuple[Tensor, Rope]:
        """Tokens [B, prefix + N, D] before the first block, and the rotary embedding of the N patches.

        Raises ValueError when H or W is not a multiple of 16: the ViT itself would silently crop the image.
        """
        height, width = images.shape[-2:]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            raise ValueError(f"image is {height}x{width}, legal: height and width multiples of {PATCH_SIZE}")
        return self.vit.embeddings(images), self._rope(height // PATCH_SIZE, width // PATCH_SIZE)

    def block(self, number: int, tokens: Tensor, rope: Rope, allowed: Tensor | None = None) -> Tensor:
        """One block on tokens [B, T, D], whose last N are the patches; allowed: bool [B, 1, T, T], True = attend."""
        return self.run(self.vit.model.layer[number], tokens, allowed, rope)

    def _rope(self, rows: int, columns: int) -> Rope:
        """Rotary embedding of a patch grid: centres in -1..1 per axis times 2 pi / period, y part then x part, twice.

        Not transformers' own module: it caches grids globally, and torch.export would fill the cache with symbols.
        """
        frequencies = self.vit.rope_embeddings.inv_freq  # [head_dim / 4]
        y, x = (2.0 * ((torch.arange(count, dtype=torch.float32, device=frequencies.device) + 0.5) / count) - 1.0
                for count in (rows, columns))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
        angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).tile(2)  # [N, head_dim]
        return angles.cos(), angles.sin()

    def layers_above(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter with the number of blocks after it: 0 for the final norm and the last block, `depth` for the
        embeddings."""
        for parameter in self.vit.norm.parameters():
            yield parameter, 0
        for number, block in enumerate(self.vit.model.layer):
            for parameter in block.parameters():
                yield parameter, self.depth - 1 - number
        for parameter in self.vit.embeddings.parameters():
            yield parameter, self.depth

    def weights_sha256(self) -> str:
        """Hex sha256 that identifies the ViT: of the names, dtypes, shapes and bytes that determine its features."""
        digest = hashlib.sha256()
        state, periods = self.vit.state_dict(), self._periods(self.meta_only)
        if not torch.equal(periods, rope_periods(self._head_dim)):
            state[PERIODS] = periods
        if self.layer_norm_eps != LAYER_NORM_EPS:
            state["layer_norm_eps"] = torch.tensor(self.layer_norm_eps)
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def meta_state_dict(self) -> dict[str, Tensor]:
        """The ViT in Meta's layout, including local_cls_norm if the file it came from had it."""
        return transformers_vit_to_meta(self.vit.state_dict(), self.vit.config.num_attention_heads) | self.meta_only

    def load_meta_state_dict(self, state: Mapping[str, Tensor], what: str = "the ViT's weights") -> None:
        """Load a state dict in Meta's layout. Raises ConfigError, before anything changes, when it does not fit."""
        check_meta_vit(self.vit, state, what)
        self.vit.load_state_dict(meta_vit_to_transformers(state))
        self._set_meta_only(state)

    def check_same(self, state: Mapping[str, Tensor], what: str) -> None:
        """Raise ConfigError unless a state dict in Meta's layout equals this ViT, bit for bit in everything used."""
        check_meta_vit(self.vit, state, what)
        own = self.vit.state_dict()
        converted = meta_vit_to_transformers(state).items()
        different = [key for key, tensor in converted if not torch.equal(tensor.to(own[key]), own[key])]
        if not torch.equal(self._periods(state), self._periods(self.meta_only)):
            different.append(PERIODS)
        if different:
            raise ConfigError(f"{what} are not those of the configured backbone, they differ in {listed(different)}; "
                              "set backbone.source to the ViT that the head was trained on, such as this file itself")

    def _set_meta_only(self, state: Mapping[str, Tensor]) -> None:
        self.meta_only = {key: state[key].float().cpu() for key in META_ONLY if key in state}
        if PERIODS in self.meta_only:
            rope = self.vit.rope_embeddings
            rope.inv_freq = (1 / self.meta_only[PERIODS]).to(rope.inv_freq.device)

    @property
    def _head_dim(self) -> int:
        return self.embed_dim // int(self.vit.config.num_attention_heads)

    def _periods(self, state: Mapping[str, Tensor]) -> Tensor:
        return used_periods(state, self._head_dim)


def build_backbone(config: BackboneConfig, *, use_norm: bool = True) -> DINOv3Backbone:
    """The configured ViT in float32 on the CPU; preserves torch's global RNG state. Raises ConfigError."""
    with torch.random.fork_rng(devices=[]):
        vit, meta_only = load_vit(config)
    layers = tapped_layers(vit.config.num_hidden_layers, config.layers)
    return DINOv3Backbone(vit, layers, meta_only, trainable=config.trainable, use_norm=use_norm)
