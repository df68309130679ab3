"""Compare what a config.json declares with the weights beside it: with other heads a ViT runs, but wrongly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.cli.settings import shown_value
from shards.errors import ConfigError
from trainer.models.hub import is_hub_id

# What converting malformed weights can raise: missing keys, wrong numbers of axes, sizes that do not divide.
MALFORMED = (LookupError, ArithmeticError, ValueError, TypeError, RuntimeError, AttributeError)


def declared_count(config: Mapping[str, Any], name: str, path: Path, *, most: int) -> int:
    """A whole number from 1 to `most`. Raises ConfigError naming file and field."""
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{path}: {name} is {shown_value(value)}, legal: a whole number from 1 to {most}")
    return value


def declared_epsilon(config: Mapping[str, Any], path: Path) -> float:
    """`layer_norm_eps`, a number above 0 and below 1. Raises ConfigError naming the file."""
    value: Any = config.get("layer_norm_eps")
    if type(value) not in (int, float) or not 0 < value < 1:
        raise ConfigError(f"{path}: layer_norm_eps is {shown_value(value)}, legal: a number above 0 and below 1")
    return float(value)


def declared_heads(config: Mapping[str, Any], path: Path, *, divisor: int = 1) -> int:
    """`num_attention_heads`, which divides `hidden_size` into multiples of `divisor`. Raises ConfigError."""
    heads = declared_count(config, "num_attention_heads", path, most=512)
    width = declared_count(config, "hidden_size", path, most=16384)
    if width % (heads * divisor):
        raise ConfigError(f"{path}: num_attention_heads is {heads} and hidden_size {width}, legal: a hidden_size that "
                          f"is a multiple of {divisor} x num_attention_heads" if divisor > 1 else
                          f"{path}: num_attention_heads is {heads}, legal: a divisor of hidden_size ({width})")
    return heads


def declared_backbone(config: Mapping[str, Any], path: Path) -> tuple[str, str] | None:
    """Hub id and sha256 of the ViT that an export names instead of containing it; None if it names none. Raises
    ConfigError: a file from elsewhere must not choose among this machine's files."""
    if "backbone" not in config:
        return None
    value = config["backbone"]
    source, sha256 = (value.get(key) if isinstance(value, dict) else None for key in ("source", "sha256"))
    if not (isinstance(source, str) and is_hub_id(source)
            and isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ConfigError(f"{path}: backbone is {shown_value(value)}, legal: an object with source, a hub id, and "
                          "sha256, 64 hexadecimal digits")
    return source, sha256


def check_declared(config: Mapping[str, Any], actual: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError unless every field in `actual` has that value in config (1 equals 1.0, but not true)."""
    for name, value in actual.items():
        declared = config.get(name)
        if isinstance(declared, bool) != isinstance(value, bool) or declared != value:
            raise ConfigError(f"{path}: {name} is {shown_value(declared)}, but the weights beside it have {value!r}: "
                              "config.json does not describe them")
