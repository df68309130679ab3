"""What all exports share: which samples, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shards.files.storage import Storage
from shards.looking.selection import check_labels, read_in_order
from shards.manifest import Manifest
from shards.reader import ShardReader
from shards.sample import CropSample

Progress = Callable[[], object]


def samples_of(storage: Storage, manifest: Manifest, split: str, progress: Progress) -> Iterator[CropSample]:
    """The verified samples of a split in storage order; `progress` is called after each. Raises as
    `ShardReader.read`."""
    reader = ShardReader(storage, split, manifest)
    for _, sample in read_in_order(reader, range(len(reader))):
        check_labels(sample, manifest.classes)
        yield sample
        progress()
