"""What the key layouts of all ViTs share: renaming by a table, and limits of sizes."""

from __future__ import annotations

from collections.abc import Mapping

from shards.errors import ConfigError

_LIMITS = {"dim": 16384, "blocks": 256, "heads": 512, "ffn": 65536, "registers": 4096}
_MAX_PARAMETERS = 16_000_000_000  # in the blocks; the largest published ViT has 6.7 G


def check_vit_sizes(dim: int, blocks: int, heads: int, ffn: int, registers: int, *, gated: bool) -> None:
    """Raise ConfigError for sizes beyond those of any ViT, before memory is allocated for them."""
    sizes = {"dim": dim, "blocks": blocks, "heads": heads, "ffn": ffn, "registers": registers}
    for name, limit in _LIMITS.items():
        if not isinstance(value := sizes[name], int) or not 0 <= value <= limit:
            raise ConfigError(f"a ViT has {value} {name}, legal: at most {limit}")
    parameters = blocks * dim * (4 * dim + (3 if gated else 2) * ffn)
    if parameters > _MAX_PARAMETERS:
        raise ConfigError(f"a ViT of {parameters / 1e9:.1f} G parameters, legal: at most {_MAX_PARAMETERS / 1e9:.0f} G")


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The table read backwards."""
    return {value: key for key, value in names.items()}


def renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` renamed by the table, whose keys are full names or lack the last part (.weight, .bias)."""
    if name in names:
        return names[name]
    stem, _, kind = name.rpartition(".")
    return f"{names[stem]}.{kind}"
