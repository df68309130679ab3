"""Score each single image beside the metrics of the whole split; joins what the ranks found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.looking.image_scores import ImageScore
from trainer.distributed import DistContext
from trainer.evaluation.counts import Counts


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """The pixel counts of all images, by number from 0."""

    split: str
    keys: list[str]
    areas: npt.NDArray[np.int64]  # [N, 3, C]: intersection, predicted and labelled pixels of each class

    def iou(self) -> npt.NDArray[np.float64]:
        """[N, C]: IoU of the classes that are labelled in an image, else NaN."""
        intersect, pred, label = self.areas.transpose(1, 0, 2).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.where(label > 0, intersect / (pred + label - intersect), np.nan)

    def scores(self) -> list[ImageScore]:
        """One row per image."""
        iou = self.iou()
        labelled = ~np.isnan(iou)
        with np.errstate(invalid="ignore"):
            means = np.where(labelled, iou, 0.0).sum(1) / labelled.sum(1)
            accuracy = self.areas[:, 0].sum(1) / self.areas[:, 2].sum(1)
        return [ImageScore(self.split, number, key, miou, correct) for number, (key, miou, correct)
                in enumerate(zip(self.keys, means.tolist(), accuracy.tolist(), strict=True))]


class ImageScores:
    """Collects the counts of this rank's images; `gather` joins those of all ranks."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._keys: dict[int, bytes] = {}  # by number
        self._areas: list[Tensor] = []  # int32 [3, C] each, in the order of `_keys`; not yet copied from the device

    def add(self, number: int, key: str, counts: Counts) -> None:
        """Add an image, given the counts of this image alone."""
        intersect, _, pred, label = counts.confusion.areas()
        self._keys[number] = key.encode()
        self._areas.append(torch.stack((intersect, pred, label)).int())

    def gather(self, context: DistContext, num_classes: int) -> ScoredImages:
        """All ranks' images, numbered from 0 without gaps. Call it on every rank.

        Numbers and keys travel as plain tensors, each rank filling its own places: gathering objects would unpickle.
        """
        last = torch.tensor([-1] * context.world_size, device=context.device)
        last[context.rank] = max(self._keys, default=-1)
        total = int(context.all_reduce_sum(last + 1).max())
        areas = torch.zeros(total, 3, num_classes, dtype=torch.int32, device=context.device)
        lengths = torch.zeros(total, dtype=torch.int64, device=context.device)
        for (number, key), counts in zip(self._keys.items(), self._areas, strict=True):
            areas[number], lengths[number] = counts, len(key)
        areas = context.all_reduce_sum(areas)
        ends = [0, *context.all_reduce_sum(lengths).cumsum(0).tolist()]
        text = torch.zeros(ends[-1], dtype=torch.uint8)
        for number, key in self._keys.items():
            text[ends[number] : ends[number + 1]] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        keys = bytes(context.all_reduce_sum(text.to(context.device)).cpu().numpy())
        return ScoredImages(split=self.split, areas=areas.cpu().numpy().astype(np.int64),
                            keys=[keys[ends[n] : ends[n + 1]].decode() for n in range(total)])
