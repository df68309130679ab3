"""Our samples in other people's pipelines: as a first stage for webdataset, as batches for Hugging Face models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from shards.plan import MicroBatchNumbers, TrainPlan
from trainer.config import DataConfig
from trainer.data.crops import TrainCrops, normalized_images, open_reader, read_samples, share_of_worker
from trainer.data.targets import to_dense
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD


class SampleStream(IterableDataset[dict[str, Any]]):
    """One epoch of training samples in the order of the plan, verified: {"__key__", "jpg" or "png": bytes, "mp": bytes}

    Usable as the first stage of a `webdataset.DataPipeline`. Over all ranks and their loader processes each sample
    comes exactly once; ranks may differ by one sample.
    """

    def __init__(self, config: DataConfig, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.reader = open_reader(config, config.train_split)
        self.plan = TrainPlan([shard.samples for shard in self.reader.info.shards], 1, seed, config.lanes,
                              config.span_samples)
        self.epoch, self.rank, self.world_size, self.budget = epoch, rank, world_size, config.read_ahead_mb << 20

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = self.epoch * self.plan.num_samples
        mine = range(first + self.rank, first + self.plan.num_samples, self.world_size)
        numbers = [self.plan.sample_at(position).sample for position in share_of_worker(mine)]
        for sample in read_samples(self.reader, numbers, self.budget):
            yield {"__key__": sample.key, sample.image_suffix: sample.image_bytes, "mp": sample.payload}


class TransformersBatches(IterableDataset[dict[str, Any]]):
    """Augmented training batches with the names of Hugging Face's universal segmentation models.

    `{"pixel_values": float32 [B, 3, H, W], "mask_labels": B x float32 [N, H, W], "class_labels": B x int64 [N]}`, for
    steps first_step to last_step - 1 of micro-batches as the trainer would see them. Give it to a DataLoader with
    `batch_size=None`.
    """

    def __init__(self, config: DataConfig, batch_size: int, last_step: int, first_step: int = 0, seed: int = 0,
                 rank: int = 0, world_size: int = 1, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD) -> None:
        reader = open_reader(config, config.train_split)
        plan = TrainPlan([shard.samples for shard in reader.info.shards], batch_size, seed, config.lanes,
                         config.span_samples)
        numbers = MicroBatchNumbers(first_step=first_step, last_step=last_step, rank=rank, world_size=world_size,
                                    accumulation=1)
        self.crops = TrainCrops(reader, plan, config, numbers, batch_size * world_size)
        self.mean, self.std = list(mean), list(std)

    def __iter__(self) -> Iterator[dict[str, Tensor | list[Tensor]]]:
        for batch in (crops.to(torch.device("cpu")) for crops in self.crops):
            dense = [to_dense(target) for target in batch.targets()]
            yield {"pixel_values": normalized_images(batch, self.mean, self.std),
                   "mask_labels": [target["masks"].float() for target in dense],
                   "class_labels": [target["labels"] for target in dense]}
