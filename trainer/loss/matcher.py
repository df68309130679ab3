"""Hungarian matching of targets and queries, on which the mask losses are computed.

DETR (arXiv:2005.12872, sec. 3.1) with Mask2Former's costs on points (arXiv:2112.01527, sec. 3.3). The costs of all
predictions of a step are copied to the host at once; scipy solves the assignments there, and one copy returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

from trainer.loss import cpu_kernels
from trainer.loss.packed_targets import ReadableTargets
from trainer.loss.point_sampling import Draw, point_sample

LAYERS_AT_ONCE = 2


class NonFiniteLossError(RuntimeError):
    """Predictions hold NaN or infinity; the message names the prediction (layer) and the image."""


class Prediction(NamedTuple):
    """Logits of one decoder layer."""

    class_logits: Tensor  # [B, Q, C + 1], the last class is "no object"
    mask_logits: Tensor  # [B, Q, h, w]


class HungarianMatcher(Mask2FormerHungarianMatcher):
    """Minimum-cost assignment of targets to queries under mask, dice and class costs.

    `match` handles all predictions of a step. Calling the object itself is transformers' matcher, image by image.
    """

    def __init__(self, num_points: int, mask_coefficient: float, dice_coefficient: float,
                 class_coefficient: float) -> None:
        super().__init__(cost_class=class_coefficient, cost_mask=mask_coefficient, cost_dice=dice_coefficient,
                         num_points=num_points)

    @torch.no_grad()
    def match(self, predictions: Sequence[Prediction], targets: ReadableTargets, draw: Draw) -> Tensor:
        """Matches int64 [L, 3, M] on the predictions' device; the three rows are image, query and target index.

        `predictions` has the final one first, then the auxiliary ones. Each prediction's matches are ordered by image,
        then by query; image b has min(Q, N_b) of them: with more targets than queries, the assignment of least total
        cost leaves some unmatched. Draws [L * B, P, 2] once. Raises NonFiniteLossError; ValueError for a label outside
        [0, C).
        """
        device, batch = predictions[0].class_logits.device, len(targets.counts)
        with torch.autocast(device.type, enabled=False):
            points = draw((len(predictions) * batch, self.num_points, 2))
            points = cpu_kernels.sort_by_location(points) if cpu_kernels.serve(points) else points
            points = points.unflatten(0, (-1, batch))  # [L, B, P, 2]
            costs = self.costs(predictions, targets, points)
        return self.assign(costs, targets, num_labels=predictions[0].class_logits.shape[-1] - 1)

    def assign(self, costs: Tensor, targets: ReadableTargets, num_labels: int) -> Tensor:
        """The assignments of least cost [L, B, Q, Nmax], as `match` returns them: the only wait for the device, and
        the only part that needs the numbers themselves. Raises like `match`."""
        on_host = costs.cpu().numpy()
        _check_finite(on_host, targets, num_labels)
        matches = np.stack([_assign(prediction, targets.counts) for prediction in on_host])  # [L, 3, M]
        return torch.from_numpy(matches).to(costs.device, non_blocking=True)

    @torch.no_grad()
    def costs(self, predictions: Sequence[Prediction], targets: ReadableTargets, points: Tensor) -> Tensor:
        """Cost float32 [L, B, Q, Nmax] of assigning each target to each query, at points [L, B, P, 2] shared by an
        image's queries. A column whose label is outside [0, C) is NaN, to avoid a device-side assert."""
        sums = []
        scratch = points.new_empty(*predictions[0].mask_logits.shape[:2], self.num_points).mT  # [B, P, Q]
        for chunk in in_chunks(range(len(predictions))):
            chunk_points = points[chunk.start : chunk.stop]  # [G, B, P, 2]
            truth = targets.at_points(chunk_points)  # [G, B, Nmax, P]
            counted = targets.counted_at_points(chunk_points)  # [G, B, P]
            rows = rows_of_points(truth, counted)  # [G, B, Nmax + 1, P]
            sums += [sum_over_points_(point_sample(predictions[layer].mask_logits, chunk_points[number]), rows[number],
                                      scratch) for number, layer in enumerate(chunk)]
        all_sums = PointSums(*map(torch.stack, zip(*sums, strict=True)))
        class_logits = torch.stack([prediction.class_logits for prediction in predictions])
        return (self.cost_mask * pairwise_mask_cost(all_sums)
                + self.cost_dice * pairwise_dice_cost(all_sums)
                + self.cost_class * _class_cost(class_logits, targets.labels))


def count_masks(counts: Iterable[int], num_queries: int, rule: str) -> int:
    """Divisor of the mask losses of images with these numbers of targets. Rule "matched" counts targets that get a
    query, min(Q, N) per image (EoMT's loss); "all" counts every target (transformers' loss)."""
    return sum(counts) if rule == "all" else sum(min(count, num_queries) for count in counts)


def in_chunks(layers: range) -> Iterator[range]:
    """A few predictions at a time: all at once would take too much memory, one by one too many small operations."""
    for start in range(0, len(layers), LAYERS_AT_ONCE):
        yield layers[start : start + LAYERS_AT_ONCE]


class PointSums(NamedTuple):
    """Sums over P points per image, from which the pairwise costs are computed; x are the logits at the points.

    Each row is a weighting of the points: one row per target (its truth), and a last one with all points that count.
    """

    softplus: Tensor  # [..., 1, Q]: sum of softplus(x), last row only
    logits: Tensor  # [..., N + 1, Q]: sums of x
    probabilities: Tensor  # [..., N + 1, Q]: sums of sigmoid(x)
    sizes: Tensor  # [..., N + 1, 1]: sums of 1


def rows_of_points(truth: Tensor, counted: Tensor | None) -> Tensor:
    """Rows [..., N + 1, P] of `PointSums` from truth [..., N, P] and `counted` [..., P]: 1 for points that count, 0 for
    others (None: all count)."""
    rows = F.pad(truth, (0, 0, 0, 1), value=1.0)
    return rows if counted is None else rows * counted[..., None, :]


def sum_over_points_(logits: Tensor, rows: Tensor, scratch: Tensor) -> PointSums:
    """`PointSums` of logits [B, Q, P] and rows [B, N + 1, P]. Overwrites `logits` and `scratch` [B, P, Q].

    A few large operations in existing memory: allocating would take longer than the computation itself.
    """
    by_point = logits.mT
    logit_sums = rows.bmm(by_point)
    probability_sums = rows.bmm(torch.sigmoid(by_point, out=scratch))
    softplus = rows[:, -1:].bmm(torch.ops.aten.softplus.out(by_point, out=by_point))
    return PointSums(softplus, logit_sums, probability_sums, rows.sum(-1, keepdim=True))


def pairwise_mask_cost(sums: PointSums) -> Tensor:
    """Binary cross-entropy [..., Q, N] of every query with every mask, averaged over the points that count.

    softplus(-x) y + softplus(x) (1 - y) = softplus(x) - x y, so a single matrix product suffices.
    """
    return ((sums.softplus - sums.logits[..., :-1, :]) / sums.sizes[..., -1:, :].clamp(min=1)).mT


def pairwise_dice_cost(sums: PointSums) -> Tensor:
    """Dice loss [..., Q, N] of every query with every mask, smoothed by one."""
    numerator = 2.0 * sums.probabilities[..., :-1, :]
    denominator = sums.probabilities[..., -1:, :] + sums.sizes[..., :-1, :]
    return (1.0 - (numerator + 1.0) / (denominator + 1.0)).mT


def _class_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """[L, B, Q, C + 1] and [B, Nmax] -> [L, B, Q, Nmax]"""
    num_labels = class_logits.shape[-1] - 1
    columns = labels.clamp(0, num_labels - 1)[:, None].expand(*class_logits.shape[:3], -1)
    cost = -class_logits.float().softmax(-1).gather(-1, columns)
    legal = (labels >= 0) & (labels < num_labels)  # [B, Nmax]
    return cost.masked_fill(~legal[:, None], torch.nan)


def _check_finite(costs: np.ndarray, targets: ReadableTargets, num_labels: int) -> None:
    finite = np.isfinite(costs).all(axis=(2, 3))  # [L, B]
    if finite.all():
        return
    layer, image = (int(index) for index in np.argwhere(~finite)[0])
    labels = targets.labels[image, :targets.counts[image]].tolist()
    if any(not 0 <= label < num_labels for label in labels):
        raise ValueError(f"labels of image {image} in the batch are {labels}, legal: 0 to {num_labels - 1}; "
                         "leave ignored classes out of the targets")
    name = "the final prediction" if layer == 0 else f"aux_outputs[{layer - 1}]"
    raise NonFiniteLossError(f"{name} holds NaN or infinite logits for image {image} in the batch "
                             f"({int((~finite).sum())} of {finite.size} pairs of prediction and image are affected)")


def _assign(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Matches int64 [3, M] (image, query, target) of one prediction's costs [B, Q, Nmax]."""
    pairs = [linear_sum_assignment(cost[:, :count]) for cost, count in zip(costs, counts, strict=True)]
    images = [np.full(len(queries), image) for image, (queries, _) in enumerate(pairs)]
    queries, target_ids = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return np.stack([np.concatenate(images), queries, target_ids]).astype(np.int64)
