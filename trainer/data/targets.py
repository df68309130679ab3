"""Targets: one image's ground truth, in either of two equivalent forms.

dense         {"masks": bool, uint8 or float [N, H, W], "labels": int64 [N]}; floats are the fraction of a pixel inside
              the mask; in other dtypes every nonzero pixel is inside
segment map   {"segment_map": uint8 [H, W], "labels": int64 [N]}, value = index into this image's labels,
              255 = ignored (int32 maps: 65535). One byte per pixel instead of N, or of 4 N for float masks.

Other keys of a target are left untouched.
Ignored pixels are background of every mask, as in the reference (MaskFormer, arXiv:2107.06278, does the same).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shards.rle import IGNORE_8_BIT, IGNORE_16_BIT

IGNORE_VALUES = {torch.uint8: IGNORE_8_BIT, torch.int32: IGNORE_16_BIT}

Target = Mapping[str, Tensor]


def ignore_value(dtype: torch.dtype) -> int:
    """The value that marks ignored pixels in a segment map of this dtype. Raises ValueError for other dtypes."""
    if dtype not in IGNORE_VALUES:
        raise ValueError(f"segment maps are uint8 or int32, this one is {dtype}")
    return IGNORE_VALUES[dtype]


def dense_masks(segment_map: Tensor, num_labels: int) -> Tensor:
    """Masks bool [N, H, W] of a segment map [H, W]; mask n is True where the map is n.

    Raises ValueError when `num_labels` leaves no room for the map's ignore value.
    """
    limit = ignore_value(segment_map.dtype)
    if not 0 <= num_labels <= limit:
        raise ValueError(f"num_labels is {num_labels}, legal for a {segment_map.dtype} segment map: 0 to {limit}")
    indices = torch.arange(num_labels, dtype=segment_map.dtype, device=segment_map.device)
    return segment_map[None] == indices[:, None, None]  # [N, H, W]


def segment_map_from_masks(masks: Tensor) -> Tensor:
    """Segment map [H, W] of disjoint masks [N, H, W]: uint8 up to 255 masks, int32 beyond; uncovered = ignored.

    The inverse of `dense_masks`. Raises ValueError when masks overlap, which a segment map cannot represent.
    """
    inside = masks.bool()
    overlaps = int((inside.sum(0) > 1).sum())
    if overlaps:
        raise ValueError(f"{overlaps} pixels are in several masks; a segment map holds one segment per pixel")
    dtype = torch.uint8 if len(inside) <= IGNORE_VALUES[torch.uint8] else torch.int32
    indices = torch.arange(len(inside), dtype=torch.int64, device=inside.device)
    segments = (inside * indices[:, None, None]).sum(0)  # [H, W]
    return torch.where(inside.any(0), segments, ignore_value(dtype)).to(dtype)


def label_map_from_segments(segment_map: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Class of every pixel, int64 [H, W], from a segment map [H, W] and its labels int64 [N]: the counterpart of
    `shards.rle.label_map_from_segments` for tensors on any device.

    Ignored pixels, and indices without a label, become `ignore_index`. Never synchronises with the device.
    """
    table_size = ignore_value(segment_map.dtype) + 1
    table = torch.full((table_size,), ignore_index, dtype=torch.int64, device=segment_map.device)
    table[: len(labels)] = labels.to(segment_map.device)
    return table[segment_map.long()]


def to_dense(target: Target) -> dict[str, Tensor]:
    """`{"masks" [N, H, W], "labels" [N]}` of a target in either form; dense masks keep their dtype.

    Raises ValueError when the target has neither form, or when the numbers of masks and labels differ.
    """
    if "segment_map" not in target and "masks" not in target:
        raise ValueError(f"a target needs masks or segment_map, this one has {sorted(target)}")
    labels = target["labels"]
    masks = target["masks"] if "masks" in target else dense_masks(target["segment_map"], len(labels))
    if masks.ndim != 3 or len(masks) != len(labels):
        raise ValueError(f"masks have shape {tuple(masks.shape)}, legal: [N, H, W] with N = {len(labels)} labels")
    return {"masks": masks, "labels": labels}
