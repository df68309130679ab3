"""Write the indexes and, last, the manifest, whose presence marks a shard set as complete."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from preprocess.blocks import STORED_LATER, Block, leave_out, producer
from preprocess.config import PreprocessConfig
from preprocess.pairs import Dataset
from shards.cli.config_file import config_to_dict
from shards.errors import DatasetError
from shards.files.storage import Storage
from shards.manifest import INDEX_DTYPE, IndexInfo, Manifest, ShardInfo, SplitInfo, manifest_bytes
from shards.mirror import publish_manifest

_MAX_NAMED = 20  # classes named in one warning
_log = logging.getLogger(__name__)


def publish(config: PreprocessConfig, dataset: Dataset, storage: Storage, blocks: list[Block],
            records: dict[str, Any], set_hash: str) -> Manifest:
    """Combine the records of all blocks; write the indexes and the manifest.

    Raises StorageError when another process has published another set here in the meantime.
    """
    splits = {}
    for split in dataset.splits:
        mine = [records[block.name] for block in blocks if block.split == split]
        _report_mapped(split, mine)
        splits[split] = _publish_split(storage, split, mine, dataset.skipped[split], split in config.crops.splits)
    settings = config_to_dict(config)
    manifest = Manifest(
        dataset=dataset.kind, classes=dataset.classes, ignore_index=dataset.ignore_index, seed=config.seed,
        crops=settings["crops"], config=_portable(settings), config_hash=set_hash, producer=producer(), splits=splits,
        sources={block.name: records[block.name]["sources"] for block in blocks},
    )
    publish_manifest(storage, manifest_bytes(manifest))
    return manifest


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


def _report_mapped(split: str, records: list[dict[str, Any]]) -> None:
    """Say how many source pixels a class table did not map exactly."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.get("mapped", {}))  # blocks of an older version have none
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


def _publish_split(
    storage: Storage, split: str, records: list[dict[str, Any]], unpaired: list[tuple[str, str]], is_crops: bool
) -> SplitInfo:
    shards = [ShardInfo(**shard) for record in records for shard in record["shards"]]
    index = b"".join(bytes.fromhex(entries) for record in records for entries in record["index"])
    if not shards:
        raise DatasetError(f"split {split!r} has no usable sample: every image or crop was skipped")
    if not any(map(any, (record["class_pixels"] for record in records))):
        raise DatasetError(f"split {split!r} has no labelled pixel: its label maps hold only ignored values. "
                           "Check dataset.ignore_labels, dataset.reduce_zero_label and the class table")
    index_info = IndexInfo(name=f"{split}.index", bytes=len(index), sha256=hashlib.sha256(index).hexdigest())
    assert len(index) == INDEX_DTYPE.itemsize * sum(shard.samples for shard in shards)
    storage.write(index_info.name, index)
    skipped_crops: Counter[str] = Counter()
    for record in records:
        skipped_crops.update(record["skipped_crops"])
    skipped = [*unpaired, *(tuple(item) for record in records for item in record["skipped_images"])]
    return SplitInfo(
        kind="crops" if is_crops else "images",
        images=sum(record["images"] for record in records),
        samples=sum(shard.samples for shard in shards),
        shards=shards,
        index=index_info,
        class_pixels=np.sum([record["class_pixels"] for record in records], axis=0).tolist(),
        class_samples=np.sum([record["class_samples"] for record in records], axis=0).tolist(),
        ignored_pixels=sum(record["ignored_pixels"] for record in records),
        skipped_crops=dict(sorted(skipped_crops.items())),
        skipped_images=[{"image": image, "reason": reason} for image, reason in skipped],
    )
