"""Encode images as samples: crops for training, whole images for validation."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from preprocess.blocks import Progress, hash_sources
from preprocess.config import PreprocessConfig
from preprocess.layouts.pairing import Pair
from preprocess.pairs import Dataset, read_pair
from preprocess.source_tree import HashedTree
from shards.crops.drawing import draw_crop
from shards.crops.label_runs import LabelRuns
from shards.crops.resampling import cut_image
from shards.errors import DatasetError
from shards.rle import count_values, encode_rle, encode_runs
from shards.sample import encode_sample

NO_LABEL = "no labelled pixel in any try"
STATISTICS = ("images", "class_pixels", "class_samples", "ignored_pixels", "mapped", "skipped_crops", "skipped_images")
SAMPLE_CLASSES = "sample_classes"  # in a record: of each shard, the classes of each sample
Record = dict[str, Any]  # what a block's record says of the images, in JSON types


class SampleWriter(Protocol):
    """Where samples go: a shard, or a part of one."""

    def write(self, key: str, image_bytes: bytes, image_suffix: str, payload: bytes) -> None:
        """Append a sample."""


class EncodedCrop(NamedTuple):
    """The parts of a sample, and its labelled pixels by class."""

    key: str
    jpeg: bytes
    payload: bytes
    class_pixels: np.ndarray


def crop_rng(seed: int, key: str, crop_number: int) -> np.random.Generator:
    """Random generator of one crop: depends on (seed, image, crop), not on worker or order."""
    image = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64([seed, image, crop_number]))


def encode_crop(config: PreprocessConfig, pair: Pair, image: Image.Image, labels: LabelRuns, number: int
                ) -> EncodedCrop | None:
    """Crop `number` of an image; None if no pixel is labelled."""
    crop = draw_crop(crop_rng(config.seed, pair.key, number), labels, config.crops.rules)
    if crop is None:
        return None
    key = f"{pair.key}-{number:03d}"
    side = config.crops.window
    runs = labels.cut(crop, side)
    buffer = io.BytesIO()
    cut_image(image, crop, side).save(buffer, "JPEG", quality=config.crops.jpeg_quality)
    meta = {"source": pair.image_path, "crop": crop._asdict()}
    payload = encode_sample(key, encode_runs(side, side, *runs), meta)
    return EncodedCrop(key, buffer.getvalue(), payload, runs.counts())


def encode_pairs(config: PreprocessConfig, dataset: Dataset, pairs: Sequence[Pair], is_crops: bool,
                 writers: Sequence[SampleWriter], progress: Progress) -> Record:
    """Write crop k of each image to writer k, or whole images to the only writer; returns statistics.

    Raises DatasetError on an unusable image, unless `config.on_error` is "skip"; Interrupted when stopped.
    """
    tree = HashedTree(dataset.tree)
    dataset = replace(dataset, tree=tree)
    stats = _Statistics(len(dataset.classes), len(writers))
    for pair in pairs:
        failed = False
        try:
            _encode_pair(config, dataset, pair, is_crops, writers, stats)
        except DatasetError as error:
            if config.on_error == "fail":
                raise
            failed = True
            stats.skipped_images.append((pair.image_path, str(error)))
        progress.image_done(failed)
    return {**stats.to_record(), "sources": hash_sources(tree, pairs, _Silent())}


def _encode_pair(config: PreprocessConfig, dataset: Dataset, pair: Pair, is_crops: bool,
                 writers: Sequence[SampleWriter], stats: _Statistics) -> None:
    source = read_pair(dataset, pair, keeps_file=not is_crops)
    label_map = source.label_map
    if not is_crops:
        record = encode_rle(label_map, dataset.ignore_index)
        meta = {"source": pair.image_path}
        writers[0].write(pair.key, source.image_bytes, source.suffix, encode_sample(pair.key, record, meta))
        stats.add(count_values(label_map, dataset.ignore_index + 1)[: dataset.ignore_index], label_map.size)
    else:
        labels = LabelRuns(label_map, dataset.ignore_index)
        for number, writer in enumerate(writers):
            encoded = encode_crop(config, pair, source.image, labels, number)
            if encoded is None:
                stats.skipped_crops[NO_LABEL] += 1
                continue
            writer.write(encoded.key, encoded.jpeg, "jpg", encoded.payload)
            stats.add(encoded.class_pixels, config.crops.window**2, number)
    stats.images += 1
    stats.mapped["pixels"] += label_map.size
    stats.mapped["nearest"] += source.nearest
    stats.mapped["rest"] += source.rest


def merged(records: Iterable[Record]) -> Record:
    """The statistics of several groups of images as those of one: numbers are added, lists joined."""
    whole: Record = {}
    for record in records:
        for name, value in record.items():
            whole[name] = _merged(name, whole[name], value) if name in whole else value
    return whole


def _merged(name: str, one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    if name in ("class_pixels", "class_samples", SAMPLE_CLASSES):
        return [first + second for first, second in zip(one, other, strict=True)]
    return one + other


class _Silent:
    """Progress of work that was counted before."""

    def image_done(self, failed: bool = False) -> None:
        """Nothing to count."""


class _Statistics:
    """Statistics of some images, for the manifest."""

    def __init__(self, num_classes: int, shards: int) -> None:
        self.sample_classes: list[list[list[int]]] = [[] for _ in range(shards)]
        self.images, self.ignored_pixels = 0, 0
        self.mapped = dict.fromkeys(("pixels", "nearest", "rest"), 0)  # of the sources; see `label_mapping.Mapped`
        self.class_pixels, self.class_samples = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self.skipped_crops: Counter[str] = Counter()
        self.skipped_images: list[tuple[str, str]] = []

    def add(self, class_pixels: np.ndarray, pixels: int, shard: int = 0) -> None:
        """Add a sample of `pixels` pixels, of which `class_pixels` are labelled, in one of the shards."""
        self.sample_classes[shard].append(np.flatnonzero(class_pixels[: self.class_pixels.size]).tolist())
        present = class_pixels[: self.class_pixels.size]
        self.class_pixels[: present.size] += present
        self.class_samples[: present.size] += present > 0
        self.ignored_pixels += pixels - int(present.sum())

    def to_record(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "class_pixels": self.class_pixels.tolist(),
            "class_samples": self.class_samples.tolist(),
            "ignored_pixels": self.ignored_pixels,
            "mapped": self.mapped,
            "skipped_crops": dict(self.skipped_crops),
            "skipped_images": self.skipped_images,
            SAMPLE_CLASSES: self.sample_classes,
        }
