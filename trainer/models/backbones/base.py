"""What every ViT offers to the heads: tokens, their grid, the number of prefix tokens, a rotary code or none.

A head needs no more than that, so it runs on any ViT; no other module asks which one it is. Whatever its patch size, a
ViT hands out one token per TOKEN_STRIDE x TOKEN_STRIDE pixels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.model_config import TOKEN_STRIDE
from trainer.models.fitting import listed
from trainer.models.recompute import RecomputingModule

Rope = tuple[Tensor, Tensor]  # cosines and sines [N, head_dim] of the patches' rotary position embedding
Grid = tuple[int, int]  # rows and columns of the patches


class Tokens(NamedTuple):
    """Tokens between two blocks of a ViT, with what the next block needs."""

    tokens: Tensor  # [B, prefix + N, D]: class token, registers, then the patches row by row
    grid: Grid
    rope: Rope | None


@dataclass(frozen=True)
class Features:
    """A ViT's tokens after each of its tapped layers."""

    layers: list[Tensor]  # [B, prefix + N, D] each
    num_prefix_tokens: int
    grid: Grid
    rope: Rope | None

    @property
    def cls_tokens(self) -> list[Tensor]:
        """[B, D] per layer."""
        return [tokens[:, 0] for tokens in self.layers]

    @property
    def patch_tokens(self) -> list[Tensor]:
        """[B, N, D] per layer."""
        return [tokens[:, self.num_prefix_tokens:] for tokens in self.layers]

    @property
    def patch_maps(self) -> list[Tensor]:
        """[B, D, rows, columns] per layer; transposed views."""
        return [tokens.transpose(1, 2).unflatten(2, self.grid) for tokens in self.patch_tokens]


def tapped_layers(depth: int, choice: str, *, released_heads: bool = True) -> list[int]:
    """Indices (from 0) of the blocks whose output is used, for `backbone.layers`. ConfigError if there are too few.

    With `released_heads`, FOUR_EVEN_INTERVALS means for 24 blocks what Meta's heads on a ViT-L were trained with.
    """
    if choice == "LAST":
        return [depth - 1]
    if depth < 4:
        raise ConfigError(f"backbone.layers {choice} needs at least 4 blocks, the backbone has {depth}")
    if choice == "FOUR_LAST":
        return list(range(depth - 4, depth))
    if depth == 24 and released_heads:  # block 4 where the rule gives 5
        return [4, 11, 17, 23]
    return [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]


class Backbone(RecomputingModule, ABC):
    """A ViT that is always in eval mode; its weights are trained only with `trainable`.

    `augments` is True while the surrounding model is in training mode: all that may then differ is a random scale of
    the rotary code. Under autocast it runs in the surrounding autocast's dtype. Its weights are stored, exported and
    compared in the layout of Meta's files.
    """

    family: str  # as its authors call it
    license: str  # of the published weights
    is_gated: bool  # whether these are given only to who accepts the licence
    embed_dim: int
    num_heads: int
    num_prefix_tokens: int  # class token and registers
    activation: str  # transformers' name of the activation that EoMT's head takes over from the ViT
    usual_epsilon: float  # of the layer norms of this family
    layer_norm_eps: float  # not part of any state dict, and it may differ in published models

    def __init__(self, vit: nn.Module, layers: Sequence[int], *, trainable: bool, use_norm: bool) -> None:
        """`layers`: blocks whose output tokens `forward` returns; `use_norm`: apply the ViT's final norm to them."""
        super().__init__()
        self.vit = vit
        self.layers = list(layers)
        self.trainable, self.use_norm = trainable, use_norm
        self._exact_sha256: str | None = None  # once `store_in` has rounded the weights
        self.requires_grad_(trainable)
        if trainable:  # DDP would wait for the gradients of parameters that no forward pass uses
            self.final_norm.requires_grad_(use_norm)
            for parameter in self.unused_parameters():
                parameter.requires_grad_(False)
        self.train(False)

    # -- what the families define ------------------------------------------------------------------------

    @property
    @abstractmethod
    def embeddings(self) -> nn.Module:
        """The module that makes the tokens before the first block."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, called as (tokens, mask, rope or nothing)."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""

    @abstractmethod
    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that are needed only in pretraining."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Tokens before the first block, for normalised images [B, 3, H, W].

        Raises ValueError when H or W is not a multiple of TOKEN_STRIDE.
        """

    @abstractmethod
    def identity(self) -> dict[str, Tensor]:
        """Everything that determines the features, by name; for `weights_sha256`."""

    @abstractmethod
    def meta_state_dict(self) -> dict[str, Tensor]:
        """The ViT in Meta's layout."""

    @abstractmethod
    def converted(self, state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        """A state dict of this ViT in Meta's layout -> the keys of `self.vit`. ConfigError when it does not fit."""

    @abstractmethod
    def completed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in Meta's layout with the entries of this ViT that other programs leave out of their files,
        because they are constants or used only in pretraining."""

    def check_meta_file(self) -> None:
        """Raise ConfigError when a file in Meta's layout, which holds no settings, would be read as another ViT."""
        if self.layer_norm_eps != self.usual_epsilon:
            raise ConfigError(f"the ViT's layer_norm_eps is {self.layer_norm_eps}, and Meta's layout means "
                              f"{self.usual_epsilon}. Leave out --formats meta")

    # -- the same for all --------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode, whatever mode the surrounding model switches to."""
        self.augments = mode
        super().train(False)
        return self

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def forward(self, images: Tensor) -> Features:
        """The tokens after each layer in `layers`, normed if `use_norm`. Raises ValueError like `embed`."""
        outputs = []
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            tokens, grid, rope = self.embed(images)
            for number in range(max(self.layers) + 1):
                tokens = self.block(number, tokens, rope)
                if number in self.layers:
                    outputs.append(self.norm(tokens) if self.use_norm else tokens)
        return Features(outputs, self.num_prefix_tokens, grid, rope)

    def block(self, number: int, tokens: Tensor, rope: Rope | None, allowed: Tensor | None = None) -> Tensor:
        """One block on tokens [B, T, D], whose last N are the patches; allowed: bool [B, 1, T, T], True = attend."""
        inputs = (tokens, allowed) if rope is None else (tokens, allowed, rope)
        return self.run(self.blocks[number], *inputs)

    def norm(self, tokens: Tensor) -> Tensor:
        """The final norm, on tokens of any shape [..., D]."""
        normed: Tensor = self.final_norm(tokens)
        return normed

    def layers_above(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter with the number of blocks after it: 0 for the final norm and the last block, `depth` for the
        embeddings."""
        for parameter in self.final_norm.parameters():
            yield parameter, 0
        for number, block in enumerate(self.blocks):
            for parameter in block.parameters():
                yield parameter, self.depth - 1 - number
        for parameter in self.embeddings.parameters():
            yield parameter, self.depth

    def weights_sha256(self) -> str:
        """Hex sha256 that identifies the ViT: of the names, dtypes, shapes and bytes of `identity`; the same after
        `store_in`."""
        return self._exact_sha256 or state_sha256(self.identity())

    def store_in(self, dtype: torch.dtype) -> None:
        """Round the weights of a frozen ViT's linear and convolution layers to `dtype`, as autocast to it would in
        every forward pass. Norms, LayerScale, positions and special tokens stay float32.

        From then on `forward` works only under that autocast, and `exact` raises RuntimeError.
        """
        assert not self.trainable, "a ViT that is trained needs its float32 weights"
        self._exact_sha256 = self.weights_sha256()
        self.round_to(dtype)

    def round_to(self, dtype: torch.dtype) -> None:
        """The part of `store_in` that changes weights."""
        for module in self.vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def exact(self) -> nn.Module:
        """The ViT with its float32 weights, to export or compare. Raises RuntimeError after `store_in`."""
        if self._exact_sha256 is not None:
            raise RuntimeError("the ViT's weights are rounded for autocast; load the model again with for_export=True")
        return self.vit

    def load_meta_state_dict(self, state: Mapping[str, Tensor], what: str = "the ViT's weights") -> None:
        """Load a state dict in Meta's layout. Raises ConfigError, before anything changes, when it does not fit."""
        self.exact().load_state_dict(self.converted(state, what))

    def check_same(self, state: Mapping[str, Tensor], what: str) -> None:
        """Raise ConfigError unless a state dict in Meta's layout equals this ViT, bit for bit in everything used."""
        different = self.differences(state, what)
        if different:
            raise ConfigError(f"{what} are not those of the configured backbone, they differ in {listed(different)}; "
                              "set backbone.source to the ViT that the head was trained on, such as this file itself")

    def differences(self, state: Mapping[str, Tensor], what: str) -> list[str]:
        """The keys of `self.vit` whose values, among those that any forward pass uses, differ in `state`."""
        own, unused = self.exact().state_dict(), set(map(id, self.unused_parameters()))
        ignored = {name for name, parameter in self.vit.named_parameters() if id(parameter) in unused}
        return [key for key, tensor in self.converted(state, what).items()
                if key not in ignored and not torch.equal(tensor.to(own[key]), own[key])]


def patch_grid(images: Tensor) -> Grid:
    """Rows and columns of tokens for images [B, 3, H, W]. Raises ValueError unless they are whole numbers: a ViT would
    silently crop the image."""
    height, width = images.shape[-2:]
    if height % TOKEN_STRIDE or width % TOKEN_STRIDE:
        raise ValueError(f"image is {height}x{width}, legal: height and width multiples of {TOKEN_STRIDE}")
    return height // TOKEN_STRIDE, width // TOKEN_STRIDE


def vit_layers_above(model: nn.Module) -> dict[int, int]:
    """For every ViT parameter in a model, by id: the number of blocks after it (see `Backbone.layers_above`)."""
    return {id(parameter): count for module in model.modules() if isinstance(module, Backbone)
            for parameter, count in module.layers_above()}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex sha256 of the names, dtypes, shapes and bytes of a state dict, whatever its order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
