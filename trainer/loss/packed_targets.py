"""A batch of targets on the device, packed for sampling at points. Masks become floats only if they came as floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.targets import IGNORE_VALUES, Target, ignore_value, to_dense


@dataclass(frozen=True)
class PackedTargets:
    """A batch of targets, packed for sampling. An image's rows beyond its `counts[b]` are padding and match no pixel.

    There is always at least one row, so that costs exist, and can be checked, for images without any target.
    A target is the set of pixels at which a map has a given value: with segment maps, its image's map and its index
    there; with dense masks, a map of its own and 1. Masks never exist as floats.
    """

    corners: Tensor  # [K * (H + 1) * (W + 1)]: for every pixel corner of K maps, the four pixels around it, packed
    size: tuple[int, int]  # H, W
    scale: Tensor  # float32 [2]: W, H
    first: Tensor  # int64 [B, 1 or Nmax]: index in `corners` of corner (0, 0) of the target's map
    values: Tensor  # [B, Nmax], of the maps' dtype: the target's value in its map
    ignored: Tensor | None  # bool [B, H, W]: pixels without any target; None when they count as background
    labels: Tensor  # int64 [B, Nmax]
    counts: tuple[int, ...]  # targets of each image

    def at_points(self, points: Tensor) -> Tensor:
        """All masks of each image, sampled bilinearly at points float32 [..., B, P, 2] in [0, 1]: [..., B, Nmax, P]."""
        return self._sample(points[..., None, :, :], self.first, self.values)

    def at_matched_points(self, images: Tensor, target_ids: Tensor, points: Tensor) -> Tensor:
        """Masks `target_ids` [M] of `images` [M], each at points [M, P, 2] of its own: float32 [M, P]."""
        first = self.first.expand_as(self.values)
        return self._sample(points, first[images, target_ids], self.values[images, target_ids])

    def counted_at_points(self, points: Tensor) -> Tensor | None:
        """`counted` for points float32 [..., B, P, 2] of each image: [..., B, P]."""
        return self.counted(torch.arange(len(self.counts), device=points.device), points)

    def counted(self, images: Tensor, points: Tensor) -> Tensor | None:
        """0 where a point [M, P, 2] lies in an ignored pixel of its image [M], else 1: float32 [M, P].

        None when ignored pixels are background, and all points count.
        """
        if self.ignored is None:
            return None
        height, width = self.size
        x = (points[..., 0] * width).long().clamp(0, width - 1)
        y = (points[..., 1] * height).long().clamp(0, height - 1)
        return (~self.ignored[images[:, None], y, x]).float()

    def _sample(self, points: Tensor, first: Tensor, values: Tensor) -> Tensor:
        """points [..., P, 2], first and values [...] or broadcastable -> [..., P], with zeros outside the maps.

        Bilinear like grid_sample with align_corners False; one gather fetches all four pixels around a point.
        """
        _, width = self.size
        positions = (points * self.scale).sub_(0.5)  # in pixels, relative to the first pixel's centre
        corners = positions.floor()
        x, y = positions.sub_(corners).unbind(-1)  # [..., P]
        left, top = corners.int().unbind(-1)
        index = torch.add(left, top, alpha=width + 1) + first[..., None]
        around = self.corners.take(index.clamp_(0, len(self.corners) - 1))
        inside = (around.view(values.dtype).unflatten(-1, (-1, 4)) == values[..., None, None]).float()  # [..., P, 4]
        a, b, c, d = inside.unbind(-1)
        return torch.lerp(torch.lerp(a, b, x), torch.lerp(c, d, x), y)


@dataclass(frozen=True)
class SoftTargets:
    """Like `PackedTargets`, for masks with fractional pixels or images of different sizes.

    With different sizes, matching samples each image's masks in the image's own coordinates, while the losses treat
    all of them as zero-padded to the largest size, as transformers' loss does.
    """

    pixels: Tensor  # float32 [K * (H + 2) * (W + 2)]: K masks padded to the largest size, with a border of zeros
    stride: int  # W + 2
    own: Tensor  # float32 [B, 2]: width and height of each image
    largest: Tensor  # float32 [2]: W, H
    first: Tensor  # int64 [B, Nmax]: index of the mask's first value in `pixels`
    ignored: Tensor | None  # bool [B, H, W], as in PackedTargets, and True in padding
    labels: Tensor  # int64 [B, Nmax]
    counts: tuple[int, ...]

    def at_points(self, points: Tensor) -> Tensor:
        """[..., B, P, 2] -> [..., B, Nmax, P]"""
        return self._sample(points[..., None, :, :] * self.own[:, None, None], self.first)

    def at_matched_points(self, images: Tensor, target_ids: Tensor, points: Tensor) -> Tensor:
        """Masks `target_ids` [M] of `images` [M], each at points [M, P, 2] of its own: float32 [M, P]."""
        return self._sample(points * self.largest, self.first[images, target_ids])

    def counted_at_points(self, points: Tensor) -> Tensor | None:
        """[..., B, P, 2] -> [..., B, P], or None"""
        images = torch.arange(len(self.counts), device=points.device)
        return self._counted(images, points * self.own[:, None], self.own[:, None])

    def counted(self, images: Tensor, points: Tensor) -> Tensor | None:
        """[M], [M, P, 2] -> [M, P], or None"""
        return self._counted(images, points * self.largest, self.largest)

    def _counted(self, images: Tensor, positions: Tensor, size: Tensor) -> Tensor | None:
        if self.ignored is None:
            return None
        x, y = torch.minimum(positions, size - 1).long().clamp(min=0).unbind(-1)
        return (~self.ignored[images[:, None], y, x]).float()

    def _sample(self, positions: Tensor, first: Tensor) -> Tensor:
        """Positions [..., P, 2] in pixels, broadcast with `first` [...]: bilinear [..., P], as in PackedTargets."""
        positions = positions - 0.5
        corners = positions.floor()
        x, y = (positions - corners).unbind(-1)
        left, top = corners.long().unbind(-1)
        index = (top + 1) * self.stride + left + 1 + first[..., None]
        a, b, c, d = (self.pixels.take((index + step).clamp(0, len(self.pixels) - 1))
                      for step in (0, 1, self.stride, self.stride + 1))
        return torch.lerp(torch.lerp(a, b, x), torch.lerp(c, d, x), y)


ReadableTargets = PackedTargets | SoftTargets


def pack_targets(targets: Sequence[Mapping[str, Any]], device: torch.device, *,
                 exclude_ignored: bool = False) -> ReadableTargets:
    """Pack targets of either form on `device`. Raises ValueError when there are none, or one has neither form."""
    moved = [{key: target[key].to(device, non_blocking=True) for key in _PARTS if key in target} for target in targets]
    sizes = [_check_form(target) for target in moved]
    if not sizes:
        raise ValueError("a batch has no targets, legal: one target dict per image, which may hold no masks")
    counts = tuple(len(target["labels"]) for target in moved)
    rows = max(1, *counts)
    labels = torch.stack([F.pad(target["labels"], (0, rows - count))
                          for target, count in zip(moved, counts, strict=True)]).long()
    if len(set(sizes)) > 1 or any("masks" in target and target["masks"].is_floating_point() for target in moved):
        return _soft_targets(moved, sizes, labels, counts, exclude_ignored)
    segmented = all("segment_map" in target for target in moved)
    maps, map_ids, values = _segment_maps(moved, rows) if segmented else _binary_maps(moved, counts, rows)
    outside = _OUTSIDE[maps.dtype] if segmented else 0
    height, width = sizes[0]
    first = map_ids * ((height + 1) * (width + 1)) + (width + 2)
    ignored = None
    if exclude_ignored:
        ignored = maps == outside if segmented else torch.stack([~to_dense(target)["masks"].any(0) for target in moved])
    return PackedTargets(_packed_corners(maps, outside), sizes[0], _filled((width, height), device), first, values,
                         ignored, labels, counts)


def _soft_targets(targets: Sequence[Target], sizes: Sequence[tuple[int, int]], labels: Tensor,
                  counts: tuple[int, ...], exclude_ignored: bool) -> SoftTargets:
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    padded = [F.pad(to_dense(target)["masks"].float(), (1, width - own_width + 1, 1, height - own_height + 1))
              for target, (own_height, own_width) in zip(targets, sizes, strict=True)]  # [N, H + 2, W + 2] each
    empty = padded[0].new_zeros(1, height + 2, width + 2)
    mask_ids = _map_ids(counts, labels.shape[1], labels.device)
    ignored = None
    if exclude_ignored:
        ignored = torch.stack([~(masks[:, 1:-1, 1:-1] > 0).any(0) for masks in padded])
    own = torch.stack([_filled((own_width, own_height), labels.device) for own_height, own_width in sizes])
    return SoftTargets(torch.cat([*padded, empty]).flatten(), width + 2, own, _filled((width, height), labels.device),
                       mask_ids * ((height + 2) * (width + 2)), ignored, labels, counts)


def _filled(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 numbers, filled on the device: a copy from the host would synchronise."""
    return torch.stack([torch.full((), float(value), device=device) for value in values])


_Maps = tuple[Tensor, Tensor, Tensor]  # maps [K, H, W]; each target's map index and value [B, N]
_PARTS = ("masks", "segment_map", "labels")  # keys of a target; others are not ours
_OUTSIDE = {torch.uint8: IGNORE_VALUES[torch.uint8], torch.int16: -1}  # a value no target has, per dtype


def _segment_maps(targets: Sequence[Target], rows: int) -> _Maps:
    """One map per image. Indices above 254 use int16, where 32768 and more wrap around: only equality matters."""
    maps = [target["segment_map"] for target in targets]
    if any(single.dtype != torch.uint8 for single in maps):
        maps = [torch.where(single == ignore_value(single.dtype), -1, single.int()).to(torch.int16) for single in maps]
    stacked = torch.stack(maps)
    map_ids = torch.arange(len(maps), device=stacked.device)[:, None]  # [B, 1]
    values = torch.arange(rows, device=stacked.device).to(stacked.dtype).expand(len(maps), -1)
    return stacked, map_ids, values


def _binary_maps(targets: Sequence[Target], counts: Sequence[int], rows: int) -> _Maps:
    """One binary map per target, and an empty one for padding rows."""
    dense = [to_dense(target)["masks"].bool() for target in targets]
    maps = torch.cat([*dense, dense[0].new_zeros(1, *dense[0].shape[1:])]).to(torch.uint8)
    map_ids = _map_ids(counts, rows, maps.device)
    return maps, map_ids, torch.ones_like(map_ids, dtype=torch.uint8)


def _map_ids(counts: Sequence[int], rows: int, device: torch.device) -> Tensor:
    """Index of each target's map, int64 [B, rows], with one map per target and then an empty one for padding rows."""
    total = sum(counts)
    per_image = torch.arange(total, device=device).split(list(counts))
    return torch.stack([F.pad(ids, (0, rows - len(ids)), value=total) for ids in per_image])


def _packed_corners(maps: Tensor, outside: int) -> Tensor:
    """The four pixels around each pixel corner, in one integer: uint8 [K, H, W] -> int32, int16 -> int64."""
    padded = F.pad(maps, (1, 1, 1, 1), value=outside)  # [K, H + 2, W + 2]
    four = torch.stack((padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]), dim=-1)
    return four.view(torch.int32 if maps.dtype == torch.uint8 else torch.int64).flatten()


def _check_form(target: Target) -> tuple[int, int]:
    """(H, W) of a target. Raises ValueError when it has neither form, or more labels than masks or indices."""
    if "segment_map" not in target:
        height, width = to_dense(target)["masks"].shape[1:]
        return height, width
    limit = ignore_value(target["segment_map"].dtype)
    if len(target["labels"]) > limit:
        raise ValueError(f"a target has {len(target['labels'])} labels, legal for a {target['segment_map'].dtype} "
                         f"segment map: up to {limit}")
    height, width = target["segment_map"].shape
    return height, width
