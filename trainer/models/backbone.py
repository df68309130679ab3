"""The frozen DINOv3 vision transformer (arXiv:2508.10104), run by transformers' implementation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from shards.errors import ConfigError
from trainer.config import BackboneConfig, RandomBackboneConfig
from trainer.models.fitting import grouped, listed
from trainer.models.vit_keys import (
    META_ONLY,
    PATCH_SIZE,
    PERIODS,
    VitArchitecture,
    architecture_of,
    check_meta_vit,
    meta_vit_to_transformers,
    rope_periods,
    transformers_vit_to_meta,
    used_periods,
)
from trainer.models.weights import WEIGHT_SUFFIXES, read_weights

_DOWNLOAD_HINT = (
    "DINOv3 weights are gated: accept the licence on the model's Hugging Face page, run `huggingface-cli login`, then "
    "set backbone.source to the hub id (such as facebook/dinov3-vits16-pretrain-lvd1689m), to a downloaded directory "
    "with config.json and model.safetensors, or to Meta's .pth; backbone.random.hidden_size gives random weights for a "
    "dry run"
)


def tapped_layers(depth: int, choice: str) -> list[int]:
    """Indices (from 0) of the blocks whose tokens are read, for `backbone.layers`. ConfigError if there are too few."""
    if choice == "LAST":
        return [depth - 1]
    if depth < 4:
        raise ConfigError(f"backbone.layers {choice} needs at least 4 blocks, the backbone has {depth}")
    if choice == "FOUR_LAST":
        return list(range(depth - 4, depth))
    if depth == 24:  # the released ViT-L heads were trained with 4 where the rule gives 5
        return [4, 11, 17, 23]
    return [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]


class DINOv3Backbone(nn.Module):
    """A ViT that never trains: no gradients, and always in evaluation mode.

    Training mode must not reach it: it would rescale the rotary position codes at random in every forward pass.
    Under autocast it runs in the surrounding autocast's dtype.
    """

    def __init__(
        self, vit: DINOv3ViTModel, layers: Sequence[int], meta_only: Mapping[str, Tensor] | None = None
    ) -> None:
        """`meta_only`: what a file of Meta's held beyond transformers' layout (see `vit_keys.META_ONLY`).

        Of these, local_cls_norm serves pretraining alone and is kept only to be given back. The rotary periods are
        used: Meta's files hold them rounded to bfloat16, and Meta's code runs with what the file says.
        """
        super().__init__()
        if vit.config.patch_size != PATCH_SIZE:
            raise ConfigError(f"the backbone's patch size is {vit.config.patch_size}, legal: {PATCH_SIZE}")
        self.vit = vit
        self.layers = list(layers)
        self.embed_dim: int = vit.config.hidden_size
        self._set_meta_only(meta_only or {})
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> DINOv3Backbone:
        """Stay in evaluation mode, whatever the model around switches to."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Patch tokens [B, N, D] (rows first) and class token [B, D] of each tapped layer, after the final norm.

        images: normalised [B, 3, H, W]. Raises ValueError when H or W is no multiple of 16: the ViT itself
        would cut the rest off without a word.
        """
        height, width = images.shape[-2:]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            raise ValueError(f"image is {height}x{width}, legal: height and width multiples of {PATCH_SIZE}")
        hidden_states = self.vit(images, output_hidden_states=True).hidden_states  # [0] is the input of block 0
        prefix = 1 + self.vit.config.num_register_tokens
        normed = [self.vit.norm(hidden_states[layer + 1]) for layer in self.layers]  # [B, prefix + N, D]
        return [(tokens[:, prefix:], tokens[:, 0]) for tokens in normed]

    def weights_sha256(self) -> str:
        """Hex digest of all that decides the features (names, dtypes, shapes, bytes by name): tells ViTs apart."""
        digest = hashlib.sha256()
        state, periods = self.vit.state_dict(), self._periods(self.meta_only)
        if not torch.equal(periods, rope_periods(self._head_dim)):
            state[PERIODS] = periods
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def meta_state_dict(self) -> dict[str, Tensor]:
        """The ViT in Meta's layout; local_cls_norm is there if it came from a file that had it."""
        return transformers_vit_to_meta(self.vit.state_dict(), self.vit.config.num_attention_heads) | self.meta_only

    def load_meta_state_dict(self, state: Mapping[str, Tensor], what: str = "the ViT's weights") -> None:
        """Take a state dict in Meta's layout. Raises ConfigError, before anything changes, when it does not fit."""
        check_meta_vit(self.vit, state, what)
        self.vit.load_state_dict(meta_vit_to_transformers(state))
        self._set_meta_only(state)

    def check_same(self, state: Mapping[str, Tensor], what: str) -> None:
        """Raise ConfigError unless a state dict in Meta's layout is this very ViT, to the last bit that is used."""
        check_meta_vit(self.vit, state, what)
        own = self.vit.state_dict()
        converted = meta_vit_to_transformers(state).items()
        different = [key for key, tensor in converted if not torch.equal(tensor.to(own[key]), own[key])]
        if not torch.equal(self._periods(state), self._periods(self.meta_only)):
            different.append(PERIODS)
        if different:
            raise ConfigError(f"{what} are not those of the configured backbone, they differ in {listed(different)}; "
                              "set backbone.source to the ViT that belongs to the head, such as this very file")

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


def build_backbone(config: BackboneConfig) -> DINOv3Backbone:
    """The configured ViT in float32 on the CPU; leaves the global random state as it found it. Raises ConfigError."""
    meta_only: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        if config.source is not None and Path(config.source).expanduser().is_file():
            vit, meta_only = _vit_from_file(Path(config.source).expanduser())
        elif config.source is not None:
            vit = _pretrained_vit(config.source)
        elif config.random.hidden_size is not None:
            vit = _random_vit(config.random, config.random.hidden_size)
        else:
            raise ConfigError(f"neither backbone.source nor backbone.random.hidden_size is set. {_DOWNLOAD_HINT}")
    return DINOv3Backbone(vit, tapped_layers(vit.config.num_hidden_layers, config.layers), meta_only)


def _random_vit(config: RandomBackboneConfig, hidden_size: int) -> DINOv3ViTModel:
    if hidden_size % (4 * config.num_attention_heads):
        raise ConfigError(f"backbone.random.hidden_size is {hidden_size}, legal: a multiple of 4 * num_attention_heads "
                          f"({4 * config.num_attention_heads}), for the rotary position code")
    # Not torch.manual_seed: that would also re-seed every accelerator's generator.
    torch.default_generator.manual_seed(config.seed)
    return DINOv3ViTModel(VitArchitecture(
        dim=hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        gated=config.use_gated_mlp,
        registers=config.num_register_tokens,
    ).config())


def _vit_from_file(path: Path) -> tuple[DINOv3ViTModel, dict[str, Tensor]]:
    """The ViT in one of Meta's files and the file's META_ONLY part. The tensors read become the weights: one copy."""
    state = read_weights(path, mmap=False).vit
    if not state:
        raise ConfigError(f"backbone.source {path} holds a head and no ViT; name a head in load.weights")
    what = f"the ViT's weights in {path}"
    with torch.device("meta"):
        vit = DINOv3ViTModel(architecture_of(state, what).config())
    check_meta_vit(vit, state, what)
    converted = {key: tensor.float() for key, tensor in meta_vit_to_transformers(state).items()}
    vit.load_state_dict(converted, assign=True)
    vit.rope_embeddings = type(vit.rope_embeddings)(vit.config)  # its buffer is in no file, and was on the meta device
    return vit, {key: state[key] for key in META_ONLY if key in state}


def _pretrained_vit(source: str) -> DINOv3ViTModel:
    _check_directory(source)
    try:
        settings, _ = DINOv3ViTConfig.get_config_dict(source)
        if settings.get("model_type") != DINOv3ViTConfig.model_type:
            raise ConfigError(f"backbone.source {source} holds a model of type {settings.get('model_type')!r}, legal: "
                              f"{DINOv3ViTConfig.model_type!r}")
        loaded: Any = DINOv3ViTModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except OSError as error:
        raise ConfigError(f"backbone.source {source} cannot be loaded ({error}). {_DOWNLOAD_HINT}") from error
    vit, report = loaded
    missing = sorted(set(report["missing_keys"]) - {"embeddings.mask_token"})  # the mask token is never used
    if missing:
        raise ConfigError(f"backbone.source {source} lacks {len(missing)} weights, the first is {missing[0]}. "
                          f"{_DOWNLOAD_HINT}")
    # transformers only logs these: a ViT-S+ read with a ViT-S config.json would run, without its gates.
    problems = grouped(missing=(), unexpected=report["unexpected_keys"],
                       misshaped=(key for key, *_ in report["mismatched_keys"]))
    if problems:
        raise ConfigError(f"backbone.source {source}: config.json describes another ViT than the weights; {problems}")
    return vit


def _check_directory(source: str) -> None:
    """Refuse a local directory that is missing or incomplete, before it is mistaken for a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ConfigError(f"backbone.source {source} is incomplete: it needs config.json and model.safetensors. "
                              f"{_DOWNLOAD_HINT}")
    elif source.startswith(("/", ".", "~")) or source.count("/") != 1 or source.endswith(WEIGHT_SUFFIXES):
        raise ConfigError(f"backbone.source {source} is no existing directory or file. {_DOWNLOAD_HINT}")
