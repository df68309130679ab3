"""Replay recorded points in place of random ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.matcher import in_chunks


def in_drawing_order(matcher: Sequence[Tensor], candidates: Sequence[Tensor], rests: Sequence[Tensor]) -> list[Tensor]:
    """Points recorded per prediction, in the order in which a step draws them; in the losses, in chunks."""
    ordered = list(matcher)
    for some in in_chunks(range(len(candidates))):
        ordered += [torch.cat([points[layer] for layer in some]) for points in (candidates, rests)]
    return ordered


def replay(recorded: Sequence[Tensor]) -> Callable[[tuple[int, ...]], Tensor]:
    """Returns the recorded points; one draw may cover several, if their shapes add up."""
    queue = iter(recorded)

    def draw(shape: tuple[int, ...]) -> Tensor:
        points = next(queue)
        while len(points) < shape[0]:
            points = torch.cat([points, next(queue)])
        assert tuple(points.shape) == tuple(shape)
        return points

    return draw


class ReplayedLoss(MaskClassificationLoss):
    """The loss, using recorded points."""

    recorded: Sequence[Tensor]

    def make_draw(self, device: torch.device, generator: torch.Generator | None) -> Callable[[tuple[int, ...]], Tensor]:
        return replay(self.recorded)
