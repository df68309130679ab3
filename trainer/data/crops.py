"""From shards to batches: loader workers read, decode and crop; the training device does the rest.

Workers send a few packed tensors (uint8 pixels and segment maps): dense masks would be 10 to 40 times the bytes, and
transferring them, not decoding, would then be the bottleneck.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from shards.crops.drawing import Crop
from shards.errors import ConfigError, CorruptShardError
from shards.files.cache import DiskCache
from shards.files.storage import RetryPolicy, Storage, open_storage
from shards.manifest import Manifest
from shards.mixing import Mixture
from shards.plan import Dealing, TrainPlan
from shards.read_ahead import ReadAhead, look_ahead
from shards.reader import ShardReader
from shards.rle import IGNORE_16_BIT, ignore_value
from shards.sample import CropSample
from shards.sampling import ClassLists, cumulative_repeats
from trainer.data.batch import Batch
from trainer.data.class_mapping import ClassMapping
from trainer.data.geometry import Move, draw_move, rotate_labels
from trainer.data.online_crops import cut_into, draw_labels, source_pixels
from trainer.data.resampling import Resize, region_of
from trainer.data.targets import dense_masks
from trainer.data.transforms import draw_photometric, random_window
from trainer.data_config import DataConfig, OnlineConfig
from trainer.seeding import sample_rng

_Aheads = Sequence[ReadAhead | None]  # of each source; None: its set is in a local folder
_IMAGES_AHEAD = 8  # whole images that a loader process requests from object storage ahead of time


class _Cut(NamedTuple):
    """Labels of a crop cut from a sample."""

    segment_map: npt.NDArray[Any]  # [H, W]
    labels: npt.NDArray[np.int64]  # [N]
    valid: tuple[int, int]  # height and width of the unpadded part


class _Crop(NamedTuple):
    """One sample of a micro-batch, without its pixels."""

    key: str
    segment_map: npt.NDArray[Any]  # [H, W]
    labels: npt.NDArray[np.int64]  # [N]
    valid: tuple[int, int]  # height and width of the unpadded part; padding is on the right and at the bottom
    move: Move
    photometric: npt.NDArray[np.float32]


def open_reader(config: DataConfig, split: str, manifest: Manifest | None = None, root: str | None = None
                ) -> ShardReader:
    """Open a split of the set at `root`, by default `data.root`, with the configured cache and retry policy.

    Raises ShardError; ConfigError for a split without any labelled pixel, as there is nothing to learn or measure, and
    for a cache folder that is not private to this user.
    """
    root = config.root if root is None else root
    assert root is not None
    storage = storage_of(config, root)
    cache = None if config.cache_dir is None else DiskCache.in_folder(config.cache_dir, int(config.cache_gb * 1e9))
    reader = ShardReader(storage, split, manifest, cache)
    if not reader.info.labelled_pixels:
        raise ConfigError(f"{root}: split {split!r} has no labelled pixel in its {len(reader)} samples; make "
                          "the shards again with a label mapping that fits the dataset, or choose another split "
                          "(data.train_split, data.val_split, or the split of an entry of data.sources)")
    return reader


def storage_of(config: DataConfig, root: str) -> Storage:
    """A folder or URL, read by the configured retry policy."""
    return open_storage(root, RetryPolicy(tries=config.tries, timeout=config.timeout))


def train_plan(reader: ShardReader, config: DataConfig, micro_batch_size: int, seed: int,
               mapping: ClassMapping | None = None, dealing: Dealing | None = None) -> TrainPlan:
    """The order of the samples of a split, sampled as configured by their classes after `mapping`; `dealing` is that of
    its mixture with others. Raises ShardError for sampling of a set that does not list its samples' classes."""
    repeats = None
    if config.sampling != "none":
        lists, info = ClassLists.load(reader.storage, reader.info), reader.info
        if mapping is not None:
            lists = mapping.of_lists(lists)
            held = np.bincount(lists.ids, minlength=mapping.num_targets)
            info = replace(info, class_samples=held.tolist())
        repeats = cumulative_repeats(lists, info, config.sampling, config.sampling_threshold)
    return TrainPlan(reader.table.samples, micro_batch_size, seed, config.lanes, config.span_samples, repeats,
                     dealing)


@dataclass(frozen=True)
class TrainSource:
    """A split to train on, its samples in the order of its own plan."""

    reader: ShardReader
    plan: TrainPlan
    mapping: ClassMapping | None = None  # from its classes to those of the network; None: they are the same
    weight: float = 1.0  # its part of all samples, in proportion to the weights of the other sources


class TrainCrops(IterableDataset[Batch]):
    """Micro-batches of the sources, mixed by weight. Micro-batch m is a pure function of (shards, configuration, seed,
    m): the mixture says which source a position takes its sample from, and the source's plan which sample.

    `global_batch_size` is needed for data.on_corrupt "skip"; the default is the size of one micro-batch.
    """

    def __init__(self, sources: Sequence[TrainSource], config: DataConfig, numbers: Iterable[int] = (),
                 global_batch_size: int | None = None) -> None:
        self.sources, self.config, self.numbers = list(sources), config, numbers
        self.mixture = Mixture([source.weight for source in sources])
        self.micro_batch_size = sources[0].plan.micro_batch_size
        self.global_batch_size = global_batch_size or self.micro_batch_size
        self.rules = config.crop_rules
        self._budgets = read_ahead_budgets(sources, config.read_ahead_mb << 20)

    def __getitem__(self, number: int) -> Batch:
        return self._batch(number, [None] * len(self.sources))

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches of `numbers`; in a loader process, only its share of them."""
        aheads = [None if budget is None else ReadAhead(source.reader, budget)
                  for source, budget in zip(self.sources, self._budgets, strict=True)]
        # All lanes reach the ends of their spans together; then the next span of every lane is needed at once.
        lanes = max((source.plan.lanes for source, ahead in zip(self.sources, aheads, strict=True) if ahead), default=0)
        try:
            for number in look_ahead(share_of_worker(self.numbers), -(-lanes // self.micro_batch_size),
                                     lambda number: self._request(number, aheads)):
                yield self._batch(number, aheads)
        finally:
            for ahead in filter(None, aheads):
                ahead.close()

    def positions(self, number: int) -> range:
        """The positions of micro-batch `number` in the endless sequence."""
        return range(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)

    def _request(self, number: int, aheads: _Aheads) -> None:
        for turn in map(self.mixture.locate, self.positions(number)):
            if (ahead := aheads[turn.source]) is not None:
                plan = self.sources[turn.source].plan
                span = plan.span(turn.position)
                ahead.ask(span, partial(plan.samples, span))

    def _batch(self, number: int, aheads: _Aheads) -> Batch:
        images = _Images(self.micro_batch_size, self.config.online)
        samples, skipped = self._read_samples(number, aheads, images)
        keys, segment_maps, labels, valid, moves, photometric = zip(*samples, strict=True)  # of each _Crop
        maps = stack_segment_maps(segment_maps)
        counts = [ids.size for ids in labels]
        dense = self.config.targets == "dense"
        return Batch(
            number=number,
            keys=list(keys),
            images=images.pixels.permute(0, 3, 1, 2),
            regions=images.regions,
            resizes=images.resizes,
            segment_maps=None if dense else maps,
            masks=[dense_masks(segments, count) for segments, count in zip(maps, counts, strict=True)] if dense
            else None,
            labels=torch.from_numpy(np.concatenate(labels)),
            counts=counts,
            photometric=torch.from_numpy(np.stack(photometric)) if self.config.photometric else None,
            valid=list(valid),
            moves=list(moves),
            skipped=skipped,
        )

    def _read_samples(self, number: int, aheads: _Aheads, images: _Images) -> tuple[list[_Crop], list[str]]:
        """The samples of a micro-batch, and the errors of those skipped (data.on_corrupt "skip").

        A skipped sample is replaced by the next readable one of its global batch, so that batches keep their size,
        ranks stay in step, and a step's samples do not depend on the number of ranks, workers or micro-batches.
        """
        crops: list[_Crop] = []
        skipped: list[str] = []
        for position in self.positions(number):
            try:
                crops.append(self._sample(position, aheads, images))
            except CorruptShardError as error:
                if self.config.on_corrupt == "fail":
                    raise
                skipped.append(str(error))
                crops.append(self._substitute(position, images, error))
        return crops, skipped

    def _substitute(self, position: int, images: _Images, error: CorruptShardError) -> _Crop:
        size = self.global_batch_size
        offset = position % size
        for other in range(offset + 1, offset + size):
            with contextlib.suppress(CorruptShardError):  # reported where that sample itself is due
                return self._sample(position - offset + other % size, [None] * len(self.sources), images)
        raise CorruptShardError(f"all samples of global batch {position // size} are corrupt: {error}")

    def _sample(self, position: int, aheads: _Aheads, images: _Images) -> _Crop:
        turn = self.mixture.locate(position)
        source, ahead, data = self.sources[turn.source], aheads[turn.source], None
        draw = source.plan.sample_at(turn.position)
        if ahead is not None:
            span = source.plan.span(turn.position)
            data = ahead.take(span, partial(source.plan.samples, span), draw.sample)
        sample = source.reader.read(draw.sample, data)
        check_labels(sample, source.reader.num_classes)
        rng = sample_rng(source.plan.seed, draw.epoch, draw.sample, draw.repeat)
        cut = self._stored_crop if self.rules is None else self._drawn_crop
        segment_map, labels, valid = cut(sample, source, rng, images)
        move = draw_move(rng, self.config, valid)
        if move.degrees:
            ignored = int(np.iinfo(segment_map.dtype).max)
            segment_map, labels = drop_absent_labels(rotate_labels(segment_map, valid, move.degrees, ignored), labels)
        return _Crop(sample.key, segment_map, labels, valid, move, draw_photometric(rng, self.config.hue_degrees))

    def _stored_crop(self, sample: CropSample, source: TrainSource, rng: np.random.Generator, images: _Images) -> _Cut:
        segment_map, labels, window, valid = sample.segment_map, sample.labels, None, sample.valid_size
        if source.mapping is not None:
            segment_map, labels = source.mapping.of_segment_map(segment_map, labels)
        if self.config.crop_size is not None:
            window, valid = random_window(rng, segment_map.shape, valid, self.config.crop_size, sample.key)
            segment_map, labels = drop_absent_labels(segment_map[window], labels)
        images.add(sample, segment_map.shape, window, source.reader.storage.root)
        return _Cut(segment_map, labels, valid)

    def _drawn_crop(self, sample: CropSample, source: TrainSource, rng: np.random.Generator, images: _Images) -> _Cut:
        assert self.rules is not None
        drawn = draw_labels(sample, self.rules, rng, source.mapping)
        images.add_drawn(sample, drawn.crop, self.rules.window)
        return _Cut(drawn.segment_map, drawn.labels, (drawn.crop.height, drawn.crop.width))


class _Images:
    """The images of a micro-batch: `pixels`, uint8 [B, H, W, 3], into which they are decoded, or with
    data.online.resample_on "device" the `regions` from which that device makes them."""

    def __init__(self, batch: int, online: OnlineConfig) -> None:
        self.batch, self.count, self.first = batch, 0, ("", "")  # key and set
        self.reduced, self.on_device = online.reduced_decoding, online.resample_on == "device"
        self.pixels = torch.empty((batch, 0, 0, 3), dtype=torch.uint8)
        self.regions: list[Tensor] = []
        self.resizes: list[Resize] = []

    def add_drawn(self, sample: CropSample, crop: Crop, side: int) -> None:
        """Add a crop of an image. Raises CorruptShardError."""
        if self.on_device:
            region, resize = region_of(source_pixels(sample, crop, self.reduced), crop)
            self.regions.append(torch.from_numpy(region))
            self.resizes.append(resize)
            return
        if not self.count:
            self.pixels = torch.empty((self.batch, side, side, 3), dtype=torch.uint8)
        cut_into(self.pixels[self.count].numpy(), sample, crop, self.reduced)
        self.count += 1

    def add(self, sample: CropSample, size: tuple[int, ...], window: tuple[slice, slice] | None, root: str) -> None:
        """Add an image of the set at `root`, or a window of it. Raises CorruptShardError; ConfigError if its size
        differs from the first."""
        if not self.count:
            self.pixels, self.first = torch.empty((self.batch, *size, 3), dtype=torch.uint8), (sample.key, root)
        height, width = self.pixels.shape[1:3]
        if size != (height, width):
            raise ConfigError(f"samples of one batch differ in size: {self.first[0]} {height}x{width} of "
                              f"{self.first[1]}, {sample.key} {size[0]}x{size[1]} of {root}. Train on a split of "
                              "crops, set data.crop_size, or draw crops from whole images (data.online.scaled_side)")
        if window is None:
            sample.decode_into(self.pixels[self.count].numpy())
        else:
            self.pixels[self.count].numpy()[:] = sample.image[window]
        self.count += 1


def read_ahead_budgets(sources: Sequence[TrainSource], budget: int) -> list[int | None]:
    """Bytes of read-ahead of each source; None for local ones, which need none.

    In proportion to the size of their samples: a source holds spans of all its lanes, whatever its weight.
    """
    sizes = [None if source.reader.is_local else 1.0 for source in sources]
    if sum(size is not None for size in sizes) > 1:
        sizes = [size and source.reader.info.bytes / len(source.reader)
                 for size, source in zip(sizes, sources, strict=True)]
    total = sum(filter(None, sizes))
    return [None if size is None else int(budget * (size / total)) for size in sizes]


def read_samples(reader: ShardReader, numbers: Iterable[int], budget: int) -> Iterator[CropSample]:
    """Samples in the given order; from object storage with read-ahead of at most `budget` bytes."""
    if reader.is_local:
        yield from map(reader.read, numbers)
        return
    ahead = ReadAhead(reader, budget)
    try:
        for number in look_ahead(numbers, _IMAGES_AHEAD, lambda number: ahead.ask(number, partial(list, [number]))):
            yield reader.read(number, ahead.take(number, partial(list, [number]), number))
    finally:
        ahead.close()


def share_of_worker(numbers: Iterable[int]) -> Iterable[int]:
    """Each of n loader processes takes every n-th number; DataLoader polls them in turn, which restores the order."""
    worker = get_worker_info()
    return numbers if worker is None else islice(numbers, worker.id, None, worker.num_workers)


def check_labels(sample: CropSample, num_classes: int) -> None:
    """Raise CorruptShardError for a label outside the class table; on the CPU, so that the device need not check."""
    if sample.labels.size and sample.labels[-1] >= num_classes:  # ascending
        raise CorruptShardError(f"sample {sample.key} holds the label {sample.labels[-1]}, "
                                f"legal: 0..{num_classes - 1}")


def drop_absent_labels(
    segment_map: npt.NDArray[Any], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Renumber a cropped segment map so that it has one label per class still present."""
    is_present = np.bincount(segment_map.reshape(-1), minlength=labels.size)[: labels.size] > 0
    present = labels[is_present]
    table = np.full(np.iinfo(segment_map.dtype).max + 1, ignore_value(present.size), np.uint16)
    table[np.flatnonzero(is_present)] = np.arange(present.size)
    return table[segment_map].astype(np.uint8 if present.size <= 255 else np.uint16), present


def stack_segment_maps(segment_maps: Sequence[npt.NDArray[Any]]) -> Tensor:
    """uint8 [B, H, W]; int32 (ignored: 65535) if any crop has more labels than uint8 can hold."""
    if all(segments.dtype == np.uint8 for segments in segment_maps):
        return torch.from_numpy(np.stack(segment_maps))
    wide = [np.where(segments == np.iinfo(segments.dtype).max, IGNORE_16_BIT, segments.astype(np.int32))
            for segments in segment_maps]
    return torch.from_numpy(np.stack(wide).astype(np.int32))
