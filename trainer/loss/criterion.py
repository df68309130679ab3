"""What the loop asks of a loss, for every kind of head: a total to differentiate, and named losses to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.config import LossConfig
from trainer.data.targets import Target, label_map_from_segments, segment_map_from_masks
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.matcher import NonFiniteLossError
from trainer.loss.pixel_loss import pixel_cross_entropy
from trainer.models.outputs import MaskOutputs, MaskPrediction, PixelOutputs


class CriterionLoss(NamedTuple):
    """As `StepLoss`."""

    total: Tensor
    losses: dict[str, Tensor]
    unmatched: int = 0  # targets that no query was left for
    problem: str | None = None  # why the losses are NaN, where that is known


class Criterion(Protocol):
    """Losses of one micro-batch."""

    def __call__(
        self, outputs: Any, targets: Sequence[Target], num_masks: Tensor, generator: torch.Generator
    ) -> CriterionLoss:
        """What is differentiated, and named losses; `num_masks` is the number that mask losses are divided by."""


class MaskCriterion(nn.Module):
    """Mask classification on every prediction (Mask2Former, EoMT)."""

    def __init__(self, config: LossConfig, num_classes: int) -> None:
        super().__init__()
        self.loss = MaskClassificationLoss(
            num_points=config.num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
            mask_coefficient=config.mask_coefficient,
            dice_coefficient=config.dice_coefficient,
            class_coefficient=config.class_coefficient,
            num_labels=num_classes,
            no_object_coefficient=config.no_object_coefficient,
            ignore=config.ignore,
            num_masks_counts=config.num_masks_counts,
        )

    def forward(
        self, outputs: MaskOutputs, targets: Sequence[Target], num_masks: Tensor, generator: torch.Generator
    ) -> CriterionLoss:
        try:
            return CriterionLoss(*self.loss.step(outputs, targets, num_masks, generator))
        except NonFiniteLossError as error:
            return self._poisoned(outputs, str(error))

    def _poisoned(self, outputs: MaskOutputs, problem: str) -> CriterionLoss:
        """NaN for everything: this rank can match nothing, but the others wait for its gradients all the same, and so
        learn of it. `NonFiniteGuard` then decides for all ranks alike."""
        items: list[MaskPrediction] = [outputs, *outputs.get("aux_outputs", ())]
        reached = [tensor for item in items for tensor in item.values()
                   if isinstance(tensor, Tensor) and tensor.requires_grad]
        total = torch.stack([tensor.float().sum() for tensor in reached]).sum() * torch.nan
        losses = dict.fromkeys(self.loss.loss_names(len(items)), total.detach())
        return CriterionLoss(total, losses, problem=problem)


class PixelCriterion(nn.Module):
    """Per-pixel cross-entropy (linear head)."""

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, outputs: PixelOutputs, targets: Sequence[Target], num_masks: Tensor, generator: torch.Generator
    ) -> CriterionLoss:
        label_maps = torch.stack([self._label_map(target) for target in targets])  # [B, H, W]
        loss = pixel_cross_entropy(outputs["logits"], label_maps, self.ignore_index)
        return CriterionLoss(loss, {"loss_pixel_cross_entropy": loss.detach()})

    def _label_map(self, target: Target) -> Tensor:
        segments = target["segment_map"] if "segment_map" in target else segment_map_from_masks(target["masks"])
        return label_map_from_segments(segments, target["labels"], self.ignore_index)
