"""A batch of targets on the device, ready to be read at points. Masks exist as floats only if they came as floats."""

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
    """A batch of targets, ready to be read at points. Rows behind an image's own `counts[b]` are never in a mask.

    There is always at least one row, so that costs exist, and can be checked, for images without any target.
    A target is the set of pixels where one of the maps has one value: with segment maps the map of its image and its
    index there; with dense masks a map of its own and 1. Masks never exist as floats.
    """

    corners: Tensor  # [K * (H + 1) * (W + 1)]: the four pixels around every corner between pixels of K maps, packed
    size: tuple[int, int]  # H, W
    scale: Tensor  # float32 [2]: W, H
    first: Tensor  # int64 [B, 1 or Nmax]: where the map that holds the target begins: its corner (0, 0) in `corners`
    values: Tensor  # [B, Nmax], of the maps' dtype: the target's value in it
    ignored: Tensor | None  # bool [B, H, W]: pixels without any target; None when they count as background
    labels: Tensor  # int64 [B, Nmax]
    counts: tuple[int, ...]  # targets of each image

    def at_points(self, points: Tensor) -> Tensor:
        """Every mask of every image, bilinear, at points float32 [..., B, P, 2] in [0, 1]: [..., B, Nmax, P]."""
        return self._sample(points[..., None, :, :], self.first, self.values)

    def at_matched_points(self, images: Tensor, target_ids: Tensor, points: Tensor) -> Tensor:
        """Masks `target_ids` [M] of `images` [M], each at points [M, P, 2] of its own: float32 [M, P]."""
        first = self.first.expand_as(self.values)
        return self._sample(points, first[images, target_ids], self.values[images, target_ids])

    def counted_at_points(self, points: Tensor) -> Tensor | None:
        """`counted` for points float32 [..., B, P, 2], some for each image: [..., B, P]."""
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
        """points [..., P, 2], first and values [...] or broadcast against it -> [..., P], with zeros outside the maps.

        Bilinear as grid_sample (align_corners False); one gather fetches all four pixels of a point.
        """
        _, width = self.size
        places = (points * self.scale).sub_(0.5)  # in pixels, from the centre of the first
        corners = places.floor()
        x, y = places.sub_(corners).unbind(-1)  # [..., P]
        left, top = corners.int().unbind(-1)
        index = torch.add(left, top, alpha=width + 1) + first[..., None]
        around = self.corners.take(index.clamp_(0, len(self.corners) - 1))
        inside = (around.view(values.dtype).unflatten(-1, (-1, 4)) == values[..., None, None]).float()  # [..., P, 4]
        a, b, c, d = inside.unbind(-1)
        return torch.lerp(torch.lerp(a, b, x), torch.lerp(c, d, x), y)


@dataclass(frozen=True)
class SoftTargets:
    """As `PackedTargets`, for masks whose pixels are not just in or out, or images that differ in size.

    Where they do, matching reads each image's masks in coordinates of its own, and the losses read all of them as if
    padded with zeros to the largest: so does transformers' loss.
    """

    pixels: Tensor  # float32 [K * (H + 2) * (W + 2)]: K masks padded to the largest size, each with a rim of zeros
    stride: int  # W + 2
    own: Tensor  # float32 [B, 2]: width and height of each image
    largest: Tensor  # float32 [2]: W, H
    first: Tensor  # int64 [B, Nmax]: where the mask begins in `pixels`
    ignored: Tensor | None  # bool [B, H, W], as in PackedTargets; padding too
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

    def _counted(self, images: Tensor, places: Tensor, size: Tensor) -> Tensor | None:
        if self.ignored is None:
            return None
        x, y = torch.minimum(places, size - 1).long().clamp(min=0).unbind(-1)
        return (~self.ignored[images[:, None], y, x]).float()

    def _sample(self, places: Tensor, first: Tensor) -> Tensor:
        """Places [..., P, 2] in pixels and `first` [...], broadcast: bilinear [..., P], as in PackedTargets."""
        places = places - 0.5
        corners = places.floor()
        x, y = (places - corners).unbind(-1)
        left, top = corners.long().unbind(-1)
        index = (top + 1) * self.stride + left + 1 + first[..., None]
        a, b, c, d = (self.pixels.take((index + step).clamp(0, len(self.pixels) - 1))
                      for step in (0, 1, self.stride, self.stride + 1))
        return torch.lerp(torch.lerp(a, b, x), torch.lerp(c, d, x), y)


ReadableTargets = PackedTargets | SoftTargets


def pack_targets(targets: Sequence[Mapping[str, Any]], device: torch.device, *,
                 exclude_ignored: bool = False) -> ReadableTargets:
    """Bring targets of either form to `device`. Raises ValueError when there is none, or one has neither form."""
    moved = [{key: target[key].to(device, non_blocking=True) for key in _PARTS if key in target} for target in targets]
    sizes = [_check_form(target) for target in moved]
    if not sizes:
        raise ValueError("a batch has no targets, legal: one per image, with no masks where there is none")
    counts = tuple(len(target["labels"]) for target in moved)
    rows = max(1, *counts)
    labels = torch.stack([F.pad(target["labels"], (0, rows - count))
                          for target, count in zip(moved, counts, strict=True)]).long()
    if len(set(sizes)) > 1 or any("masks" in target and target["masks"].is_floating_point() for target in moved):
        return _soft_targets(moved, sizes, labels, counts, exclude_ignored)
    segmented = all("segment_map" in target for target in moved)
    maps, places, values = _segment_maps(moved, rows) if segmented else _binary_maps(moved, counts, rows)
    outside = _OUTSIDE[maps.dtype] if segmented else 0
    height, width = sizes[0]
    first = places * ((height + 1) * (width + 1)) + (width + 2)
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
    places = _places_of(counts, labels.shape[1], labels.device)
    ignored = None
    if exclude_ignored:
        ignored = torch.stack([~(masks[:, 1:-1, 1:-1] > 0).any(0) for masks in padded])
    own = torch.stack([_filled((own_width, own_height), labels.device) for own_height, own_width in sizes])
    return SoftTargets(torch.cat([*padded, empty]).flatten(), width + 2, own, _filled((width, height), labels.device),
                       places * ((height + 2) * (width + 2)), ignored, labels, counts)


def _filled(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 numbers, made on the device: a copy from the host would wait for it."""
    return torch.stack([torch.full((), float(value), device=device) for value in values])


_Maps = tuple[Tensor, Tensor, Tensor]  # maps [K, H, W]; each target's map and value [B, N]
_PARTS = ("masks", "segment_map", "labels")  # of a target; other entries are other people's
_OUTSIDE = {torch.uint8: IGNORE_VALUES[torch.uint8], torch.int16: -1}  # a value that no target has


def _segment_maps(targets: Sequence[Target], rows: int) -> _Maps:
    """One map per image. Indices beyond 254 take int16, in which 32768 and more wrap around: equality is all we ask."""
    maps = [target["segment_map"] for target in targets]
    if any(single.dtype != torch.uint8 for single in maps):
        maps = [torch.where(single == ignore_value(single.dtype), -1, single.int()).to(torch.int16) for single in maps]
    stacked = torch.stack(maps)
    places = torch.arange(len(maps), device=stacked.device)[:, None]  # [B, 1]
    values = torch.arange(rows, device=stacked.device).to(stacked.dtype).expand(len(maps), -1)
    return stacked, places, values


def _binary_maps(targets: Sequence[Target], counts: Sequence[int], rows: int) -> _Maps:
    """One map of zeros and ones per target, and an empty one for the rows behind."""
    dense = [to_dense(target)["masks"].bool() for target in targets]
    maps = torch.cat([*dense, dense[0].new_zeros(1, *dense[0].shape[1:])]).to(torch.uint8)
    places = _places_of(counts, rows, maps.device)
    return maps, places, torch.ones_like(places, dtype=torch.uint8)


def _places_of(counts: Sequence[int], rows: int, device: torch.device) -> Tensor:
    """Number of each target's map, int64 [B, rows], when there is one for each and an empty one behind the last."""
    total = sum(counts)
    of_image = torch.arange(total, device=device).split(list(counts))
    return torch.stack([F.pad(own, (0, rows - len(own)), value=total) for own in of_image])


def _packed_corners(maps: Tensor, outside: int) -> Tensor:
    """The four pixels around each corner between pixels, in one integer: uint8 [K, H, W] -> int32, int16 -> int64."""
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
