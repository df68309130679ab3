"""Encode one block of source images into shards, one per crop number.

A worker decodes each image of a block once and writes crop k to the block's k-th shard, so a shard's bytes depend only
on (configuration, block).
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from preprocess.config import PreprocessConfig
from preprocess.crops import crop_rng, cut_image, draw_crop
from preprocess.label_runs import LabelRuns
from preprocess.layouts.pairing import Pair
from preprocess.pairs import Dataset, read_pair
from preprocess.source_tree import HashedTree
from shards.cli.config_file import config_to_dict
from shards.errors import ConfigError, DatasetError
from shards.manifest import FORMAT_VERSION, hash_of
from shards.rle import count_values, encode_rle, encode_runs
from shards.sample import encode_sample
from shards.writer import ShardWriter

# Settings added later are left out of the hash at the values that give the old behaviour, so older sets keep theirs;
# those of the second line also of the manifest.
_HASHED_LATER = {"crops": {"scaled_side": "short"}, "dataset": {"exif_orientation": "refuse"}}
STORED_LATER: dict[str, dict[str, Any]] = {
    "dataset": {"images": None, "labels": None, "image_range": [], "image_bands": []},
}
NO_LABEL = "no labelled pixel in any try"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A unit of work: pairs of one split, and the names of the shards they become."""

    split: str
    number: int
    pairs: list[Pair]
    shard_names: list[str]
    is_crops: bool

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


class Job(NamedTuple):
    """The inputs shared by all blocks of a shard set, and its output folder."""

    config: PreprocessConfig
    dataset: Dataset
    output: Path


class Interrupted(Exception):
    """The parent asked its workers to stop; raised between images."""


def plan_blocks(config: PreprocessConfig, dataset: Dataset) -> list[Block]:
    """Cut every split into blocks of nearly equal size and name their shards."""
    unknown = set(config.crops.splits) - set(dataset.splits)
    if unknown:
        raise ConfigError(f"crops.splits names {sorted(unknown)}, legal: {sorted(dataset.splits)}")
    blocks = []
    for split, pairs in dataset.splits.items():
        is_crops = split in config.crops.splits
        per_block = config.crops.per_image if is_crops else 1
        count = -(-len(pairs) // config.images_per_shard)
        for number in range(count):
            first, last = number * len(pairs) // count, (number + 1) * len(pairs) // count
            names = [f"{split}-{number * per_block + k:06d}.tar" for k in range(per_block)]
            blocks.append(Block(split=split, number=number, pairs=pairs[first:last], shard_names=names,
                                is_crops=is_crops))
    return blocks


def config_hash(config: PreprocessConfig, dataset: Dataset) -> str:
    """Hash of everything that determines the shards' bytes: settings, classes, encoders; not paths or workers."""
    content = config_to_dict(config)
    for place in ("output", "staging", "workers", "on_error", "warn_ignored"):
        del content[place]
    for place in ("root", "class_file", "limit"):
        del content["dataset"][place]
    for later in (_HASHED_LATER, STORED_LATER):
        leave_out(content, later)
    meaning = [asdict(item) for item in dataset.classes], *dataset.mapping.identity
    return hash_of([FORMAT_VERSION, content, meaning, producer()])


def leave_out(content: dict[str, Any], later: dict[str, dict[str, Any]]) -> None:
    """Remove the settings in `later` that have the value given there."""
    for section, settings in later.items():
        for name, neutral in settings.items():
            if content[section].get(name) == neutral:
                del content[section][name]


def block_fingerprint(fingerprint: str, block: Block) -> str:
    """Hash of everything that determines a block's bytes: settings and the names and sizes of its source files."""
    pairs = [{name: value for name, value in asdict(pair).items() if name != "annotation" or value}
             for pair in block.pairs]
    return hash_of([fingerprint, block.shard_names, pairs])


def hash_sources(tree: HashedTree, block: Block, stop: Any = None, images_done: Any = None) -> str:
    """Hash of the content of a block's source files: as the tree has already read them, or else as they are now.

    Unlike `block_fingerprint`, it reads the files, and so detects a label map that was edited without changing size.
    """
    hashes = []
    for pair in block.pairs:
        _check_stop(stop)
        for path in pair.paths:
            if path not in tree.sha256:
                with contextlib.suppress(DatasetError):  # unreadable: reported when it is used
                    tree.read(path)
            hashes.append(tree.sha256.get(path, "unreadable"))
        hashes += [pair.annotation] if pair.annotation else []
        _count(images_done)
    return hash_of(hashes)


def _check_stop(stop: Any) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted


def _count(images_done: Any) -> None:
    if images_done is not None:
        with images_done.get_lock():
            images_done.value += 1


def producer() -> dict[str, str]:
    """Versions of the encoders behind the shards' bytes. Other JPEG or zlib builds may give other, equivalent bytes."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": str(features.version("libjpeg_turbo")),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


class EncodedCrop(NamedTuple):
    """The parts of a sample, and its labelled pixels by class."""

    key: str
    jpeg: bytes
    payload: bytes
    class_pixels: np.ndarray


def encode_crop(config: PreprocessConfig, pair: Pair, image: Image.Image, labels: LabelRuns, number: int
                ) -> EncodedCrop | None:
    """Crop `number` of an image; None if no pixel is labelled."""
    crop = draw_crop(crop_rng(config.seed, pair.key, number), labels, config.crops)
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


def write_block(job: Job, block: Block, stop: Any = None, images_done: Any = None) -> dict[str, Any]:
    """Write the shards of one block; returns its record (JSON types): shards, index, sources, class counts, skips."""
    config, tree = job.config, HashedTree(job.dataset.tree)
    dataset = replace(job.dataset, tree=tree)
    stats = _BlockStats(len(dataset.classes))
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(job.output / name)) for name in block.shard_names]
        for pair in block.pairs:
            _check_stop(stop)
            try:
                _write_pair(config, dataset, block, pair, writers, stats)
            except DatasetError as error:
                if config.on_error == "fail":
                    raise
                stats.skipped_images.append((pair.image_path, str(error)))
            _count(images_done)
    for writer in writers:
        if not writer.info.samples:
            writer.path.unlink()
    kept = [writer for writer in writers if writer.info.samples]
    return {
        "shards": [asdict(writer.info) for writer in kept],
        "index": [writer.index.tobytes().hex() for writer in kept],
        "sources": hash_sources(tree, block),
        **stats.to_record(),
    }


def _write_pair(
    config: PreprocessConfig, dataset: Dataset, block: Block, pair: Pair, writers: list[ShardWriter], stats: _BlockStats
) -> None:
    source = read_pair(dataset, pair, keeps_file=not block.is_crops)
    label_map = source.label_map
    if not block.is_crops:
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
            stats.add(encoded.class_pixels, config.crops.window**2)
    stats.images += 1
    stats.mapped["pixels"] += label_map.size
    stats.mapped["nearest"] += source.nearest
    stats.mapped["rest"] += source.rest


class _BlockStats:
    """A block's statistics for the manifest."""

    def __init__(self, num_classes: int) -> None:
        self.images, self.ignored_pixels = 0, 0
        self.mapped = dict.fromkeys(("pixels", "nearest", "rest"), 0)  # of the sources; see `label_mapping.Mapped`
        self.class_pixels, self.class_samples = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self.skipped_crops: Counter[str] = Counter()
        self.skipped_images: list[tuple[str, str]] = []

    def add(self, class_pixels: np.ndarray, pixels: int) -> None:
        """Add a sample of `pixels` pixels, of which `class_pixels` are labelled."""
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
        }
