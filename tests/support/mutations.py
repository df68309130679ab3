"""Small mistakes to plant in the loss, to test the tests: every comparison must notice the ones that concern it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.loss import mask_gradients, matcher, point_losses
from trainer.loss.mask_classification_loss import MaskClassificationLoss

_WRONG = 1.005


def _scaled(found: Any) -> Any:
    return _WRONG * found


def _first_scaled(found: Any) -> Any:
    return (_WRONG * found[0], *found[1:])


def _second_scaled(found: Any) -> Any:
    return (found[0], _WRONG * found[1], *found[2:])


def _targets_swapped(found: Any) -> Any:
    found = found.copy()
    found[2, :2] = found[2, 1::-1]  # of the first two matches, both of the first image
    return found


_PLACES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "mask cost": (matcher, "pairwise_mask_cost", _scaled),
    "dice cost": (matcher, "pairwise_dice_cost", _scaled),
    "class cost": (matcher, "_class_cost", _scaled),
    "assignment": (matcher, "_assign", _targets_swapped),
    "mask loss": (point_losses, "_losses", _first_scaled),
    "dice loss": (point_losses, "_losses", _second_scaled),
    "class loss": (MaskClassificationLoss, "_class_losses", _scaled),
    "divisor": (MaskClassificationLoss, "count_masks", _scaled),
    "gradient at points": ("trainer.loss.mask_classification_loss", "losses_and_gradients", _second_scaled),
    "gradient of pixels": ("trainer.loss.mask_classification_loss", "spread_to_pixels", _scaled),
}


def mutate(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make one part of the loss wrong until the end of the test."""
    if name == "gradient of factors":
        right = mask_gradients._FactorGradients.backward
        monkeypatch.setattr(mask_gradients._FactorGradients, "backward",
                            staticmethod(lambda ctx, upstream: right(ctx, _WRONG * upstream)))
    elif name == "costs in bf16":
        _blur_costs(monkeypatch)
    else:
        place, attribute, change = _PLACES[name]
        target = f"{place}.{attribute}" if isinstance(place, str) else None
        right = getattr(point_losses if target else place, attribute)
        wrong = lambda *args, **kwargs: change(right(*args, **kwargs))  # noqa: E731
        if target:
            monkeypatch.setattr(target, wrong)
        else:
            monkeypatch.setattr(place, attribute, wrong)


def _blur_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if sums over points had low precision: all that matters is that they are off, in bf16 only."""
    right = matcher.HungarianMatcher.costs

    def blurred(self: Any, predictions: Any, *rest: Any) -> torch.Tensor:
        costs = right(self, predictions, *rest)
        low = predictions[0].mask_logits.dtype == torch.bfloat16
        return costs + 5 * torch.rand(costs.shape, generator=torch.Generator().manual_seed(0)) if low else costs

    monkeypatch.setattr(matcher.HungarianMatcher, "costs", blurred)
