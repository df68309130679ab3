"""A training step of the configured model without its memory or its arithmetic: torch's fake tensors have shapes only.

So it takes seconds for any size, and no weights are read. It runs the operators that a CPU would run, under the
autocast of a CPU; CUDA's differ in detail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.build import build_criterion, build_model
from trainer.config import RunConfig
from trainer.data.batch import Batch, normalized_images
from trainer.data.geometry import Move
from trainer.data.transforms import PHOTOMETRIC_PARAMETERS
from trainer.loss.criterion import MaskCriterion
from trainer.loss.matcher import HungarianMatcher
from trainer.loss.packed_targets import ReadableTargets
from trainer.memory.tracking import AllocationTracker

BATCH, ACTIVATIONS, LOSS, GRADIENTS, BACKWARD = "batch", "activations", "loss", "gradients", "backward pass"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the training samples are like."""

    height: int
    width: int
    classes: int  # in the class table
    ignore_index: int
    targets: int  # in one sample


class SimulatedModel:
    """The configured model, with the architecture of its ViT in `backbone.random`, as fake tensors on a fake CPU."""

    def __init__(self, config: RunConfig, samples: Samples, low: torch.dtype | None) -> None:
        """`low`: autocast's dtype; None: no autocast."""
        self.config, self.samples, self.low = config, samples, low
        with torch.device("meta"):
            self.model = build_model(config, samples.classes)
            if low is not None and not config.backbone.trainable:
                self.model.backbone.round_to(low)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self.model.to_empty(device="cpu").train()
            self.model.head.set_progress(0, config.train.total_steps)
            self._criterion = build_criterion(config, samples.classes, samples.ignore_index)
            if isinstance(self._criterion, MaskCriterion):
                _presume_matches(self._criterion)

    def peaks(self, batch_size: int) -> dict[str, dict[str, float]]:
        """What a micro-batch of this size needs beside the weights, if there are no gradients before it: for each of
        the phases ACTIVATIONS, LOSS and BACKWARD, the bytes of each part when their sum is largest."""
        config, model = self.config, self.model
        model.zero_grad(set_to_none=True)
        weights = [*model.parameters(), *model.buffers(), *self._criterion.buffers()]
        with self._mode, AllocationTracker(weights) as tracker:
            with tracker.phase(BATCH):
                batch = _batch(config, self.samples, batch_size)
            casts = torch.autocast("cpu", self.low or torch.bfloat16, self.low is not None,
                                   cache_enabled=not config.train.fsdp)
            with tracker.phase(ACTIVATIONS), casts:
                outputs = model(normalized_images(batch, config.backbone.image_mean, config.backbone.image_std))
            with tracker.phase(LOSS):
                num_masks = torch.full((), float(batch_size * self.samples.targets))
                total = self._criterion(outputs, batch.targets(), num_masks, None).total
            del outputs
            with tracker.phase(BACKWARD):
                total.backward()
            tracker.attribute((parameter.grad for parameter in model.parameters() if parameter.grad is not None),
                              GRADIENTS)
        return tracker.peaks()


def _presume_matches(criterion: MaskCriterion) -> None:
    """Which queries match decides about numbers, not about memory: let the first ones do."""
    loss = criterion.loss
    loss.matcher = _PresumedMatcher(loss.num_points, loss.mask_coefficient, loss.dice_coefficient,
                                    loss.class_coefficient)


class _PresumedMatcher(HungarianMatcher):
    def assign(self, costs: Tensor, targets: ReadableTargets, num_labels: int) -> Tensor:
        """Matches of the right shape, int64 [L, 3, M], without looking at the costs [L, B, Q, Nmax]."""
        matched = sum(min(count, costs.shape[2]) for count in targets.counts)
        return torch.zeros(costs.shape[0], 3, matched, dtype=torch.int64, device=costs.device)


def _batch(config: RunConfig, samples: Samples, size: int) -> Batch:
    """A micro-batch as the device gets it."""
    shape = size, samples.height, samples.width
    # The linear head's loss makes segment maps of dense targets, and looks at the numbers for it.
    dense = config.data.targets == "dense" and config.decoder_head.type != "linear"
    segments = torch.uint8 if samples.targets < 255 else torch.int32
    return Batch(
        number=0, keys=[""] * size,
        images=torch.empty((size, 3, *shape[1:]), dtype=torch.uint8, memory_format=torch.channels_last),
        segment_maps=None if dense else torch.empty(shape, dtype=segments),
        masks=[torch.empty((samples.targets, *shape[1:]), dtype=torch.bool) for _ in range(size)] if dense else None,
        labels=torch.empty(size * samples.targets, dtype=torch.int64), counts=[samples.targets] * size,
        photometric=torch.empty(size, len(PHOTOMETRIC_PARAMETERS)) if config.data.photometric else None,
        valid=[shape[1:]] * size, moves=[Move()] * size, skipped=[])
