"""Targets: what the loss is told about each image, in two forms that hold the same information.

dense         {"masks": bool, uint8 or float [N, H, W], "labels": int64 [N]}
segment map   {"segment_map": uint8 [H, W], "labels": int64 [N]}, value = index into this image's labels,
              255 = ignored (int32 maps: 65535). One byte a pixel instead of N, or 4 N as float masks.

Ignored pixels are background of every mask, as in the reference (MaskFormer, arXiv:2107.06278, does the same).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_VALUES = {torch.uint8: 255, torch.int32: 65535}

Target = Mapping[str, Tensor]


def ignore_value(dtype: torch.dtype) -> int:
    """The value that marks ignored pixels in a segment map of this dtype. Raises ValueError for other dtypes."""
    if dtype not in IGNORE_VALUES:
        raise ValueError(f"segment maps are uint8 or int32, this one is {dtype}")
    return IGNORE_VALUES[dtype]


def dense_masks(segment_map: Tensor, num_labels: int) -> Tensor:
    """Masks bool [N, H, W] of a segment map [H, W]; mask n is where the map holds n.

    Raises ValueError when `num_labels` does not leave room for the map's ignore value.
    """
    limit = ignore_value(segment_map.dtype)
    if not 0 <= num_labels <= limit:
        raise ValueError(f"num_labels is {num_labels}, legal for a {segment_map.dtype} segment map: 0 to {limit}")
    indices = torch.arange(num_labels, dtype=segment_map.dtype, device=segment_map.device)
    return segment_map[None] == indices[:, None, None]  # [N, H, W]


def segment_map_from_masks(masks: Tensor) -> Tensor:
    """Segment map [H, W] of disjoint masks [N, H, W]: uint8 up to 255 masks, int32 beyond; uncovered = ignored.

    The inverse of `dense_masks`. Raises ValueError when two masks share a pixel: a map cannot say that.
    """
    inside = masks.bool()
    overlaps = int((inside.sum(0) > 1).sum())
    if overlaps:
        raise ValueError(f"{overlaps} pixels lie in several masks; a segment map holds one segment a pixel")
    dtype = torch.uint8 if len(inside) <= IGNORE_VALUES[torch.uint8] else torch.int32
    indices = torch.arange(len(inside), dtype=torch.int64, device=inside.device)
    segments = (inside * indices[:, None, None]).sum(0)  # [H, W]
    return torch.where(inside.any(0), segments, ignore_value(dtype)).to(dtype)


def label_map_from_segments(segment_map: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Class of every pixel, int64 [H, W], from a segment map [H, W] and its labels int64 [N].

    Ignored pixels, and indices that no label answers to, become `ignore_index`. Never waits for the device.
    """
    table_size = ignore_value(segment_map.dtype) + 1
    table = torch.full((table_size,), ignore_index, dtype=torch.int64, device=segment_map.device)
    table[: len(labels)] = labels.to(segment_map.device)
    return table[segment_map.long()]


def to_dense(target: Target) -> dict[str, Tensor]:
    """`{"masks" [N, H, W], "labels" [N]}` of a target in either form; dense masks keep their dtype.

    Raises ValueError when the target has neither form, or as many masks as labels is not true.
    """
    if "segment_map" not in target and "masks" not in target:
        raise ValueError(f"a target needs masks or segment_map, this one has {sorted(target)}")
    labels = target["labels"]
    masks = target["masks"] if "masks" in target else dense_masks(target["segment_map"], len(labels))
    if masks.ndim != 3 or len(masks) != len(labels):
        raise ValueError(f"masks have shape {tuple(masks.shape)}, legal: [N, H, W] with N = {len(labels)} labels")
    return {"masks": masks, "labels": labels}


@dataclass(frozen=True)
class PackedTargets:
    """A batch of targets in two tensors. Rows behind an image's own `counts[b]` are zeros.

    There is always at least one row, so that costs exist, and can be checked, for images without any target.
    """

    masks: Tensor  # float32 [B, Nmax, H, W]
    labels: Tensor  # int64 [B, Nmax]
    counts: tuple[int, ...]  # targets of each image


def pack_targets(targets: Sequence[Target], device: torch.device) -> PackedTargets:
    """Pad and stack targets of either form on `device`.

    Raises ValueError when there is none, or when images differ in size: points live in coordinates of the whole
    image, so masks padded to a common size would be sampled at the wrong places.
    """
    dense = [to_dense(_moved(target, device)) for target in targets]
    sizes = {tuple(target["masks"].shape[1:]) for target in dense}
    if len(sizes) != 1:
        raise ValueError(f"targets of one batch need one size [H, W], these have {sorted(sizes)}")
    counts = tuple(len(target["labels"]) for target in dense)
    rows = max(1, *counts)
    masks = torch.zeros(len(dense), rows, *sizes.pop(), device=device)  # [B, Nmax, H, W]
    labels = torch.zeros(len(dense), rows, dtype=torch.int64, device=device)  # [B, Nmax]
    for image, (target, count) in enumerate(zip(dense, counts, strict=True)):
        masks[image, :count] = target["masks"]
        labels[image, :count] = target["labels"]
    return PackedTargets(masks, labels, counts)


def _moved(target: Target, device: torch.device) -> Target:
    # A segment map moves as it is and becomes masks on the device, not before.
    return {key: value.to(device, non_blocking=True) for key, value in target.items()}
