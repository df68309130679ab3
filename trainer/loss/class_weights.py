"""Weights of the classes in the loss: a list, or computed from counts of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from shards.errors import ConfigError
from shards.manifest import Manifest
from trainer.config import LossConfig

ClassCounts = Literal["pixels", "samples"]
ENET_CONSTANT = 1.02


def class_weights(config: LossConfig, manifest: Manifest, occurrences: Callable[[ClassCounts], Sequence[float]],
                  counts: ClassCounts) -> list[float] | None:
    """`loss.class_weights` as one number per class; None if it is not set. A list is used as it is.

    `occurrences` counts the pixels of each class, or the samples that hold it, in the training data.

    inverse_log takes the shares of what the loss counts: `counts` "pixels" for a per-pixel cross-entropy, as in ENet;
    "samples" where every class of a sample is one mask. effective_number counts samples in either case: it measures how
    much of n examples is new, and its beta suits numbers of images; with numbers of pixels, which are alike within an
    image, 1 - beta^n is 1 for every class. Counts are those of the stored samples; crops drawn from them hold fewer
    classes.

    Raises ConfigError for a list of another length than the class table's.
    """
    setting = config.class_weights
    if setting is None:
        return None
    if isinstance(setting, list):
        if len(setting) != manifest.num_classes:
            raise ConfigError(f"loss.class_weights has {len(setting)} numbers, legal: {manifest.num_classes}, one for "
                              f"each class of {manifest.dataset} in the order of the class table")
        return list(setting)
    if setting == "inverse_log":
        return inverse_log(occurrences(counts))
    return effective_number(occurrences("samples"), config.class_weights_beta)


def described(weights: Sequence[float], manifest: Manifest) -> str:
    """The smallest and the largest weight in one line."""
    ends = sorted(range(len(weights)), key=weights.__getitem__)[:: max(1, len(weights) - 1)]
    return " to ".join(f"{weights[number]:.4g} ({manifest.names_of([number], 1)})" for number in ends)


def inverse_log(counts: Sequence[float]) -> list[float]:
    """1 / ln(1.02 + share of the class in all counts) (ENet, arXiv:1606.02147, sec. 5), scaled (`_with_mean_1`)."""
    total = sum(counts)
    return _with_mean_1([1 / math.log(ENET_CONSTANT + count / total) if count else None for count in counts])


def effective_number(counts: Sequence[float], beta: float) -> list[float]:
    """(1 - beta) / (1 - beta^n) (class-balanced loss, arXiv:1901.05555, eq. 3), scaled (`_with_mean_1`)."""
    return _with_mean_1([(1 - beta) / (1 - beta**count) if count else None for count in counts])


def _with_mean_1(weights: Sequence[float | None]) -> list[float]:
    """Scaled so that the mean over the classes that occur is 1, and the loss keeps its size beside others.

    A class that does not occur (None) gets 1: no target has it, so its weight is never used, and 1 is what it would
    have without weights.
    """
    present = [weight for weight in weights if weight is not None]
    mean = math.fsum(present) / len(present)  # never empty: a split without a labelled pixel is refused before
    return [1.0 if weight is None else weight / mean for weight in weights]
