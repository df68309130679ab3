"""The Mask2Former loss: every query predicts a mask and a class, or "no object".

Mask2Former (arXiv:2112.01527, sec. 3.3 and "training settings") on top of MaskFormer's mask classification
(arXiv:2107.06278, sec. 3.2). Every decoder layer's prediction is matched and supervised separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from trainer.data.targets import Target, to_dense
from trainer.loss.mask_gradients import with_gradients
from trainer.loss.matcher import HungarianMatcher, Prediction, count_masks, in_chunks
from trainer.loss.packed_targets import ReadableTargets, pack_targets
from trainer.loss.point_losses import SampledPoints, losses_and_gradients, point_losses, spread_to_pixels
from trainer.loss.point_sampling import Draw, point_sample, sample_uncertain_points, uniform_draw
from trainer.models.outputs import MaskOutputs, MaskPrediction

Indices = Sequence[tuple[Tensor, Tensor]]
"""Matches in transformers' form: (queries, targets) of each image, int64 [min(Q, N)] each."""

_REPLACEABLE = ("loss_masks", "loss_labels", "sample_points_using_uncertainty", "calculate_uncertainty")


class StepLoss(NamedTuple):
    """Loss of one step: a scalar to backpropagate, and its terms, unweighted and detached, for logging."""

    total: Tensor
    losses: dict[str, Tensor]
    unmatched: int  # targets for which no query was left, in images with more targets than queries


class MaskClassificationLoss(Mask2FormerLoss):
    """Mask, dice and class losses of matched predictions, on sampled points and always in float32.

    `forward` and `loss_total` are drop-in replacements for EoMT's class of this name (tue-mps/eomt), a subclass of
    transformers' `Mask2FormerLoss`: signatures, attributes, state dict, random draws and values are the same. `step`
    computes the weighted losses of all predictions of a step at once: the same values with a fraction of the work.

    `ignore`: pixels without any target are "background" of every mask, as in the reference, or "exclude": points in
    them count neither in matching nor in the losses.
    `num_masks_counts`: the divisor of mask and dice losses where an image has more targets than queries: "matched"
    masks, as in EoMT's class, or "all" targets, as in transformers'.
    `class_weights`: one for each label in the class cross-entropy, beside that of "no object" (`empty_weight`); 1 by
    default. They do not enter the matching, as `no_object_coefficient` does not: it asks which query fits a target
    best, not how much the target counts.
    """

    empty_weight: Tensor  # type: ignore[assignment]
    matcher: HungarianMatcher
    num_labels: int

    def __init__(self, num_points: int, oversample_ratio: float, importance_sample_ratio: float,
                 mask_coefficient: float, dice_coefficient: float, class_coefficient: float, num_labels: int,
                 no_object_coefficient: float, *, ignore: str = "background",
                 num_masks_counts: str = "matched", class_weights: Sequence[float] | None = None) -> None:
        nn.Module.__init__(self)  # the parent's needs a transformers config, and builds its own matcher
        for name, value, legal in (("ignore", ignore, ("background", "exclude")),
                                   ("num_masks_counts", num_masks_counts, ("matched", "all"))):
            if value not in legal:
                raise ValueError(f"{name} is {value!r}, legal: {', '.join(legal)}")
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.mask_coefficient = mask_coefficient
        self.dice_coefficient = dice_coefficient
        self.class_coefficient = class_coefficient
        self.num_labels = num_labels
        self.eos_coef = no_object_coefficient
        self.ignore = ignore
        self.num_masks_counts = num_masks_counts
        self.matcher = HungarianMatcher(num_points, mask_coefficient, dice_coefficient, class_coefficient)
        empty_weight = torch.ones(num_labels + 1)  # [C + 1]
        if class_weights is not None:
            if len(class_weights) != num_labels:
                raise ValueError(f"class_weights has {len(class_weights)} numbers, legal: {num_labels}, one per label")
            empty_weight[:-1] = torch.tensor(class_weights)
        empty_weight[-1] = no_object_coefficient
        self.register_buffer("empty_weight", empty_weight)

    @property
    def coefficients(self) -> dict[str, float]:
        """Weight of each loss, by name."""
        return {"loss_mask": self.mask_coefficient, "loss_dice": self.dice_coefficient,
                "loss_cross_entropy": self.class_coefficient}

    def forward(self, masks_queries_logits: Tensor,  # type: ignore[override]
                targets: Sequence[Mapping[str, Any]],
                class_queries_logits: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted scalar losses of one prediction: masks [B, Q, h, w], classes [B, Q, C + 1].

        `targets` are in either form of `trainer.data.targets`. Mask and dice losses are divided by
        `count_masks(targets, Q)`. Synchronises with the device once. Draws the matcher's points, then the losses'.
        A subclass's `loss_masks` or `loss_labels`, or a different `matcher`, is called as in EoMT's class.
        Raises NonFiniteLossError; ValueError for labels outside [0, num_labels) and for inconsistent shapes.
        """
        if class_queries_logits is None:
            raise ValueError("class_queries_logits is None, legal: the class logits [B, Q, C + 1] of this prediction")
        predictions = [Prediction(class_queries_logits, masks_queries_logits)]
        self._check_shapes(predictions, targets)
        device = class_queries_logits.device
        with torch.autocast(device.type, enabled=False):
            if self._has_replaced_parts():
                return self._losses_by_parts(masks_queries_logits.float(), targets, class_queries_logits.float())
            packed = pack_targets(targets, device, exclude_ignored=self.ignore == "exclude")
            draw = self.make_draw(device, None)
            matches = self.matcher.match(predictions, packed, draw)  # [1, 3, M]
            divisor = self.count_masks(targets, masks_queries_logits.shape[1])
            images, queries, target_ids = matches[0]
            maps = masks_queries_logits[images, queries].float()  # [M, h, w]
            sampled = self._sample_points(maps, packed, images, target_ids, draw)
            logits = point_sample(maps[:, None], sampled.points)[:, 0]  # again, for the gradient
            mask, dice = point_losses(sampled._replace(logits=logits))
            classes = self._class_losses(predictions, packed.labels, matches)[0]
        return {"loss_mask": mask.sum() / divisor, "loss_dice": dice.sum() / divisor, "loss_cross_entropy": classes}

    def loss_masks(self, masks_queries_logits: Tensor, mask_labels: Sequence[Tensor],  # type: ignore[override]
                   indices: Indices) -> dict[str, Tensor]:
        """Mask and dice loss of given matches, for code that calls or overrides it: masks [B, Q, h, w], targets float
        [N, H, W] per image. It synchronises with the device and builds dense masks; `forward` and `step` do neither."""
        sums = super().loss_masks(masks_queries_logits, mask_labels, indices, 1)  # type: ignore[arg-type]
        counted = mask_labels if self.num_masks_counts == "all" else [target_ids for _, target_ids in indices]
        divisor = self._mean_over_ranks(sum(map(len, counted)))
        return {name: loss / divisor for name, loss in sums.items()}

    def step(self, outputs: MaskOutputs, targets: Sequence[Target], num_masks: Tensor | float | None = None,
             generator: torch.Generator | None = None) -> StepLoss:
        """The weighted total of all predictions' losses, and each loss by itself: `loss_mask` of the final prediction,
        `loss_mask_3` of `aux_outputs[3]`; likewise `loss_dice` and `loss_cross_entropy`.

        `outputs` is {"pred_logits" [B, Q, C + 1], "pred_masks" [B, Q, h, w], "aux_outputs": list of the same two}.
        Predictions (all or none of them) may also have the factors of their masks, "mask_embeddings" [B, Q, D] and
        "mask_features" [B, D, h, w]; then the gradient flows into these, through the matched queries alone, and
        pred_masks need no gradient.
        `num_masks` divides mask and dice losses; the default is `count_masks(targets, Q)`. Synchronises with the device
        once. Draws the matcher's points of all predictions first, then the losses', a few predictions at a time.
        Raises like `forward`.
        """
        items: list[MaskPrediction] = [outputs, *outputs.get("aux_outputs", ())]
        predictions = [Prediction(item["pred_logits"], item["pred_masks"]) for item in items]
        self._check_shapes(predictions, targets)
        device = predictions[0].class_logits.device
        with torch.autocast(device.type, enabled=False):
            packed = pack_targets(targets, device, exclude_ignored=self.ignore == "exclude")
            divisor = self.count_masks(targets, predictions[0].mask_logits.shape[1]) if num_masks is None else num_masks
            draw = self.make_draw(device, generator)
            matches = self.matcher.match(predictions, packed, draw)  # [L, 3, M]
            mask_losses, gradients = self._mask_losses(predictions, packed, matches, divisor, draw)  # [L, 2]
            class_losses = self._class_losses(predictions, packed.labels, matches)  # [L]
            masks, dice = mask_losses.sum(0)
            value = self.coefficients["loss_mask"] * masks + self.coefficients["loss_dice"] * dice
            total = with_gradients(value, items, matches, gradients)
            total = total + self.coefficients["loss_cross_entropy"] * class_losses.sum()
        named = torch.cat([mask_losses, class_losses.detach()[:, None]], dim=1)  # [L, 3]
        num_queries = predictions[0].mask_logits.shape[1]
        return StepLoss(total, dict(zip(self.loss_names(len(items)), named.flatten().unbind(), strict=True)),
                        sum(max(0, count - num_queries) for count in packed.counts))

    def loss_names(self, predictions: int) -> list[str]:
        """Names of the losses that `step` returns for this number of predictions, the final one's first."""
        suffixes = ["", *(f"_{layer}" for layer in range(predictions - 1))]
        return [f"{name}{suffix}" for suffix in suffixes for name in self.coefficients]

    def loss_total(self, losses_all_layers: Mapping[str, Tensor], log_fn: Callable[..., Any]) -> Tensor | None:
        """Sum of all losses, each times the coefficient for the "mask", "dice" or "cross_entropy" in its name. None if
        there are no losses.

        Logs through a LightningModule's `log`: `log_fn("losses/train_" + name, loss, sync_dist=True)` for each loss,
        unweighted, then `log_fn("losses/train_loss_total", total, sync_dist=True, prog_bar=True)`. Raises ValueError
        for names that contain none of the three.
        """
        total: Tensor | None = None
        for name, loss in losses_all_layers.items():
            log_fn(f"losses/train_{name}", loss, sync_dist=True)
            weighted = self._coefficient(name) * loss
            total = weighted if total is None else total + weighted
        log_fn("losses/train_loss_total", total, sync_dist=True, prog_bar=True)
        return total

    def count_masks(self, targets: Sequence[Mapping[str, Any]], num_queries: int) -> Tensor:
        """Targets counted by `num_masks_counts`, averaged over ranks, float32, at least 1: the same divisor on every
        rank.

        Call it on all ranks or on none: with a process group it performs one all-reduce.
        """
        counts = [len(target["labels"]) for target in targets]
        return self._mean_over_ranks(count_masks(counts, num_queries, self.num_masks_counts))

    def _mean_over_ranks(self, local: int) -> Tensor:
        count = torch.full((), float(local), device=self.empty_weight.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1.0)

    def make_draw(self, device: torch.device, generator: torch.Generator | None) -> Draw:
        """The source of all random points; override it to replay recorded ones."""
        return uniform_draw(device, generator)

    @torch.no_grad()
    def _mask_losses(self, predictions: Sequence[Prediction], targets: ReadableTargets, matches: Tensor,
                     divisor: Tensor | float, draw: Draw) -> tuple[Tensor, Tensor]:
        """Mask and dice loss of each prediction [L, 2], and the gradients of their weighted sum [B, L, N, h, w]."""
        losses: list[Tensor] = []
        batch, _, height, width = predictions[0].mask_logits.shape
        gradients = torch.zeros(batch, len(predictions), targets.labels.shape[1], height, width, device=matches.device)
        layers = torch.arange(len(predictions), device=matches.device)[:, None]
        for chunk in in_chunks(range(len(predictions))):
            images, queries, target_ids = matches[chunk.start : chunk.stop].unbind(1)  # [G, M]
            pair, spread = self._chunk_of_mask_losses([predictions[layer].mask_logits for layer in chunk], targets,
                                                      images, queries, target_ids, divisor, draw)
            losses.append(pair)
            gradients[images, layers[chunk.start : chunk.stop], target_ids] = spread
        return torch.cat(losses), gradients

    def _chunk_of_mask_losses(self, masks: Sequence[Tensor], targets: ReadableTargets, images: Tensor, queries: Tensor,
                              target_ids: Tensor, divisor: Tensor | float, draw: Draw) -> tuple[Tensor, Tensor]:
        """`_mask_losses` of G predictions' masks [B, Q, h, w]: [G, 2] and [G, M, h, w]. A function of its own, so that
        the sampled points are freed after each chunk."""
        maps = torch.stack([layer_masks[images[number], queries[number]]
                            for number, layer_masks in enumerate(masks)]).float().flatten(0, 1)  # [G * M, h, w]
        sampled = self._sample_points(maps, targets, images.flatten(), target_ids.flatten(), draw)
        pair, at_points = losses_and_gradients(sampled, self.coefficients["loss_mask"],
                                               self.coefficients["loss_dice"])
        spread = spread_to_pixels(at_points / divisor, sampled.points, maps.shape[1:])
        return torch.stack(pair).unflatten(1, images.shape).sum(2).T / divisor, spread.unflatten(0, images.shape)

    @torch.no_grad()
    def _sample_points(self, maps: Tensor, targets: ReadableTargets, images: Tensor, target_ids: Tensor,
                       draw: Draw) -> SampledPoints:
        points, logits = sample_uncertain_points(maps, self.num_points, self.oversample_ratio,
                                                 self.importance_sample_ratio, draw)
        return SampledPoints(points, logits, targets.at_matched_points(images, target_ids, points),
                             targets.counted(images, points))

    def _class_losses(self, predictions: Sequence[Prediction], labels: Tensor, matches: Tensor) -> Tensor:
        """Class-weighted mean cross-entropy [L]; the label of unmatched queries is "no object"."""
        logits = torch.stack([prediction.class_logits for prediction in predictions]).float()  # [L, B, Q, C + 1]
        layers = torch.arange(len(predictions), device=logits.device)[:, None]
        images, queries, target_ids = matches.unbind(1)  # [L, M] each
        classes = labels.new_full(logits.shape[:3], self.num_labels)  # [L, B, Q], all "no object"
        classes[layers, images, queries] = labels[images, target_ids]
        weights = self.empty_weight.float()[classes]
        log_likelihood = logits.log_softmax(3).gather(3, classes[..., None])[..., 0]  # [L, B, Q]
        divisor = weights.sum((1, 2)).clamp(min=torch.finfo(weights.dtype).tiny)  # 0 if no query's class counts
        return -(weights * log_likelihood).sum((1, 2)) / divisor

    def _has_replaced_parts(self) -> bool:
        """Whether a subclass or a caller has replaced a part of the loss that `forward` would not call."""
        own = all(getattr(getattr(self, name), "__func__", None) is getattr(MaskClassificationLoss, name)
                  for name in _REPLACEABLE)
        return not own or type(self.matcher) is not HungarianMatcher

    def _losses_by_parts(self, masks: Tensor, targets: Sequence[Target], classes: Tensor) -> dict[str, Tensor]:
        """`forward` composed of its replaceable parts, as in EoMT's class."""
        if self.ignore == "exclude":
            raise ValueError("ignore is 'exclude' but a part of the loss is replaced, legal with replaced parts: "
                             f"background ({', '.join(_REPLACEABLE)} and matcher do not support ignored pixels)")
        dense = [to_dense(target) for target in targets]
        mask_labels = [target["masks"].to(masks) for target in dense]
        class_labels = [target["labels"].long().to(masks.device) for target in dense]
        indices = self.matcher(masks_queries_logits=masks, class_queries_logits=classes, mask_labels=mask_labels,
                               class_labels=class_labels)
        return {**self.loss_masks(masks, mask_labels, indices), **self.loss_labels(classes, class_labels, indices)}

    def _coefficient(self, name: str) -> float:
        for part, coefficient in (("mask", self.mask_coefficient), ("dice", self.dice_coefficient),
                                  ("cross_entropy", self.class_coefficient)):
            if part in name:
                return coefficient
        raise ValueError(f"loss {name!r} has no coefficient, legal: names that contain mask, dice or cross_entropy")

    def _check_shapes(self, predictions: Sequence[Prediction], targets: Sequence[Any]) -> None:
        for class_logits, mask_logits in predictions:
            if class_logits.shape[2] != self.num_labels + 1:
                raise ValueError(f"pred_logits have {class_logits.shape[2]} classes, legal: {self.num_labels} labels "
                                 "and 'no object'")
            if class_logits.shape[:2] != mask_logits.shape[:2] or len(class_logits) != len(targets):
                raise ValueError(f"pred_logits {tuple(class_logits.shape)}, pred_masks {tuple(mask_logits.shape)} "
                                 f"and {len(targets)} targets differ in the number of images or queries")
