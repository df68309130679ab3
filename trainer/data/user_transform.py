"""An augmentation of the user's own: `data.transform`, the name of a function.

    def transform(images: Tensor, segment_maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]

It gets the images of a micro-batch, uint8 [B, 3, H, W], and their segment maps, uint8 or int32 [B, H, W] (value: index
into the image's labels; 255, or 65535 in int32 maps: ignored), on the training device, after MaskStream's own geometry
and before its colours, and returns both in the same shapes and dtypes. The generator, on the same device, is seeded by
(seed, micro-batch): with no other source of randomness, runs resume bit for bit.

Only the configuration of a training command is believed: names in checkpoints, exports and shard sets are not imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from shards.errors import ConfigError
from trainer.data.batch import Batch
from trainer.data.targets import ignore_value

Transform = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def load_transform(name: str) -> Transform:
    """Import `package.module:function`. Raises ConfigError when there is no such function."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"data.transform is {name!r}: {error}; legal: package.module:function, importable from the "
                          "folder of the command or from PYTHONPATH") from error
    if not callable(found):
        raise ConfigError(f"data.transform is {name!r}, which is a {type(found).__name__}, legal: a function")
    transform: Transform = found
    return transform


def transformed(batch: Batch, transform: Transform, generator: torch.Generator) -> Batch:
    """The batch, on the training device, with its images and segment maps transformed, and without the labels of which
    no pixel is left: counting them waits for the device.

    Raises ConfigError when the function returns other shapes, dtypes or label indices.
    """
    assert batch.segment_maps is not None  # data.targets is segment_map
    images, segment_maps = transform(batch.images, batch.segment_maps, generator)
    for name, given, returned in (("images", batch.images, images), ("segment maps", batch.segment_maps, segment_maps)):
        if returned.shape != given.shape or returned.dtype != given.dtype:
            raise ConfigError(f"data.transform returned {name} of {returned.dtype} {list(returned.shape)}, legal: "
                              f"{given.dtype} {list(given.shape)}, as given")
    ignored = ignore_value(segment_maps.dtype)
    pixels = torch.stack([torch.bincount(segments.reshape(-1), minlength=ignored + 1) for segments in
                          segment_maps.int()]).tolist()  # waits for the device
    labels, counts = [], []
    renumbered = torch.empty_like(segment_maps)
    for place, (ids, found) in enumerate(zip(batch.labels.split(batch.counts), pixels, strict=True)):
        if wrong := [index for index in range(len(ids), ignored) if found[index]]:
            raise ConfigError(f"data.transform returned a segment map with index {wrong[0]}, legal: 0 to "
                              f"{len(ids) - 1} for this image's labels, and {ignored} for ignored pixels")
        present = [index for index in range(len(ids)) if found[index]]
        table = torch.full((ignored + 1,), ignored, dtype=segment_maps.dtype)
        table[present] = torch.arange(len(present), dtype=segment_maps.dtype)
        renumbered[place] = table.to(images.device, non_blocking=True)[segment_maps[place].int()]
        labels.append(ids[present])
        counts.append(len(present))
    return replace(batch, images=images, segment_maps=renumbered, labels=torch.cat(labels), counts=counts)
