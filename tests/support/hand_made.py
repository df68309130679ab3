"""Small shard sets written sample by sample, for content that no image folder would produce."""

from __future__ import annotations

import hashlib
import io
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.files.storage import LocalStorage
from shards.manifest import (
    MANIFEST_NAME,
    SHARD_DTYPE,
    ClassInfo,
    FileInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    load_manifest,
    manifest_bytes,
)
from shards.picture_file import PNG_START
from shards.rle import encode_rle, ignore_value
from shards.sample import encode_sample
from shards.shard_table import ShardTable
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
    """Write table, index and manifest for `write_set`."""
    split = split_of(root, "train", shards, index, kind="crops", class_pixels=[samples * size[0] * size[1], 0],
                     class_samples=[samples, 0], ignored_pixels=0)
    classes = [ClassInfo(name=name, color=(number, 0, 0)) for number, name in enumerate(("a", "b"))]
    manifest = Manifest(dataset="folder", classes=classes, ignore_index=255, seed=0, crops={}, config={},
                        config_hash="0" * 64, producer={}, splits={"train": split})
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))


def split_of(root: Path, name: str, shards: Sequence[ShardInfo], index: bytes, **fields: Any) -> SplitInfo:
    """Write a split's table, index and (empty) sources; `fields` are the manifest's."""
    rows, start = [], 0
    for shard in shards:
        end = start + 16 * shard.samples
        number = int(shard.name.removesuffix(".tar").rpartition("-")[2])
        rows.append((number, shard.samples, shard.bytes, zlib.crc32(index[start:end]), bytes.fromhex(shard.sha256)))
        start = end
    samples = sum(shard.samples for shard in shards)
    return SplitInfo(
        images=samples, samples=samples, shards=len(shards), bytes=sum(shard.bytes for shard in shards),
        table=file_of(root, f"{name}.shards", np.array(rows, SHARD_DTYPE).tobytes()),
        index=file_of(root, f"{name}.index", index), sources=file_of(root, f"{name}.sources", b""), **fields)


def file_of(root: Path, name: str, data: bytes) -> FileInfo:
    (root / name).write_bytes(data)
    return FileInfo(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def edit_table(root: Path, split: str, change: Callable[[np.ndarray], None], fix: bool = True) -> None:
    """Change the SHARD_DTYPE records of a split; with `fix`, the manifest is made to agree."""
    manifest = load_manifest(root)
    info = manifest.splits[split]
    records = np.fromfile(root / f"{split}.shards", SHARD_DTYPE)
    change(records)
    table = file_of(root, f"{split}.shards", records.tobytes())
    if fix:
        changed = {**manifest.splits, split: replace(info, table=table, shards=len(records))}
        (root / MANIFEST_NAME).write_bytes(manifest_bytes(replace(manifest, splits=changed)))


def shards_of(root: Path, split: str = "train") -> list[ShardInfo]:
    return list(ShardTable.load(LocalStorage(root), split, load_manifest(root).splits[split]))


def as_version_1(root: Path) -> Path:
    """Rewrite a set's manifest as releases wrote it that knew version 1 only; all other files stay."""
    manifest = load_manifest(root)
    splits, sources = {}, {}
    for name, info in manifest.splits.items():
        listed = shards_of(root, name)
        hashes = (root / f"{name}.sources").read_bytes()
        sources |= {f"{name}-{block:06d}": hashes[32 * block : 32 * block + 32].hex()
                    for block in range(len(hashes) // 32)}
        splits[name] = replace(info, listed=listed, table=None, sources=None, classes=None)
        for suffix in ("shards", "sources", "classes"):
            (root / f"{name}.{suffix}").unlink()
    old = replace(manifest, splits=splits, sources=sources, format_version=1)
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(old))
    return root


def as_version_2(root: Path) -> Path:
    """As `as_version_1`, by releases that knew version 2."""
    manifest = load_manifest(root)
    for name in manifest.splits:
        (root / f"{name}.classes").unlink()
    splits = {name: replace(info, classes=None) for name, info in manifest.splits.items()}
    (root / MANIFEST_NAME).write_bytes(manifest_bytes(replace(manifest, splits=splits, format_version=2)))
    return root


def rename_classes(root: Path, copy: Path, names: Sequence[str]) -> Path:
    """A copy of a set with other names of its classes; those after the last have no pixel."""
    shutil.copytree(root, copy)
    manifest = load_manifest(copy)
    more = [0] * (len(names) - manifest.num_classes)
    splits = {name: replace(info, class_pixels=[*info.class_pixels, *more], class_samples=[*info.class_samples, *more])
              for name, info in manifest.splits.items()}
    classes = [ClassInfo(name=name, color=(number, 0, 0)) for number, name in enumerate(names)]
    (copy / MANIFEST_NAME).write_bytes(manifest_bytes(replace(manifest, classes=classes, splits=splits)))
    return copy


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
    return split_of(root, split, shards, index, kind="images", class_pixels=pixels.tolist(),
                    class_samples=holding.tolist(), ignored_pixels=ignored_pixels)
