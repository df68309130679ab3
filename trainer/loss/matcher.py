"""One target to at most one query: the assignment that the mask losses are computed on.

DETR (arXiv:2005.12872, sec. 3.1) with Mask2Former's costs on points (arXiv:2112.01527, sec. 3.3). Costs of all
predictions of a step go to the host in one copy; the assignments, found there by scipy, come back in another.
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
    """Cheapest assignment of targets to queries under mask, dice and class costs.

    `match` does it for all predictions of a step. Called as transformers' matcher it is that one, image by image.
    """

    def __init__(self, num_points: int, mask_coefficient: float, dice_coefficient: float,
                 class_coefficient: float) -> None:
        super().__init__(cost_class=class_coefficient, cost_mask=mask_coefficient, cost_dice=dice_coefficient,
                         num_points=num_points)

    @torch.no_grad()
    def match(self, predictions: Sequence[Prediction], targets: ReadableTargets, draw: Draw) -> Tensor:
        """Matches int64 [L, 3, M] on the predictions' device; the three rows are image, query and target index.

        `predictions` holds the final one first, then the auxiliary ones. Per prediction, matches are ordered by image,
        then by query; image b has min(Q, N_b) of them: with more targets than queries the costliest targets stay
        unmatched. Draws [L * B, P, 2] once. Raises NonFiniteLossError; ValueError for a label outside [0, C).
        """
        device, batch = predictions[0].class_logits.device, len(targets.counts)
        with torch.autocast(device.type, enabled=False):
            points = draw((len(predictions) * batch, self.num_points, 2))
            points = cpu_kernels.sort_by_location(points) if cpu_kernels.serve(points) else points
            points = points.unflatten(0, (-1, batch))  # [L, B, P, 2]
            costs = self.costs(predictions, targets, points)
        on_host = costs.cpu().numpy()  # the one wait for the device
        _check_finite(on_host, targets, num_labels=predictions[0].class_logits.shape[-1] - 1)
        matches = np.stack([_assign(prediction, targets.counts) for prediction in on_host])  # [L, 3, M]
        return torch.from_numpy(matches).to(device, non_blocking=True)

    @torch.no_grad()
    def costs(self, predictions: Sequence[Prediction], targets: ReadableTargets, points: Tensor) -> Tensor:
        """Cost float32 [L, B, Q, Nmax] of giving each target to each query, from points [L, B, P, 2] shared by an
        image's queries. A column whose label is outside [0, C) is NaN, instead of asserting on the device."""
        sums = []
        spare = points.new_empty(*predictions[0].mask_logits.shape[:2], self.num_points).mT  # [B, P, Q]
        for some in in_chunks(range(len(predictions))):
            chosen = points[some.start : some.stop]  # [G, B, P, 2]
            truth = targets.at_points(chosen)  # [G, B, Nmax, P]
            counted = targets.counted_at_points(chosen)  # [G, B, P]
            rows = rows_of_points(truth, counted)  # [G, B, Nmax + 1, P]
            sums += [sum_over_points_(point_sample(predictions[layer].mask_logits, chosen[place]), rows[place], spare)
                     for place, layer in enumerate(some)]
        all_sums = PointSums(*map(torch.stack, zip(*sums, strict=True)))
        class_logits = torch.stack([prediction.class_logits for prediction in predictions])
        return (self.cost_mask * pairwise_mask_cost(all_sums)
                + self.cost_dice * pairwise_dice_cost(all_sums)
                + self.cost_class * _class_cost(class_logits, targets.labels))


def count_masks(counts: Iterable[int], num_queries: int, rule: str) -> int:
    """What mask losses of images with so many targets are divided by: by the rule "matched" the targets that find a
    query, min(Q, N) of an image (EoMT's loss), by "all" every target (transformers' loss)."""
    return sum(counts) if rule == "all" else sum(min(count, num_queries) for count in counts)


def in_chunks(layers: range) -> Iterator[range]:
    """A few predictions at a time: all at once would fill the memory with points, one by one is many small steps."""
    for start in range(0, len(layers), LAYERS_AT_ONCE):
        yield layers[start : start + LAYERS_AT_ONCE]


class PointSums(NamedTuple):
    """All that the pairwise costs need to know of the points, P of which lie in each image; x are logits.

    A row says which points it sums over: one row for each of N targets, and a last one for all points that count.
    """

    softplus: Tensor  # [..., 1, Q], of x, over the last row
    logits: Tensor  # [..., N + 1, Q], of x
    probabilities: Tensor  # [..., N + 1, Q], of sigmoid(x)
    sizes: Tensor  # [..., N + 1, 1], of 1


def rows_of_points(truth: Tensor, counted: Tensor | None) -> Tensor:
    """Truth [..., N, P] and `counted` [..., P], 1 for points that count and else 0 (None: all do), as rows
    [..., N + 1, P]."""
    rows = F.pad(truth, (0, 0, 0, 1), value=1.0)
    return rows if counted is None else rows * counted[..., None, :]


def sum_over_points_(logits: Tensor, rows: Tensor, spare: Tensor) -> PointSums:
    """Logits [B, Q, P], which are overwritten as is `spare` [B, P, Q], and rows [B, N + 1, P].

    Few, large steps in memory that is there already: new memory costs more time than what is computed in it.
    """
    by_point = logits.mT
    of_logits = rows.bmm(by_point)
    of_probabilities = rows.bmm(torch.sigmoid(by_point, out=spare))
    softplus = rows[:, -1:].bmm(torch.ops.aten.softplus.out(by_point, out=by_point))
    return PointSums(softplus, of_logits, of_probabilities, rows.sum(-1, keepdim=True))


def pairwise_mask_cost(sums: PointSums) -> Tensor:
    """Binary cross-entropy [..., Q, N] of every query with every mask, the mean over points that count.

    softplus(-x) y + softplus(x) (1 - y) = softplus(x) - x y leaves one product of matrices.
    """
    return ((sums.softplus - sums.logits[..., :-1, :]) / sums.sizes[..., -1:, :].clamp(min=1)).mT


def pairwise_dice_cost(sums: PointSums) -> Tensor:
    """Dice loss [..., Q, N] of every query with every mask, smoothed by one."""
    both = 2.0 * sums.probabilities[..., :-1, :]
    either = sums.probabilities[..., -1:, :] + sums.sizes[..., :-1, :]
    return (1.0 - (both + 1.0) / (either + 1.0)).mT


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
    queries, chosen = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return np.stack([np.concatenate(images), queries, chosen]).astype(np.int64)
