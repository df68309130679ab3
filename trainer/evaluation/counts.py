"""Everything an evaluation counts, for one image or many: integers in one tensor, summed over ranks at once.

Integers add up to the same in any order, so metrics do not depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.evaluation.boundary import boundary_pixels, boundary_width
from trainer.evaluation.metrics import Areas, ConfusionMatrix

BINS = 15  # of confidence, equally wide
_UNIT = 1 << 16  # confidences are summed as multiples of 1 / _UNIT


class Counts:
    """Counts of pixels, int64: of each pair of classes, of classes near boundaries, and of confidences.

    confusion    pairs of label and prediction
    boundary     [3, C]: of each class near a contour: intersection, prediction, label
    calibration  [3, BINS]: pixels by confidence, those predicted correctly, and the sum of confidences in 1 / 65,536
    images       [1]
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.confusion = ConfusionMatrix(num_classes, ignore_index, device)
        pairs = self.confusion.counts
        sizes = (pairs.numel(), 3 * num_classes, 3 * BINS, 1)
        self.data = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        pair_counts, boundary, calibration, self.images = self.data.split(sizes)  # views
        self.confusion.counts = pair_counts.view_as(pairs)
        self.boundary, self.calibration = boundary.view(3, num_classes), calibration.view(3, BINS)

    def add_image(self, label_map: Tensor, predicted: Tensor, confidence: Tensor | None = None) -> None:
        """Add an image: labels and predicted class ids, integers [H, W], and the confidence [H, W] in each, 0 to 1.
        Raises ValueError as `ConfusionMatrix.update`."""
        device, matrix = self.data.device, self.confusion
        label, pred = label_map.to(device).long(), predicted.to(device).long()
        matrix.update(pred, label)
        counted = label != matrix.ignore_index
        self._add_boundary(label, torch.where(counted, pred, matrix.ignore_index), counted)
        if confidence is not None:
            self._add_confidence(confidence.to(device)[counted], (pred == label)[counted])
        self.images += 1

    def _add_boundary(self, label: Tensor, pred: Tensor, counted: Tensor) -> None:
        distance = boundary_width(*label.shape)
        near_label, near_pred = (boundary_pixels(ids, distance) & counted for ids in (label, pred))
        chosen = (label[near_label & near_pred & (label == pred)], pred[near_pred], label[near_label])
        for row, ids in zip(self.boundary, chosen, strict=True):
            row += torch.bincount(ids, minlength=len(row))

    def _add_confidence(self, confidence: Tensor, correct: Tensor) -> None:
        steps = (confidence.double().clamp(0, 1) * _UNIT).round().long()
        bins = (steps * BINS // _UNIT).clamp_(max=BINS - 1)
        self.calibration[0] += torch.bincount(bins, minlength=BINS)
        self.calibration[1] += torch.bincount(bins[correct], minlength=BINS)
        self.calibration[2].index_add_(0, bins, steps)

    def merge(self, other: Counts) -> None:
        """Add the counts of other images."""
        self.data += other.data.to(self.data.device)

    def all_reduce(self) -> None:
        """Sum over ranks, in place; a no-op without a process group. Call it once, on every rank."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.data)

    def summary(self, *, absent_as_zero: bool = False) -> dict[str, Any]:
        """All metrics; see `ConfusionMatrix.summary`, and besides

        mBoundaryIoU, per_class_boundary_iou   IoU near contours (see `trainer.evaluation.boundary`)
        ECE          expected calibration error (arXiv:1706.04599): the difference between confidence and accuracy in
                     each bin, averaged over pixels; NaN without confidences
        calibration  per bin: share of pixels, accuracy and mean confidence
        """
        intersect, pred, label = self.boundary.double()
        boundary = intersect / Areas(intersect, pred + label - intersect, pred, label).union
        pixels, correct, confidence = self.calibration.double()
        accuracy, mean = correct / pixels, confidence / _UNIT / pixels
        gaps = (correct - confidence / _UNIT).abs().sum() / pixels.sum()
        return {
            **self.confusion.summary(absent_as_zero=absent_as_zero),
            "mBoundaryIoU": float(boundary.nanmean()), "per_class_boundary_iou": boundary.tolist(),
            "ECE": float(gaps),
            "calibration": torch.stack((pixels / pixels.sum(), accuracy, mean), 1).tolist(),
            "images": int(self.images),
        }  # fmt: skip
