"""The sizes of the configured ViT without its weights, for estimates; a DINOv2's as those of a DINOv3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from shards.errors import ConfigError
from trainer.model_config import BackboneConfig
from trainer.models.backbones.dinov2_keys import (
    RELEASED_DINOV2,
    Dinov2Architecture,
    dinov2_architecture_of,
    is_dinov2,
)
from trainer.models.backbones.dinov3_keys import RELEASED_VITS, VitArchitecture, architecture_of
from trainer.models.hub import directory_config
from trainer.models.weights import read_weights

_HUB_NAMES = {"dinov2-small": "vits14", "dinov2-base": "vitb14", "dinov2-large": "vitl14", "dinov2-giant": "vitg14"}


def known_sizes(config: BackboneConfig) -> VitArchitecture:
    """Sizes from the settings, from a file's shapes or a folder's config.json, or, where the source is not on this
    machine, from its name. Never asks the hub. Raises ConfigError when they cannot be told."""
    random = config.random
    if config.source is None:
        if random.hidden_size is None:
            raise ConfigError("neither backbone.source nor backbone.random.hidden_size is set")
        return VitArchitecture(random.hidden_size, random.num_hidden_layers, random.num_attention_heads,
                               random.intermediate_size, random.use_gated_mlp, registers=random.num_register_tokens)
    path = Path(config.source).expanduser()
    if path.is_file():
        weights = read_weights(path)  # memory-mapped: only shapes are looked at
        if not is_dinov2(weights.vit):
            return architecture_of(weights.vit, str(path))
        return _as_dinov3(dinov2_architecture_of(weights.vit, weights.num_heads, str(path)))
    if (path / "config.json").is_file():
        return _declared_sizes(directory_config(path), path / "config.json")
    name = config.source.lower().replace("_", "-").replace("with-registers-", "")
    names = {**RELEASED_VITS, **{name: _as_dinov3(sizes) for name, sizes in RELEASED_DINOV2.items()}}
    names |= {hub: names[meta] for hub, meta in _HUB_NAMES.items()}
    for known in sorted(names, key=len, reverse=True):  # vits16plus before vits16
        if known in name:
            return names[known]
    raise ConfigError(f"backbone.source {config.source} is not on this machine, and its name tells no size")


def _as_dinov3(sizes: Dinov2Architecture) -> VitArchitecture:
    return VitArchitecture(sizes.dim, sizes.blocks, sizes.heads, sizes.ffn, sizes.gated, registers=sizes.registers)


def _declared_sizes(config: Mapping[str, Any], path: Path) -> VitArchitecture:
    try:
        given = {**AutoConfig.for_model(str(config["model_type"])).to_dict(), **config}
        dim, ratio = int(given["hidden_size"]), given.get("mlp_ratio")
        gated = bool(given.get("use_gated_mlp", given.get("use_swiglu_ffn", False)))
        ffn = int(given["intermediate_size"]) if ratio is None else int(dim * ratio)
        if gated and ratio is not None:  # DINOv2's, as transformers rounds it
            ffn = (int(ffn * 2 / 3) + 7) // 8 * 8
        return VitArchitecture(dim, int(given["num_hidden_layers"]), int(given["num_attention_heads"]), ffn, gated,
                               registers=int(given.get("num_register_tokens", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not tell the ViT's sizes: {error}") from error
