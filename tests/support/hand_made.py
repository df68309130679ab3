"""Small shard sets written sample by sample, for content that no image folder would produce."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.manifest import (
    MANIFEST_NAME,
    ClassInfo,
    IndexInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    manifest_bytes,
)
from shards.picture_file import PNG_START
from shards.rle import encode_rle, ignore_value
from shards.sample import encode_sample
from shards.writer import ShardWriter


def jpeg(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_set(root: Path, shards: Sequence[Sequence[bytes]], size: tuple[int, int] = (64, 64)) -> Path:
    """A set with one split "train" of crops; `shards` lists each shard's images, whose masks are all class 0."""
    root.mkdir(parents=True, exist_ok=True)
    record = encode_rle(np.zeros(size, np.uint8))
    infos, index = [], b""
    for number, images in enumerate(shards):
        with ShardWriter(root / f"train-{number:06d}.tar") as writer:
            for place, image in enumerate(images):
                key = f"{number}-{place}"
                writer.write(key, image, "jpg", encode_sample(key, record, {}))
        infos.append(writer.info)
        index += writer.index.tobytes()
    write_manifest(root, infos, index, sum(map(len, shards)), size)
    return root


def write_manifest(root: Path, shards: list[ShardInfo], index: bytes, samples: int, size: tuple[int, int]) -> None:
    """Write the index and manifest for `write_set`."""
    (root / "train.index").write_bytes(index)
    split = SplitInfo(
        kind="crops", images=samples, samples=samples, shards=shards, class_pixels=[samples * size[0] * size[1], 0],
        class_samples=[samples, 0], ignored_pixels=0,
        index=IndexInfo(name="train.index", bytes=len(index), sha256=hashlib.sha256(index).hexdigest()),
    )
    classes = [ClassInfo(name=name, color=(number, 0, 0)) for number, name in enumerate(("a", "b"))]
    manifest = Manifest(dataset="folder", classes=classes, ignore_index=255, seed=0, crops={}, config={},
                        config_hash="0" * 64, producer={}, splits={"train": split})
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))


Labelled = tuple[str, bytes, np.ndarray]  # key, JPEG or PNG, label map [H, W] with `ignore_value` where ignored


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_labelled(root: Path, splits: Mapping[str, Sequence[Labelled]], classes: Sequence[str | ClassInfo],
                   per_shard: int = 2, **fields: Any) -> Path:
    """A set of whole images, with true counts; `fields` are the manifest's."""
    root.mkdir(parents=True, exist_ok=True)
    infos = [ClassInfo(name=item, color=(200, 10 * number % 256, 30)) if isinstance(item, str) else item
             for number, item in enumerate(classes)]
    found = {name: _write_split(root, name, samples, len(classes), per_shard) for name, samples in splits.items()}
    settings = {"dataset": "folder", "seed": 0, "crops": {}, "config": {}, "config_hash": "0" * 64, "producer": {},
                **fields}
    manifest = Manifest(classes=infos, ignore_index=ignore_value(len(infos)), splits=found, **settings)
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return root


def _write_split(root: Path, split: str, samples: Sequence[Labelled], num_classes: int, per_shard: int) -> SplitInfo:
    shards, index, ignored = [], b"", ignore_value(num_classes)
    pixels, holding, ignored_pixels = np.zeros(num_classes, int), np.zeros(num_classes, int), 0
    for first in range(0, len(samples), per_shard):
        with ShardWriter(root / f"{split}-{first // per_shard:06d}.tar") as writer:
            for key, image, label_map in samples[first : first + per_shard]:
                suffix = "png" if image.startswith(PNG_START) else "jpg"
                writer.write(key, image, suffix, encode_sample(key, encode_rle(label_map, ignored), {}))
                counts = np.bincount(label_map.reshape(-1), minlength=num_classes)[:num_classes]
                pixels += counts
                holding += counts > 0
                ignored_pixels += int((label_map == ignored).sum())
        shards.append(writer.info)
        index += writer.index.tobytes()
    (root / f"{split}.index").write_bytes(index)
    return SplitInfo(kind="images", images=len(samples), samples=len(samples), shards=shards,
                     index=IndexInfo(name=f"{split}.index", bytes=len(index), sha256=hashlib.sha256(index).hexdigest()),
                     class_pixels=pixels.tolist(), class_samples=holding.tolist(), ignored_pixels=ignored_pixels)
