"""A micro-batch: as loader workers send it, and what the training device still does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainer.data.geometry import Move, padding_color, rotate_image, turn
from trainer.data.resampling import Resize, resample
from trainer.data.targets import Target, ignore_value
from trainer.data.transforms import normalize, paddings, photometric_distort


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
    moves: list[Move]  # per image: what `to` still does to it and, but for the rotation by degrees, to its targets
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
        rotation, reflection. Erasing comes last, in `normalized_images`."""
        moved = self.copied_to(device)
        if moved.regions:
            moved = moved._resized()
        return moved._moved() if any(move.is_pending for move in self.moves) else moved

    def copied_to(self, device: torch.device) -> Batch:
        """The same on another device; what is pending stays pending."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _resized(self) -> Batch:
        segment_maps = self.segment_maps if self.segment_maps is not None else self.masks
        assert segment_maps is not None
        height, width = segment_maps[0].shape[-2:]
        images = _padding((len(self.regions), 3, height, width), self.regions[0].device)
        for image, region, resize in zip(images, self.regions, self.resizes, strict=True):
            image[:, : resize.height, : resize.width] = resample(region, resize).permute(2, 0, 1)
        return replace(self, images=images, regions=[], resizes=[])

    def _moved(self) -> Batch:
        images = self.images.clone()  # keeps channels last
        given, masks, valid = self.segment_maps, None if self.masks is None else list(self.masks), list(self.valid)
        segment_maps = None if given is None else given.clone()
        for place, (move, (height, width)) in enumerate(zip(self.moves, self.valid, strict=True)):
            if not move.is_pending:
                continue
            image = self.images[place, :, :height, :width]
            if move.degrees:
                image = rotate_image(image, (height, width), move.degrees)
            if move.swaps_sides:
                valid[place] = width, height
            _put(images[place], image, move, padding_color(images.device))
            if given is not None and segment_maps is not None:
                _put(segment_maps[place], given[place, :height, :width], move, ignore_value(given.dtype))
            if masks is not None:
                part, masks[place] = masks[place][:, :height, :width], masks[place].clone()
                _put(masks[place], part, move, False)
        return replace(self, images=images, segment_maps=segment_maps, masks=masks, valid=valid,
                       moves=[move.done for move in self.moves])

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
    """uint8 `[B,3,H,W]` as the network sees them: with the batch's colour augmentation, and what is erased in the
    colour of padding; padding keeps its colour."""
    images = batch.images if batch.photometric is None else photometric_distort(batch.images, batch.photometric)
    if batch.photometric is not None:
        for padding in paddings(images, batch.valid):
            images[padding] = batch.images[padding]
    erased = list(_erased(batch))
    if erased and images is batch.images:
        images = images.clone()
    for place in erased:
        images[place] = padding_color(images.device)
    return images


def normalized_images(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 `[B,3,H,W]`, colour-augmented and normalised; padding is 0, as the reference pads after normalising, and
    so is what is erased."""
    images = normalize(augmented_images(batch), mean, std)
    for place in (*paddings(images, batch.valid), *_erased(batch)):
        images[place].zero_()
    return images


def _erased(batch: Batch) -> Iterator[tuple[int | slice, ...]]:
    """Indices of what is erased in images [B, 3, H, W]."""
    for index, move in enumerate(batch.moves):
        if move.erased is not None:
            top, left, height, width = move.erased
            yield index, slice(None), slice(top, top + height), slice(left, left + width)


def _put(picture: Tensor, part: Tensor, move: Move, padding: Tensor | int | bool) -> None:
    """Write the moved part, which shares no memory with `picture` [..., H, W], to the top left of it."""
    if move.swaps_sides:
        picture[..., : max(part.shape[-2:]), : max(part.shape[-2:])] = padding
    part = turn(part, move)
    picture[..., : part.shape[-2], : part.shape[-1]] = part


def _padding(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """uint8 images of the padding's colour, channels last."""
    return padding_color(device).expand(shape).clone(memory_format=torch.channels_last)
