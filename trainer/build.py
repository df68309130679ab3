"""The one place where `decoder_head.type` decides: which network, and which loss trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from shards.errors import ConfigError
from trainer.checkpoint import Checkpoint
from trainer.config import RandomBackboneConfig, RunConfig
from trainer.criterion import MaskCriterion, PixelCriterion
from trainer.models import Segmenter, build_eomt, build_linear, build_mask2former
from trainer.models.recompute import set_gradient_checkpointing
from trainer.models.weights import WeightsFile


class HeadKind(NamedTuple):
    """How to build the model and the criterion of one kind of head."""

    model: Callable[[RunConfig, int], Segmenter]
    criterion: Callable[[RunConfig, int, int], MaskCriterion | PixelCriterion]
    size_divisor: int  # height and width of training crops must be multiples of it


HEADS = {
    "m2f": HeadKind(
        model=lambda config, classes: build_mask2former(config.backbone, config.adapter, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index: MaskCriterion(config.loss, classes),
        size_divisor=32,  # the adapter's coarsest map
    ),
    "linear": HeadKind(
        model=lambda config, classes: build_linear(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index: PixelCriterion(ignore_index),
        size_divisor=16,  # the ViT's patches
    ),
    "eomt": HeadKind(
        model=lambda config, classes: build_eomt(config.backbone, config.decoder_head, classes),
        criterion=lambda config, classes, ignore_index: MaskCriterion(config.loss, classes),
        size_divisor=16,
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


def size_divisor(config: RunConfig) -> int:
    """What height and width of training crops must be multiples of."""
    return HEADS[config.decoder_head.type].size_divisor


def has_batch_norm(config: RunConfig) -> bool:
    """Whether what is trained holds batch norm, which needs more than one value of each channel."""
    return config.decoder_head.type == "m2f" or (config.decoder_head.type == "linear"
                                                 and config.decoder_head.use_batchnorm)


def restore_model(checkpoint: Checkpoint, backbone_source: str | None, device: torch.device) -> Segmenter:
    """The trained network of a checkpoint, in eval mode. `backbone_source` tells where the ViT lies now.

    Raises ConfigError when that ViT's weights are not those the head was trained on.
    """
    config = checkpoint.run_config
    if backbone_source is not None:
        backbone = replace(config.backbone, source=backbone_source, random=RandomBackboneConfig())
        config = replace(config, backbone=backbone)
    model = build_model(config, len(checkpoint.classes))
    found = model.backbone.weights_sha256()
    if found != checkpoint.backbone_sha256 and not config.backbone.trainable:  # a trained ViT is in the checkpoint
        raise ConfigError(
            f"the backbone's weights have sha256 {found[:16]}, the head was trained on "
            f"{checkpoint.backbone_sha256[:16]}; set backbone.source to the ViT used in training "
            "(random backbones also depend on the torch version)"
        )
    model.load_trainable_state_dict(checkpoint.model)
    return model.eval().to(device)


def model_from_weights(weights: WeightsFile, config: RunConfig, num_classes: int, device: torch.device) -> Segmenter:
    """The configured network with adapter and head that another program trained, complete, in eval mode.

    Raises ConfigError when the weights do not fit it; `load.ignore` has no say, as nothing may stay random.
    """
    model = build_model(config, num_classes)
    model.load_weights(weights)
    return model.eval().to(device)
