"""Score each single image beside the metrics of the whole split; joins what the ranks found."""

from __future__ import annotations

import torch
from torch import Tensor

from shards.looking.image_scores import ImageScore
from trainer.distributed import DistContext
from trainer.evaluation.metrics import ConfusionMatrix


class ImageScores:
    """Collects the scores of this rank's images; `gather` joins those of all ranks."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._keys: dict[int, bytes] = {}  # by number
        self._scores: list[Tensor] = []  # float64 [2] each, in the order of `_keys`; not yet copied from the device

    def add(self, number: int, key: str, confusion: ConfusionMatrix) -> None:
        """Add an image, given the counts of this image alone."""
        intersect, union, _, label = (area.double() for area in confusion.areas())
        iou = torch.where(label > 0, intersect / union, torch.nan)  # [C]
        self._keys[number] = key.encode()
        self._scores.append(torch.stack((iou.nanmean(), intersect.sum() / label.sum())))

    def gather(self, context: DistContext) -> list[ImageScore]:
        """The scores of all ranks' images, numbered from 0 without gaps. Call it on every rank.

        Numbers and keys travel as plain tensors, each rank filling its own places: gathering objects would unpickle.
        """
        last = torch.tensor([-1] * context.world_size, device=context.device)
        last[context.rank] = max(self._keys, default=-1)
        total = int(context.all_reduce_sum(last + 1).max())
        table = torch.zeros(total, 3, dtype=torch.float64, device=context.device)  # bytes of the key, mIoU, accuracy
        for (number, key), scores in zip(self._keys.items(), self._scores, strict=True):
            table[number, 0] = len(key)
            table[number, 1:] = scores
        rows = context.all_reduce_sum(table).tolist()
        ends = [0]
        for length, *_ in rows:
            ends.append(ends[-1] + int(length))
        text = torch.zeros(ends[-1], dtype=torch.uint8)
        for number, key in self._keys.items():
            text[ends[number] : ends[number + 1]] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        keys = bytes(context.all_reduce_sum(text.to(context.device)).cpu().numpy())
        return [ImageScore(self.split, number, keys[ends[number] : ends[number + 1]].decode(), miou, accuracy)
                for number, (_, miou, accuracy) in enumerate(rows)]
