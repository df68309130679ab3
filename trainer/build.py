"""The only place that branches on `decoder_head.type`: it selects the network and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from shards.errors import ConfigError
from shards.manifest import Manifest
from trainer.config import RunConfig
from trainer.loss.class_weights import ClassCounts, class_weights
from trainer.loss.criterion import MaskCriterion, PixelCriterion
from trainer.models import Segmenter, build_eomt, build_linear, build_mask2former, build_pmt
from trainer.models.recompute import set_gradient_checkpointing


class HeadKind(NamedTuple):
    """How to build the model and the criterion of one kind of head."""

    model: Callable[[RunConfig, int], Segmenter]
    criterion: Callable[[RunConfig, int, int, Sequence[float] | None], MaskCriterion | PixelCriterion]
    class_counts: ClassCounts  # what its cross-entropy counts: pixels, or masks, of which a sample has one per class
    has_batch_norm: Callable[[RunConfig], bool]  # on a map with one value per size_divisor x size_divisor pixels


HEADS = {
    "m2f": HeadKind(
        model=lambda config, classes: build_mask2former(config.backbone, config.adapter, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index, weights: MaskCriterion(config.loss, classes, weights),
        class_counts="samples",
        has_batch_norm=lambda config: True,
    ),
    "linear": HeadKind(
        model=lambda config, classes: build_linear(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index, weights: PixelCriterion(ignore_index, weights),
        class_counts="pixels",
        has_batch_norm=lambda config: config.decoder_head.use_batchnorm,
    ),
    "eomt": HeadKind(
        model=lambda config, classes: build_eomt(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index, weights: MaskCriterion(config.loss, classes, weights),
        class_counts="samples",
        has_batch_norm=lambda config: False,
    ),
    "pmt": HeadKind(
        model=lambda config, classes: build_pmt(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index, weights: MaskCriterion(config.loss, classes, weights),
        class_counts="samples",
        has_batch_norm=lambda config: False,  # its batch norms also see the class token, so never a single value
    ),
}


def build_model(config: RunConfig, num_classes: int) -> Segmenter:
    """The configured network, float32 on the CPU; adapter and head are initialised from torch's global RNG."""
    model = HEADS[config.decoder_head.type].model(config, num_classes)
    set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    model.head.set_matched_gradients(config.loss.matched_gradients)
    return model


def build_criterion(config: RunConfig, num_classes: int, ignore_index: int,
                    class_weights: Sequence[float] | None = None) -> MaskCriterion | PixelCriterion:
    """The configured head's loss; `class_weights` are those of `resolve_class_weights`."""
    return HEADS[config.decoder_head.type].criterion(config, num_classes, ignore_index, class_weights)


def resolve_class_weights(config: RunConfig, manifest: Manifest,
                          occurrences: Callable[[ClassCounts], Sequence[float]]) -> list[float] | None:
    """The configured weights of the classes, for the head's loss. Raises ConfigError (see `class_weights`)."""
    return class_weights(config.loss, manifest, occurrences, HEADS[config.decoder_head.type].class_counts)


def check_crop_size(config: RunConfig, height: int, width: int) -> None:
    """Raise ConfigError for training crops whose size does not fit the head, or leaves batch norm a single value.

    On CUDA, ranks share batch norm statistics, but a configuration must also run on a single rank.
    """
    kind, divisor = config.decoder_head.type, config.decoder_head.size_divisor
    if height % divisor or width % divisor:
        raise ConfigError(f"training crops are {height}x{width} pixels, legal for decoder_head.type {kind}: multiples "
                          f"of {divisor}. Set data.crop_size, or shard again with another crops.size")
    if height == width == divisor and config.train.micro_batch_size == 1 and HEADS[kind].has_batch_norm(config):
        raise ConfigError(
            f"training crops are {height}x{width} pixels and train.micro_batch_size is 1: batch norm in "
            f"decoder_head.type {kind} sees one value per {divisor}x{divisor} pixels and needs at least two. Legal: "
            f"crops of at least {2 * divisor}x{2 * divisor}, or a train.micro_batch_size of at least 2"
        )
