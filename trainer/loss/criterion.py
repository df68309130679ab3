"""The training loop's interface to the loss of each kind of head: a total to backpropagate, and named losses to log."""

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
    """See `StepLoss`."""

    total: Tensor
    losses: dict[str, Tensor]
    unmatched: int = 0  # targets for which no query was left
    problem: str | None = None  # why the losses are NaN, if known


class Criterion(Protocol):
    """Losses of one micro-batch."""

    def __call__(
        self, outputs: Any, targets: Sequence[Target], num_masks: Tensor, generator: torch.Generator
    ) -> CriterionLoss:
        """The total and named losses of a micro-batch; `num_masks` is the divisor of mask losses."""


class MaskCriterion(nn.Module):
    """Mask classification on every prediction (Mask2Former, EoMT)."""

    def __init__(self, config: LossConfig, num_classes: int, class_weights: Sequence[float] | None = None) -> None:
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
            class_weights=class_weights,
        )

    def forward(
        self, outputs: MaskOutputs, targets: Sequence[Target], num_masks: Tensor, generator: torch.Generator
    ) -> CriterionLoss:
        try:
            return CriterionLoss(*self.loss.step(outputs, targets, num_masks, generator))
        except NonFiniteLossError as error:
            return self._poisoned(outputs, str(error))

    def _poisoned(self, outputs: MaskOutputs, problem: str) -> CriterionLoss:
        """NaN for every loss: this rank cannot match, but the others wait for its gradients, and the NaN reaches them
        that way. `NonFiniteGuard` then makes the same decision on all ranks."""
        items: list[MaskPrediction] = [outputs, *outputs.get("aux_outputs", ())]
        differentiable = [tensor for item in items for tensor in item.values()
                          if isinstance(tensor, Tensor) and tensor.requires_grad]
        total = torch.stack([tensor.float().sum() for tensor in differentiable]).sum() * torch.nan
        losses = dict.fromkeys(self.loss.loss_names(len(items)), total.detach())
        return CriterionLoss(total, losses, problem=problem)


class PixelCriterion(nn.Module):
    """Per-pixel cross-entropy (linear head)."""

    class_weights: Tensor | None  # float32 [C]

    def __init__(self, ignore_index: int, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights))
        self.ignore_index = ignore_index

    def forward(
        self, outputs: PixelOutputs, targets: Sequence[Target], num_masks: Tensor, generator: torch.Generator
    ) -> CriterionLoss:
        label_maps = torch.stack([self._label_map(target) for target in targets])  # [B, H, W]
        loss = pixel_cross_entropy(outputs["logits"], label_maps, self.ignore_index, self.class_weights)
        return CriterionLoss(loss, {"loss_pixel_cross_entropy": loss.detach()})

    def _label_map(self, target: Target) -> Tensor:
        segments = target["segment_map"] if "segment_map" in target else segment_map_from_masks(target["masks"])
        return label_map_from_segments(segments, target["labels"], self.ignore_index)
