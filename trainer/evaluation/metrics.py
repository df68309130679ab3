"""Segmentation metrics computed from a confusion matrix of pixel counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PAIRS_UP_TO = 2000  # classes; with more the matrix would take gigabytes (65,535 classes: 34 GB)


class Areas(NamedTuple):
    """Pixel counts per class, int64 [C] each."""

    intersect: Tensor  # predicted and labelled as the class
    union: Tensor  # predicted or labelled as the class
    pred: Tensor
    label: Tensor


class ConfusedPair(NamedTuple):
    """Pixels of class id `truth` that were predicted as `prediction`, and their share of all pixels of `truth`."""

    truth: int
    prediction: int
    pixels: int
    share: float


class ConfusionMatrix:
    """Pixel counts int64 [C, C] on `device`, row = label, column = prediction; ignored pixels are not counted.

    With more than PAIRS_UP_TO classes the counts are [3, C] instead: intersection, prediction and label. Metrics are
    the same, but which classes were confused is then unknown.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.has_pairs = num_classes <= PAIRS_UP_TO
        rows = num_classes if self.has_pairs else 3
        self.counts = torch.zeros(rows, num_classes, dtype=torch.int64, device=device)  # [C, C] or [3, C]

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Add one or several images: integer maps of equal shape, e.g. [H, W]; values 0 to C - 1, labels also ignored.

        Raises ValueError for other values (predictions in ignored pixels are not checked) and for unequal shapes.
        """
        if pred.shape != label.shape:
            raise ValueError(f"prediction {tuple(pred.shape)} and label {tuple(label.shape)} differ in shape")
        label = label.to(self.counts.device).long()
        counted = label != self.ignore_index
        label = label[counted]
        pred = pred.to(self.counts.device).long()[counted]
        for name, values in (("predictions", pred), ("labels", label)):
            self._check_range(name, values)
        if self.has_pairs:
            cells = torch.bincount(label * self.num_classes + pred, minlength=self.num_classes**2)  # [C * C]
            self.counts += cells.view_as(self.counts)
        else:
            for row, values in zip(self.counts, (label[label == pred], pred, label), strict=True):
                row += torch.bincount(values, minlength=self.num_classes)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix with the same classes."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}")
        self.counts += other.counts.to(self.counts.device)

    def all_reduce(self) -> None:
        """Sum over ranks, in place; a no-op without a process group. Call it once, on every rank."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)

    def areas(self) -> Areas:
        """The four pixel counts per class from which all metrics below are computed."""
        if self.has_pairs:
            intersect, pred, label = self.counts.diagonal(), self.counts.sum(0), self.counts.sum(1)
        else:
            intersect, pred, label = self.counts
        return Areas(intersect, pred + label - intersect, pred, label)

    def summary(self, *, absent_as_zero: bool = False) -> dict[str, Any]:
        """Metrics as fractions 0 to 1: mIoU, fwIoU, aAcc, mAcc, mDice, mF1, mPrecision, mRecall, and the lists
        per_class_iou, per_class_acc, per_class_precision and per_class_dice.

        m... is the mean over the classes for which the ratio is defined: a class that is neither predicted nor labelled
        has IoU NaN and is skipped, one without intersection has no F1. Everything is NaN before the first update.
        fwIoU weights each class's IoU by its share of the labelled pixels.
        With `absent_as_zero` a class with IoU NaN counts as 0 in the mIoU, as in EoMT's evaluation.
        """
        intersect, union, pred, label = (area.double() for area in self.areas())
        iou, recall, precision = intersect / union, intersect / label, intersect / pred  # [C], NaN where 0 / 0
        ratios = {
            "mIoU": iou.nan_to_num(0.0) if absent_as_zero else iou,
            "mAcc": recall,
            "mDice": (dice := 2 * intersect / (pred + label)),
            "mF1": 2 * precision * recall / (precision + recall),
            "mPrecision": precision,
            "mRecall": recall,
        }
        summary: dict[str, Any] = {name: float(ratio.nanmean()) for name, ratio in ratios.items()}
        summary["aAcc"] = float(intersect.sum() / label.sum())
        summary["fwIoU"] = float((iou * label)[label > 0].sum() / label.sum())
        for name, values in (("iou", iou), ("acc", recall), ("precision", precision), ("dice", dice)):
            summary[f"per_class_{name}"] = values.tolist()
        return summary

    def confused_pairs(self, limit: int = 30) -> list[ConfusedPair]:
        """The pairs of different classes with the most pixels, in descending order; none above PAIRS_UP_TO classes."""
        if not self.has_pairs:
            return []
        wrong = self.counts - self.counts.diagonal().diag()  # [C, C]
        pixels, cells = wrong.flatten().topk(min(limit, wrong.numel()))
        labelled = self.areas().label.tolist()
        pairs = []
        for count, cell in zip(pixels.tolist(), cells.tolist(), strict=True):
            truth, prediction = divmod(cell, self.num_classes)
            if count:
                pairs.append(ConfusedPair(truth, prediction, count, count / labelled[truth]))
        return pairs

    def most_frequent_class_miou(self) -> float:
        """The mIoU of predicting the most frequent label everywhere: the baseline of a model that learnt nothing."""
        label = self.areas().label.double()
        # That class's union is every pixel; other classes that occur score zero, absent ones are skipped.
        return float(label.max() / label.sum() / (label > 0).sum())

    def _check_range(self, name: str, values: Tensor) -> None:
        outside = values[(values < 0) | (values >= self.num_classes)]
        if len(outside):
            raise ValueError(f"{len(outside)} {name} are outside 0 to {self.num_classes - 1}, "
                             f"e.g. {int(outside[0])} (ignore_index is {self.ignore_index})")
