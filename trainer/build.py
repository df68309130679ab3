"""The one place where `decoder_head.type` decides: which network, and which loss trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from shards.errors import ConfigError
from trainer.config import RunConfig
from trainer.loss.criterion import MaskCriterion, PixelCriterion
from trainer.models import Segmenter, build_eomt, build_linear, build_mask2former
from trainer.models.recompute import set_gradient_checkpointing


class HeadKind(NamedTuple):
    """How to build the model and the criterion of one kind of head."""

    model: Callable[[RunConfig, int], Segmenter]
    criterion: Callable[[RunConfig, int, int], MaskCriterion | PixelCriterion]
    has_batch_norm: Callable[[RunConfig], bool]  # over a map with one value for each cell of its size divisor


HEADS = {
    "m2f": HeadKind(
        model=lambda config, classes: build_mask2former(config.backbone, config.adapter, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index: MaskCriterion(config.loss, classes),
        has_batch_norm=lambda config: True,
    ),
    "linear": HeadKind(
        model=lambda config, classes: build_linear(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index: PixelCriterion(ignore_index),
        has_batch_norm=lambda config: config.decoder_head.use_batchnorm,
    ),
    "eomt": HeadKind(
        model=lambda config, classes: build_eomt(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index: MaskCriterion(config.loss, classes),
        has_batch_norm=lambda config: False,
    ),
}


def build_model(config: RunConfig, num_classes: int) -> Segmenter:
    """The configured network, float32 on the CPU; adapter and head come from torch's global random state."""
    model = HEADS[config.decoder_head.type].model(config, num_classes)
    set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    model.head.set_matched_gradients(config.loss.matched_gradients)
    return model


def build_criterion(config: RunConfig, num_classes: int, ignore_index: int) -> MaskCriterion | PixelCriterion:
    """The loss that belongs to the configured head."""
    return HEADS[config.decoder_head.type].criterion(config, num_classes, ignore_index)


def check_crop_size(config: RunConfig, height: int, width: int) -> None:
    """Raise ConfigError for training crops whose size does not suit the head, or gives batch norm one value only.

    On CUDA several ranks share their statistics, but a configuration is to run on one, too.
    """
    kind, divisor = config.decoder_head.type, config.decoder_head.size_divisor
    if height % divisor or width % divisor:
        raise ConfigError(f"training crops are {height}x{width} pixels, legal for decoder_head.type {kind}: multiples "
                          f"of {divisor}. Set data.crop_size, or shard again with another crops.size")
    if height == width == divisor and config.train.micro_batch_size == 1 and HEADS[kind].has_batch_norm(config):
        raise ConfigError(
            f"training crops are {height}x{width} pixels and train.micro_batch_size is 1: batch norm of "
            f"decoder_head.type {kind} has one value per {divisor}x{divisor} pixels, and needs two. Legal: crops of at "
            f"least {2 * divisor}x{2 * divisor}, or a train.micro_batch_size of at least 2"
        )
