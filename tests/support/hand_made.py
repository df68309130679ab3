"""Small shard sets written sample by sample, for content that no image folder would produce."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

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
from shards.rle import encode_rle
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
