"""Write tables, indexes and, last, the manifest, whose presence marks a shard set as complete."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.blocks import STORED_LATER, Block, leave_out, producer
from preprocess.config import PreprocessConfig
from preprocess.encoding import STATISTICS, merged
from preprocess.execution.block_store import BlockStore
from preprocess.pairs import Dataset
from shards.cli.config_file import config_to_dict
from shards.errors import CorruptShardError, DatasetError
from shards.files.atomic import temporary_file
from shards.files.storage import Storage
from shards.manifest import (
    CLASS_DTYPE,
    INDEX_DTYPE,
    SHARD_DTYPE,
    SOURCE_BYTES,
    FileInfo,
    Manifest,
    SplitInfo,
    manifest_bytes,
)
from shards.mirror import publish_manifest
from shards.shard_table import read_records

_MAX_NAMED = 20  # classes named in one warning
_log = logging.getLogger(__name__)


def publish(config: PreprocessConfig, dataset: Dataset, store: BlockStore, blocks: list[Block], set_hash: str
            ) -> Manifest:
    """Combine the records of all blocks, one after the other; write tables, indexes and the manifest.

    Raises StorageError when another process has published another set here in the meantime.
    """
    splits = {}
    for split in dataset.splits:
        mine = [block for block in blocks if block.split == split]
        splits[split] = _publish_split(store, split, mine, dataset.skipped[split], split in config.crops.splits)
    settings = config_to_dict(config)
    manifest = Manifest(
        dataset=dataset.kind, classes=dataset.classes, ignore_index=dataset.ignore_index, seed=config.seed,
        crops=settings["crops"], config=_portable(settings), config_hash=set_hash, producer=producer(), splits=splits,
    )
    publish_manifest(store.storage, manifest_bytes(manifest))
    return manifest


def source_hashes(storage: Storage, manifest: Manifest, blocks: list[Block]) -> dict[str, str] | None:
    """Block -> hash of its source files, as a complete set has it; None if it was written without."""
    if manifest.format_version == 1:
        return manifest.sources or None
    found: dict[str, str] = {}
    for split, info in manifest.splits.items():
        if info.sources is None:
            return None
        mine = [block.name for block in blocks if block.split == split]
        hashes = read_records(storage, info.sources, np.dtype(f"V{SOURCE_BYTES}"), "list of sources")
        if len(hashes) != len(mine):
            raise CorruptShardError(f"{storage.where(info.sources.name)} is of {len(hashes)} blocks, legal: the "
                                    f"{len(mine)} of split {split!r}")
        found |= {name: item.tobytes().hex() for name, item in zip(mine, hashes, strict=True)}
    return found


def label_warnings(manifest: Manifest, most_ignored: float) -> Iterator[str]:
    """Possible mistakes in the labels, per split: classes without a pixel, and too many ignored pixels."""
    for name, split in manifest.splits.items():
        absent = split.absent_classes
        if absent:
            yield (f"split {name!r} has no pixel of {len(absent)} of {manifest.num_classes} classes: "
                   f"{manifest.names_of(absent, _MAX_NAMED)}")
        if split.ignored_share > most_ignored:
            yield (f"split {name!r} has {split.ignored_share:.1%} ignored pixels (warn_ignored is {most_ignored:.0%}); "
                   f"check dataset.ignore_labels and dataset.reduce_zero_label, which decide which values are ignored")


def _report_mapped(split: str, counts: dict[str, int]) -> None:
    """Say how many source pixels a class table did not map exactly."""
    for name, happened in (("nearest", "have an unlisted colour and took the class of the nearest listed one"),
                           ("rest", "hold values that the class table does not list, and are ignored")):
        if counts[name]:
            _log.warning("split %r: %d pixels (%.2f%%) %s", split, counts[name],
                         100 * counts[name] / counts["pixels"], happened)


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without paths, workers and policies, so that equal inputs give equal manifests on any machine."""
    dataset = {key: value for key, value in settings["dataset"].items() if key not in ("root", "class_file")}
    portable = {"dataset": dataset, "crops": settings["crops"], "images_per_shard": settings["images_per_shard"]}
    leave_out(portable, STORED_LATER)
    return portable


def _publish_split(store: BlockStore, split: str, blocks: list[Block], unpaired: list[tuple[str, str]],
                   is_crops: bool) -> SplitInfo:
    """Write a split's table, index and sources. The index is collected in a file, as it may be large."""
    found, name = _Collected(), f"{split}.index"
    folder = store.scratch if store.scratch.is_dir() else Path(tempfile.gettempdir())
    with temporary_file(folder / name, found.indexes(store, blocks)) as index:
        stats = found.statistics
        if not found.rows:
            raise DatasetError(f"split {split!r} has no usable sample: every image or crop was skipped")
        if not any(stats["class_pixels"]):
            raise DatasetError(f"split {split!r} has no labelled pixel: its label maps hold only ignored values. "
                               "Check dataset.ignore_labels, dataset.reduce_zero_label and the class table")
        store.storage.upload(name, index)
    with temporary_file(folder / f"{split}.classes", found.classes(store, blocks)) as classes:
        store.storage.upload(f"{split}.classes", classes)
    _report_mapped(split, stats["mapped"])
    table = np.array(found.rows, SHARD_DTYPE)
    return SplitInfo(
        kind="crops" if is_crops else "images",
        images=stats["images"],
        samples=int(table["samples"].sum(dtype=np.int64)),
        shards=len(table),
        bytes=int(table["bytes"].sum(dtype=np.uint64)),
        table=_written(store.storage, f"{split}.shards", table.tobytes()),
        index=FileInfo(name=name, bytes=found.index_bytes, sha256=found.index_hash.hexdigest()),
        sources=_written(store.storage, f"{split}.sources", bytes.fromhex("".join(found.sources))),
        classes=FileInfo(name=f"{split}.classes", bytes=found.classes_bytes, sha256=found.classes_hash.hexdigest()),
        class_pixels=stats["class_pixels"],
        class_samples=stats["class_samples"],
        ignored_pixels=stats["ignored_pixels"],
        skipped_crops=dict(sorted(stats["skipped_crops"].items())),
        skipped_images=[{"image": image, "reason": reason} for image, reason in [*unpaired, *stats["skipped_images"]]],
    )


class _Collected:
    """What the records of a split's blocks say together."""

    def __init__(self) -> None:
        self.statistics: dict[str, Any] = {}
        self.rows: list[tuple[int, int, int, int, bytes]] = []
        self.sources: list[str] = []
        self.samples: list[int] = []  # of each block
        self.index_hash, self.index_bytes = hashlib.sha256(), 0
        self.classes_hash, self.classes_bytes = hashlib.sha256(), 0

    def indexes(self, store: BlockStore, blocks: list[Block]) -> Iterator[bytes]:
        """The index of each block, as its record is read and added up."""
        for block in blocks:
            record = store.read_record(block)
            entries = record.pop("index")
            self.index_hash.update(entries)
            self.index_bytes += len(entries)
            self.samples.append(len(entries) // INDEX_DTYPE.itemsize)
            self.rows += _rows(record.pop("shards"), entries)
            self.sources.append(record.pop("sources"))
            self.statistics = merged([self.statistics, {name: record[name] for name in STATISTICS}])
            yield entries


    def classes(self, store: BlockStore, blocks: list[Block]) -> Iterator[bytes]:
        """The classes of all blocks' samples, after `indexes`: first the counts of each block, then its ids."""
        for is_counts in (True, False):
            for block, samples in zip(blocks, self.samples, strict=True):
                content, end = store.read_classes(block), CLASS_DTYPE.itemsize * samples
                data = content[:end] if is_counts else content[end:]
                self.classes_hash.update(data)
                self.classes_bytes += len(data)
                yield data


def _rows(shards: list[dict[str, Any]], index: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """SHARD_DTYPE records of a block's shards."""
    start = 0
    for shard in shards:
        end = start + shard["samples"] * INDEX_DTYPE.itemsize
        number = int(shard["name"].removesuffix(".tar").rpartition("-")[2])
        yield (number, shard["samples"], shard["bytes"], zlib.crc32(index[start:end]), bytes.fromhex(shard["sha256"]))
        start = end


def _written(storage: Storage, name: str, data: bytes) -> FileInfo:
    storage.write(name, data)
    return FileInfo(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
