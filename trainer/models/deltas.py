"""Add published differences to a pretrained ViT, only if it is the ViT that they were made from.

Where a weight changed by at most half its size, the difference of the two float32 numbers is exact (Sterbenz' lemma),
so that adding it to the original is exact too. Added to any other ViT of the same shape, about a quarter of the sums
must be rounded. One rounded sum disproves the base; thousands of exact ones prove it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from shards.errors import ConfigError
from trainer.models.fitting import check_fit

ENOUGH = 1000  # exact sums that are proof: by chance, 0.75^1000
_LARGEST_CHANGE = 0.5  # of the weights' norm, for differences of fine-tuning


class Sums(NamedTuple):
    """How many sums were examined, and how many of them had to be rounded."""

    examined: int
    rounded: int


def with_deltas(base: Mapping[str, Tensor], deltas: Mapping[str, Tensor], *, what: str, base_sha256: str,
                told_sha256: str | None = None) -> dict[str, Tensor]:
    """A ViT's state dict plus `deltas`, which has the same keys. The result is in float32.

    `base_sha256` is the ViT's identity. `told_sha256`, its first digits, says which ViT is meant; with None that must
    follow from the sums. Raises ConfigError when keys or shapes differ, for values too large to be differences, and
    when `base` is not, or is not proven to be, the ViT that they were made from.
    """
    check_fit(base, deltas, what=what,
              advice="Differences can only be added to the ViT that they were made from: set backbone.source to it")
    change = sum(float(delta.double().square().sum()) for delta in deltas.values())
    size = sum(float(base[key].double().square().sum()) for key in deltas)
    if not change <= _LARGEST_CHANGE**2 * size:
        raise ConfigError(f"{what} are too large to be differences: their norm is {change**0.5:.3g}, that of the "
                          f"configured ViT's weights {size**0.5:.3g}. They are weights, or belong to another ViT")
    if told_sha256 is not None:
        if not base_sha256.startswith(told_sha256.lower()):
            raise ConfigError(f"load.base_sha256 is {told_sha256}, but the configured backbone has {base_sha256}; set "
                              "backbone.source to the ViT that the differences were made from")
    else:
        _check_proof(_sums(base, deltas), what, base_sha256)
    return {key: tensor.float() + deltas[key].float() for key, tensor in base.items()}


def _check_proof(sums: Sums, what: str, base_sha256: str) -> None:
    told = f"if it is nevertheless the right one, say so with load.base_sha256={base_sha256[:16]}"
    if sums.rounded:
        raise ConfigError(
            f"{what} were made from another ViT than the configured backbone: {sums.rounded} of {sums.examined} sums "
            "had to be rounded, where for the right one none has to be. Set backbone.source to the ViT that was "
            f"fine-tuned, in float32; {told}")
    if sums.examined < ENOUGH:
        raise ConfigError(f"{what} do not prove which ViT they were made from ({sums.examined} values are comparable, "
                          f"needed: {ENOUGH} in float32). Set backbone.source to that ViT; {told}")


def _sums(base: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> Sums:
    """Knuth's TwoSum on all values to which Sterbenz' lemma applies."""
    examined = rounded = 0
    for key, delta in deltas.items():
        if delta.dtype != torch.float32:
            continue
        a, b = base[key].float().cpu(), delta.cpu()
        total = a + b
        part = total - a
        error = (a - (total - part)) + (b - part)
        applies = (b != 0) & (2 * b.abs() <= a.abs())
        examined += int(applies.sum())
        rounded += int((applies & (error != 0)).sum())
    return Sums(examined, rounded)
