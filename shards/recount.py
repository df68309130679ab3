"""Compare what a manifest says of a split with its samples, and with itself.

    class_pixels, class_samples, ignored_pixels    counted again, pixel by pixel
    classes                                        the list of each sample, compared with its labels (`verify`)
    samples, shards, bytes, table, index           counted and hashed (here, in `shard_table` and in `manifest`)
    kind, crops.splits, size, stored_size          each sample's size, and whether its meta has a crop
    images, skipped_crops, crops.per_image         a crop's key has its image and its number. Each image has `per_image`
                                                   crops, written or skipped; or it is one sample
    sources, config.images_per_shard               the number of blocks and of shards that the images make

What only the dataset can show stays unproven: an image all of whose crops were skipped, the images and reasons in
`skipped_images`, the reasons in `skipped_crops`, the names and colours of classes, `dataset`, `seed` and the other
settings, `config_hash`, `producer`, and the hashes in `sources`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.manifest import SOURCE_BYTES, Manifest, SplitInfo
from shards.sample import CropSample
from shards.shard_table import ShardTable


class Expected(NamedTuple):
    """What the manifest says of each sample of a split; None where it does not say, as in sets of other programs."""

    num_classes: int
    is_crops: bool
    side: int | None  # of a crop in pixels
    per_image: int | None  # crops

    @classmethod
    def of(cls, manifest: Manifest, name: str) -> Expected:
        """Of the split `name`."""
        is_crops, crops = manifest.splits[name].kind == "crops", manifest.crops
        side = _number(crops, "stored_size") or _number(crops, "size")
        return cls(manifest.num_classes, is_crops, side, _number(crops, "per_image"))

    def contradiction(self, sample: CropSample, shard: int) -> str | None:
        """How a sample of the shard with this number differs, or None."""
        size = f"{sample.header.width}x{sample.header.height}"
        has_crop = isinstance(sample.meta.get("crop"), dict)
        if not self.is_crops:
            return "it is a crop, by its meta, but the manifest says kind images" if has_crop else None
        if "source" in sample.meta and not has_crop:
            return "it is a whole image, by its meta, but the manifest says kind crops"
        if self.side is not None and (sample.header.height, sample.header.width) != (self.side, self.side):
            return f"it is {size}, but the manifest says crops of {self.side}x{self.side}"
        if self.per_image is not None and number_of_crop(sample.key) != shard % self.per_image:
            return (f"its key is {sample.key!r}, but with crops.per_image {self.per_image} this shard has crop "
                    f"{shard % self.per_image} of each image")
        return None


@dataclass
class Recount:
    """Counts of some samples of a split."""

    pixels: np.ndarray  # by class
    samples: np.ndarray
    ignored: int = 0
    keys: array[int] = field(default_factory=lambda: array("Q"))  # a hash of each
    labels: list[npt.NDArray[np.int64]] = field(default_factory=list)  # of each sample; not kept by `merge`
    images: array[int] = field(default_factory=lambda: array("Q"))  # for crops: a hash of each sample's image

    @classmethod
    def start(cls, expected: Expected) -> Recount:
        """No samples yet."""
        return cls(np.zeros(expected.num_classes, np.int64), np.zeros(expected.num_classes, np.int64))

    def add(self, sample: CropSample, expected: Expected) -> None:
        """Count a sample. Raises ValueError for a label that is no class; decoding errors as `CropSample`."""
        self.keys.append(_hash(sample.key))
        labels, segment_map = sample.labels, sample.segment_map
        if labels.size and labels.max() >= self.pixels.size:
            raise ValueError(f"label {labels.max()}, legal: 0..{self.pixels.size - 1}")
        area = np.bincount(segment_map.reshape(-1), minlength=labels.size)[: labels.size]
        self.pixels[labels] += area
        self.samples[labels] += 1
        self.labels.append(labels)
        self.ignored += segment_map.size - int(area.sum())
        if expected.is_crops and expected.per_image is not None:
            self.images.append(_hash(sample.key.rpartition("-")[0]))

    def merge(self, other: Recount) -> None:
        """Add the counts of other samples."""
        self.pixels += other.pixels
        self.samples += other.samples
        self.ignored += other.ignored
        self.keys.extend(other.keys)
        self.images.extend(other.images)

    def differences(self, split: SplitInfo, where: str) -> Iterator[str]:
        """What the manifest says otherwise."""
        for name, said, found in (("class_pixels", split.class_pixels, self.pixels),
                                  ("class_samples", split.class_samples, self.samples)):
            wrong = np.flatnonzero(np.array(said) != found)
            if wrong.size:
                more = f", and {wrong.size - 1} more class counts differ" if wrong.size > 1 else ""
                yield (f"{where}: {name} of class {wrong[0]} is {said[wrong[0]]}, the samples have "
                       f"{found[wrong[0]]}{more}")
        if self.ignored != split.ignored_pixels:
            yield f"{where}: ignored_pixels is {split.ignored_pixels}, the samples have {self.ignored}"
        images = len(np.unique(np.frombuffer(self.images, np.uint64)))
        if images > split.images:
            yield f"{where}: images is {split.images}, the samples are of {images}"


def inconsistencies(manifest: Manifest, name: str, table: ShardTable, where: str) -> Iterator[str]:
    """What fields of a split say against each other, or against the numbers of its shards; reads no sample."""
    split, expected = manifest.splits[name], Expected.of(manifest, name)
    skipped, cropped = sum(split.skipped_crops.values()), manifest.crops.get("splits")
    if isinstance(cropped, list) and expected.is_crops != (name in cropped):
        yield f"{where}: kind is {split.kind}, but crops.splits is {cropped}"
    if not expected.is_crops and (split.images != split.samples or skipped):
        yield (f"{where}: images is {split.images} and skipped_crops are {skipped}, but {split.samples} samples of "
               "kind images are one per image, and none is a crop")
    if expected.is_crops and expected.per_image is not None and (
            split.images * expected.per_image != split.samples + skipped):
        yield (f"{where}: images is {split.images} and skipped_crops are {skipped}, but {split.samples} samples and "
               f"crops.per_image {expected.per_image} need images x per_image = samples + skipped_crops")
    yield from _block_problems(manifest, name, table, expected, where)


def _block_problems(manifest: Manifest, name: str, table: ShardTable, expected: Expected, where: str) -> Iterator[str]:
    split, most = manifest.splits[name], _number(manifest.config, "images_per_shard")
    blocks = _blocks(manifest, name)
    if most is None or not blocks:
        return
    left_out = len(split.skipped_images)  # unreadable ones are in a block, unpaired ones are not
    fewest, largest = (-(-images // most) for images in (split.images, split.images + left_out))
    if not fewest <= blocks <= largest:
        yield (f"{where}: sources are of {blocks} blocks, but {split.images} images and {left_out} skipped ones, "
               f"{most} to a block, are {fewest}{f' to {largest}' if largest > fewest else ''}")
    per_block = (expected.per_image or 1) if expected.is_crops else 1
    if len(table) and table.number(len(table) - 1) >= blocks * per_block:  # they ascend
        yield (f"{where}: there is a shard {table.name(len(table) - 1)}, but {blocks} blocks of {per_block} shards are "
               f"numbered 0..{blocks * per_block - 1}")


def _blocks(manifest: Manifest, name: str) -> int:
    """The number of blocks of a split that have a hash of their sources; 0: unknown."""
    if manifest.format_version == 1:
        return sum(block.rpartition("-")[0] == name for block in manifest.sources)
    sources = manifest.splits[name].sources
    return 0 if sources is None else sources.bytes // SOURCE_BYTES


def number_of_crop(key: str) -> int | None:
    """The number at the end of a crop's key."""
    digits = key.rpartition("-")[2]
    return int(digits) if digits.isdecimal() and len(digits) == 3 else None


def _number(settings: dict[str, Any], name: str) -> int | None:
    value = settings.get(name)
    return value if type(value) is int and value >= 1 else None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
