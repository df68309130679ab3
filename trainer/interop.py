"""Training data for other libraries: first stage of a webdataset pipeline, or batches for Hugging Face models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from shards.errors import ConfigError
from shards.plan import MicroBatchNumbers
from trainer.data.batch import normalized_images
from trainer.data.crops import TrainCrops, open_reader, read_samples, share_of_worker, train_plan
from trainer.data.sources import train_sources
from trainer.data.targets import to_dense
from trainer.data_config import DataConfig
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD


class SampleStream(IterableDataset[dict[str, Any]]):
    """One epoch of verified training samples, in planned order: {"__key__", "jpg" or "png": bytes, "mp": bytes}.

    Can be the first stage of a `webdataset.DataPipeline`. Each sample appears exactly once (with `data.sampling`, as
    often as in the trainer) over all ranks and their loader processes; the ranks' numbers of samples may differ by one.
    Of one set: raises ConfigError for `data.sources`.
    """

    def __init__(self, config: DataConfig, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if config.sources:
            raise ConfigError(f"data.sources has {len(config.sources)} entries, legal for SampleStream: none, as it "
                              "yields labels as they are stored; use TransformersBatches, or one stream for each set")
        self.reader = open_reader(config, config.train_split)
        self.plan = train_plan(self.reader, config, 1, seed)
        self.epoch, self.rank, self.world_size, self.budget = epoch, rank, world_size, config.read_ahead_mb << 20

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.epoch * self.plan.epoch_size
        positions = range(first + self.rank, first + self.plan.epoch_size, self.world_size)
        numbers = [self.plan.sample_at(position).sample for position in share_of_worker(positions)]
        for sample in read_samples(self.reader, numbers, self.budget):
            yield {"__key__": sample.key, sample.image_suffix: sample.image_bytes, "mp": sample.payload}


class TransformersBatches(IterableDataset[dict[str, Any]]):
    """Augmented training batches in the format of Hugging Face's universal segmentation models.

    `{"pixel_values": float32 [B, 3, H, W], "mask_labels": B x float32 [N, H, W], "class_labels": B x int64 [N]}`: the
    trainer's batches of steps first_step to last_step - 1, of data.root or, mixed, of data.sources. Use it in a
    DataLoader with `batch_size=None`.
    """

    def __init__(self, config: DataConfig, batch_size: int, last_step: int, first_step: int = 0, seed: int = 0,
                 rank: int = 0, world_size: int = 1, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> None:
        numbers = MicroBatchNumbers(first_step=first_step, last_step=last_step, rank=rank, world_size=world_size,
                                    accumulation=1)
        self.crops = TrainCrops(train_sources(config, batch_size, seed), config, numbers, batch_size * world_size)
        self.mean, self.std = list(mean), list(std)

    def __iter__(self) -> Iterator[dict[str, Tensor | list[Tensor]]]:
        for batch in (crops.to(torch.device("cpu")) for crops in self.crops):
            dense = [to_dense(target) for target in batch.targets()]
            yield {"pixel_values": normalized_images(batch, self.mean, self.std),
                   "mask_labels": [target["masks"].float() for target in dense],
                   "class_labels": [target["labels"] for target in dense]}
