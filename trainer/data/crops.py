"""From shards to batches: loader workers read, decode and crop; the training device does the rest.

Workers send a few packed tensors (uint8 pixels and segment maps): dense masks would be 10 to 40 times the bytes, and
transferring them, not decoding, would then be the bottleneck.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
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
from shards.files.storage import RetryPolicy, open_storage
from shards.manifest import Manifest
from shards.plan import TrainPlan
from shards.read_ahead import ReadAhead, look_ahead
from shards.reader import ShardReader
from shards.rle import IGNORE_16_BIT, ignore_value
from shards.sample import CropSample
from shards.sampling import ClassLists, cumulative_repeats
from trainer.config import DataConfig, OnlineConfig
from trainer.data.batch import Batch
from trainer.data.geometry import Move, draw_move, rotate_labels
from trainer.data.online_crops import cut_into, draw_labels, source_pixels
from trainer.data.resampling import Resize, region_of
from trainer.data.targets import dense_masks
from trainer.data.transforms import draw_photometric, random_window
from trainer.seeding import sample_rng

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


def open_reader(config: DataConfig, split: str, manifest: Manifest | None = None) -> ShardReader:
    """Open a split of `data.root` with the configured cache and retry policy.

    Raises ShardError; ConfigError for a split without any labelled pixel, as there is nothing to learn or measure, and
    for a cache folder that is not private to this user.
    """
    assert config.root is not None
    storage = open_storage(config.root, RetryPolicy(tries=config.tries, timeout=config.timeout))
    cache = None if config.cache_dir is None else DiskCache.in_folder(config.cache_dir, int(config.cache_gb * 1e9))
    reader = ShardReader(storage, split, manifest, cache)
    if not reader.info.labelled_pixels:
        raise ConfigError(f"{config.root}: split {split!r} has no labelled pixel in its {len(reader)} samples; make "
                          "the shards again with a label mapping that fits the dataset, or choose another split "
                          "(data.train_split, data.val_split)")
    return reader


def train_plan(reader: ShardReader, config: DataConfig, micro_batch_size: int, seed: int) -> TrainPlan:
    """The order of the samples of a split, sampled as configured. Raises ShardError for sampling of a set that does not
    list its samples' classes."""
    repeats = None
    if config.sampling != "none":
        lists = ClassLists.load(reader.storage, reader.info)
        repeats = cumulative_repeats(lists, reader.info, config.sampling, config.sampling_threshold)
    return TrainPlan(reader.table.samples, micro_batch_size, seed, config.lanes, config.span_samples, repeats)


class TrainCrops(IterableDataset[Batch]):
    """Micro-batches of the plan. Micro-batch m is a pure function of (shards, configuration, seed, m).

    `global_batch_size` is needed for data.on_corrupt "skip"; the default is the size of one micro-batch.
    """

    def __init__(self, reader: ShardReader, plan: TrainPlan, config: DataConfig, numbers: Iterable[int] = (),
                 global_batch_size: int | None = None) -> None:
        self.reader, self.plan, self.config, self.numbers = reader, plan, config, numbers
        self.global_batch_size = global_batch_size or plan.micro_batch_size
        self.rules = config.crop_rules

    def __getitem__(self, number: int) -> Batch:
        return self._batch(number, None)

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches of `numbers`; in a loader process, only its share of them."""
        if self.reader.is_local:
            yield from map(self.__getitem__, share_of_worker(self.numbers))
            return
        ahead = ReadAhead(self.reader, self.config.read_ahead_mb << 20)
        # All lanes reach the ends of their spans together; then the next span of every lane is needed at once.
        batches_ahead = -(-self.plan.lanes // self.plan.micro_batch_size)
        try:
            for number in look_ahead(share_of_worker(self.numbers), batches_ahead,
                                     lambda number: self._request(number, ahead)):
                yield self._batch(number, ahead)
        finally:
            ahead.close()

    def _request(self, number: int, ahead: ReadAhead) -> None:
        for span in map(self.plan.span, self.plan.positions(number)):
            ahead.ask(span, partial(self.plan.samples, span))

    def _batch(self, number: int, ahead: ReadAhead | None) -> Batch:
        images = _Images(self.plan.micro_batch_size, self.config.online)
        samples, skipped = self._read_samples(number, ahead, images)
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

    def _read_samples(self, number: int, ahead: ReadAhead | None, images: _Images) -> tuple[list[_Crop], list[str]]:
        """The samples of a micro-batch, and the errors of those skipped (data.on_corrupt "skip").

        A skipped sample is replaced by the next readable one of its global batch, so that batches keep their size,
        ranks stay in step, and a step's samples do not depend on the number of ranks, workers or micro-batches.
        """
        crops: list[_Crop] = []
        skipped: list[str] = []
        for position in self.plan.positions(number):
            try:
                crops.append(self._sample(position, ahead, images))
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
                return self._sample(position - offset + other % size, None, images)
        raise CorruptShardError(f"all samples of global batch {position // size} are corrupt: {error}")

    def _sample(self, position: int, ahead: ReadAhead | None, images: _Images) -> _Crop:
        draw = self.plan.sample_at(position)
        data = None
        if ahead is not None:
            span = self.plan.span(position)
            data = ahead.take(span, partial(self.plan.samples, span), draw.sample)
        sample = self.reader.read(draw.sample, data)
        check_labels(sample, self.reader.num_classes)
        rng = sample_rng(self.plan.seed, draw.epoch, draw.sample, draw.repeat)
        cut = self._stored_crop if self.rules is None else self._drawn_crop
        segment_map, labels, valid = cut(sample, rng, images)
        move = draw_move(rng, self.config, valid)
        if move.degrees:
            ignored = int(np.iinfo(segment_map.dtype).max)
            segment_map, labels = drop_absent_labels(rotate_labels(segment_map, valid, move.degrees, ignored), labels)
        return _Crop(sample.key, segment_map, labels, valid, move, draw_photometric(rng, self.config.hue_degrees))

    def _stored_crop(self, sample: CropSample, rng: np.random.Generator, images: _Images) -> _Cut:
        segment_map, labels, window, valid = sample.segment_map, sample.labels, None, sample.valid_size
        if self.config.crop_size is not None:
            window, valid = random_window(rng, segment_map.shape, valid, self.config.crop_size, sample.key)
            segment_map, labels = drop_absent_labels(segment_map[window], labels)
        images.add(sample, segment_map.shape, window)
        return _Cut(segment_map, labels, valid)

    def _drawn_crop(self, sample: CropSample, rng: np.random.Generator, images: _Images) -> _Cut:
        assert self.rules is not None
        drawn = draw_labels(sample, self.rules, rng)
        images.add_drawn(sample, drawn.crop, self.rules.window)
        return _Cut(drawn.segment_map, drawn.labels, (drawn.crop.height, drawn.crop.width))


class _Images:
    """The images of a micro-batch: `pixels`, uint8 [B, H, W, 3], into which they are decoded, or with
    data.online.resample_on "device" the `regions` from which that device makes them."""

    def __init__(self, batch: int, online: OnlineConfig) -> None:
        self.batch, self.count, self.first = batch, 0, ""
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

    def add(self, sample: CropSample, size: tuple[int, ...], window: tuple[slice, slice] | None) -> None:
        """Add an image, or a window of it. Raises CorruptShardError; ConfigError if its size differs from the first."""
        if not self.count:
            self.pixels, self.first = torch.empty((self.batch, *size, 3), dtype=torch.uint8), sample.key
        height, width = self.pixels.shape[1:3]
        if size != (height, width):
            raise ConfigError(f"samples of one batch differ in size: {self.first} {height}x{width}, {sample.key} "
                              f"{size[0]}x{size[1]}. Train on a split of crops, set "
                              "data.crop_size, or draw crops from whole images (data.online.scaled_side)")
        if window is None:
            sample.decode_into(self.pixels[self.count].numpy())
        else:
            self.pixels[self.count].numpy()[:] = sample.image[window]
        self.count += 1


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
