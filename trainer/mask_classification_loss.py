"""The Mask2Former loss: every query predicts a mask and a class, or "no object".

Mask2Former (arXiv:2112.01527, sec. 3.3 and "training settings") on top of MaskFormer's mask classification
(arXiv:2107.06278, sec. 3.2). Every decoder layer's prediction is matched and supervised on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.matcher import HungarianMatcher, Prediction
from trainer.point_sampling import Draw, point_sample, sample_uncertain_points, uniform_draw
from trainer.targets import PackedTargets, Target, pack_targets


class MaskClassificationLoss(nn.Module):
    """Mask, dice and class losses of matched predictions, on sampled points and always in float32."""

    empty_weight: Tensor

    def __init__(self, num_points: int, oversample_ratio: float, importance_sample_ratio: float,
                 mask_coefficient: float, dice_coefficient: float, class_coefficient: float, num_labels: int,
                 no_object_coefficient: float) -> None:
        super().__init__()
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.num_labels = num_labels
        self.coefficients = {"loss_mask": mask_coefficient, "loss_dice": dice_coefficient,
                             "loss_cross_entropy": class_coefficient}
        self.matcher = HungarianMatcher(num_points, mask_coefficient, dice_coefficient, class_coefficient)
        empty_weight = torch.ones(num_labels + 1)  # [C + 1]
        empty_weight[-1] = no_object_coefficient
        self.register_buffer("empty_weight", empty_weight, persistent=False)

    def forward(self, masks_queries_logits: Tensor, targets: Sequence[Target],
                class_queries_logits: Tensor) -> dict[str, Tensor]:
        """Unweighted scalar losses of one prediction: masks [B, Q, h, w], classes [B, Q, C + 1]."""
        return self.loss_for_outputs({"pred_masks": masks_queries_logits, "pred_logits": class_queries_logits}, targets)

    def loss_for_outputs(self, outputs: Mapping[str, Any], targets: Sequence[Target],
                         num_masks: Tensor | float | None = None,
                         generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Unweighted scalar losses of all predictions of a step: `loss_mask` is the final one's, `loss_mask_3` is
        that of `aux_outputs[3]`; likewise `loss_dice` and `loss_cross_entropy`.

        `outputs` is {"pred_logits" [B, Q, C + 1], "pred_masks" [B, Q, h, w], "aux_outputs": list of the same two};
        targets are in either form of `trainer.targets`. `num_masks` divides mask and dice losses; by default it
        is `count_masks(targets)`. Waits for the device once. Draws the matcher's points of all predictions first,
        then prediction by prediction those of the losses. Raises NonFiniteLossError; ValueError for labels outside
        [0, num_labels) and shapes that do not fit.
        """
        predictions = [Prediction(item["pred_logits"], item["pred_masks"])
                       for item in (outputs, *outputs.get("aux_outputs", ()))]
        self._check_shapes(predictions, targets)
        device = predictions[0].class_logits.device
        with torch.autocast(device.type, enabled=False):
            packed = pack_targets(targets, device)
            divisor = self.count_masks(targets) if num_masks is None else num_masks
            draw = self.make_draw(device, generator)
            losses: dict[str, Tensor] = {}
            matches = self.matcher(predictions, packed, draw)  # [L, 3, M]
            for layer, (prediction, match) in enumerate(zip(predictions, matches, strict=True)):
                suffix = f"_{layer - 1}" if layer else ""
                for name, value in self._prediction_losses(prediction, packed, match, divisor, draw).items():
                    losses[f"{name}{suffix}"] = value
        return losses

    def loss_total(self, losses_all_layers: Mapping[str, Tensor], log_fn: Callable[[str, Tensor], Any]) -> Tensor:
        """Sum of all losses, each times the coefficient its name calls for; `log_fn(name, loss)` sees the unweighted
        ones. Names are those of `forward`, alone or followed by a suffix such as `_3`. Raises ValueError for others."""
        weighted = []
        for name, loss in losses_all_layers.items():
            log_fn(name, loss)
            weighted.append(self._coefficient(name) * loss)
        return torch.stack(weighted).sum()

    def count_masks(self, targets: Sequence[Target]) -> Tensor:
        """Mean number of targets per rank, float32, at least 1: a divisor that is the same on every rank.

        Call it on every rank or on none; it communicates once when a process group exists.
        """
        total = float(sum(len(target["labels"]) for target in targets))
        count = torch.full((), total, device=self.empty_weight.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1.0)

    def make_draw(self, device: torch.device, generator: torch.Generator | None) -> Draw:
        """The source of all random points; override it to replay recorded ones."""
        return uniform_draw(device, generator)

    def _prediction_losses(self, prediction: Prediction, targets: PackedTargets, match: Tensor,
                           divisor: Tensor | float, draw: Draw) -> dict[str, Tensor]:
        images, queries, chosen = match  # [M] each
        mask_logits = prediction.mask_logits[images, queries].float()  # [M, h, w]
        points = sample_uncertain_points(mask_logits, self.num_points, self.oversample_ratio,
                                         self.importance_sample_ratio, draw)  # [M, P, 2]
        logits = point_sample(mask_logits[:, None], points)[:, 0]  # [M, P]
        truth = point_sample(targets.masks[images, chosen][:, None], points)[:, 0]  # [M, P]
        return {
            "loss_mask": mask_losses(logits, truth).sum() / divisor,
            "loss_dice": dice_losses(logits, truth).sum() / divisor,
            "loss_cross_entropy": self._class_loss(prediction.class_logits, targets.labels, match),
        }

    def _class_loss(self, class_logits: Tensor, labels: Tensor, match: Tensor) -> Tensor:
        images, queries, chosen = match
        classes = labels.new_full(class_logits.shape[:2], self.num_labels)  # [B, Q], all "no object"
        classes[images, queries] = labels[images, chosen]
        return F.cross_entropy(class_logits.float().transpose(1, 2), classes, self.empty_weight.float())

    def _coefficient(self, name: str) -> float:
        for known, coefficient in self.coefficients.items():
            if name == known or name.startswith(f"{known}_"):
                return coefficient
        raise ValueError(f"loss {name!r} has no coefficient, legal: {', '.join(self.coefficients)} and these "
                         "with a suffix such as _3")

    def _check_shapes(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        for class_logits, mask_logits in predictions:
            if class_logits.shape[2] != self.num_labels + 1:
                raise ValueError(f"pred_logits have {class_logits.shape[2]} classes, legal: {self.num_labels} labels "
                                 "and 'no object'")
            if class_logits.shape[:2] != mask_logits.shape[:2] or len(class_logits) != len(targets):
                raise ValueError(f"pred_logits {tuple(class_logits.shape)}, pred_masks {tuple(mask_logits.shape)} "
                                 f"and {len(targets)} targets disagree about images or queries")


def mask_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy [M] of mask logits [M, P] with bilinear truth [M, P] in 0..1, mean over points."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)


def dice_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice loss [M] of mask logits [M, P] with bilinear truth [M, P] (V-Net, arXiv:1606.04797), smoothed by one."""
    probabilities = logits.sigmoid()
    both = 2.0 * (probabilities * truth).sum(1)
    either = probabilities.sum(1) + truth.sum(1)
    return 1.0 - (both + 1.0) / (either + 1.0)
