"""A micro-batch: as loader workers send it, and what the training device still does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shards.crops.resampling import PADDING_COLOR
from trainer.data.resampling import Resize, resample
from trainer.data.targets import Target
from trainer.data.transforms import mirror_left, normalize, paddings, photometric_distort


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. `labels` of all images are concatenated; `counts` has the number per image."""

    number: int  # of the micro-batch in the run
    keys: list[str]
    images: Tensor  # uint8 [B, 3, H, W], channels last in memory, as decoded: the device transposes. With regions:
    # [B, 3, 0, 0] until `to`
    segment_maps: Tensor | None  # uint8 (int32 beyond 255 labels) [B, H, W]; None with dense targets
    masks: list[Tensor] | None  # bool [N, H, W] per image; None with segment maps
    labels: Tensor  # int64 [sum of counts]
    counts: list[int]  # N per image
    photometric: Tensor | None  # float32 [B, K], parameters of `transforms.photometric_distort`
    valid: list[tuple[int, int]]  # per image: height and width of the unpadded part, at the top left
    mirrored: list[bool]  # per image: to be mirrored by `to`, with its targets
    skipped: list[str]  # errors of corrupt samples that were replaced
    regions: list[Tensor] = field(default_factory=list)  # uint8 [h, w, 3] per image, to be resized by `to`; or none
    resizes: list[Resize] = field(default_factory=list)  # per region

    def targets(self) -> list[Target]:
        """Per image `{"segment_map" [H, W], "labels" [N]}`, or `{"masks" [N, H, W], "labels" [N]}` if dense."""
        labels = self.labels.split(self.counts)
        if self.masks is not None:
            return [{"masks": masks, "labels": ids} for masks, ids in zip(self.masks, labels, strict=True)]
        assert self.segment_maps is not None
        return [{"segment_map": segments, "labels": ids} for segments, ids in zip(self.segment_maps, labels,
                                                                                 strict=True)]

    def to(self, device: torch.device) -> Batch:
        """Copy to the device asynchronously (from pinned memory on CUDA), and do there what is pending: resizing,
        mirroring."""
        moved = self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.regions:
            moved = moved._resized()
        return moved._mirrored() if any(self.mirrored) else moved

    def _resized(self) -> Batch:
        segment_maps = self.segment_maps if self.segment_maps is not None else self.masks
        assert segment_maps is not None
        device, (height, width) = self.regions[0].device, segment_maps[0].shape[-2:]
        levels = torch.cat([torch.full((1,), level, dtype=torch.uint8, device=device) for level in PADDING_COLOR])
        images = levels.expand(len(self.regions), height, width, 3).clone()
        for image, region, resize in zip(images, self.regions, self.resizes, strict=True):
            image[: resize.height, : resize.width] = resample(region, resize)
        return replace(self, images=images.permute(0, 3, 1, 2), regions=[], resizes=[])

    def _mirrored(self) -> Batch:
        widths = [width if flip else 0 for (_, width), flip in zip(self.valid, self.mirrored, strict=True)]

        def mirror(pictures: Iterable[Tensor], dim: int) -> list[Tensor]:
            return [mirror_left(picture, width, dim) for picture, width in zip(pictures, widths, strict=True)]

        return replace(
            self,
            images=torch.stack(mirror(self.images.permute(0, 2, 3, 1), 1)).permute(0, 3, 1, 2),
            segment_maps=None if self.segment_maps is None else torch.stack(mirror(self.segment_maps, 1)),
            masks=None if self.masks is None else mirror(self.masks, 2),
            mirrored=[False] * len(self.mirrored),
        )

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's pinning thread."""
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self, change: Callable[[Any], Any]) -> Batch:
        """A copy with `change` applied to each tensor."""
        return replace(
            self,
            images=change(self.images),
            regions=[change(region) for region in self.regions],
            segment_maps=None if self.segment_maps is None else change(self.segment_maps),
            masks=None if self.masks is None else [change(masks) for masks in self.masks],
            labels=change(self.labels),
            photometric=None if self.photometric is None else change(self.photometric),
        )


def augmented_images(batch: Batch) -> Tensor:
    """uint8 `[B,3,H,W]` with the batch's colour augmentation, if any; padding keeps its colour."""
    if batch.photometric is None:
        return batch.images
    distorted = photometric_distort(batch.images, batch.photometric)
    for padding in paddings(distorted, batch.valid):
        distorted[padding] = batch.images[padding]
    return distorted


def normalized_images(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 `[B,3,H,W]`, colour-augmented and normalised; padding is 0, as the reference pads after normalising."""
    images = normalize(augmented_images(batch), mean, std)
    for padding in paddings(images, batch.valid):
        images[padding].zero_()
    return images
