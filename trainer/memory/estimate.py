"""The memory that training needs on one device, by part, before anything is trained.

Weights, gradients, moments and averages are counted. What a micro-batch adds is simulated (see
`trainer.memory.simulation`). The CUDA context, libraries' workspaces and fragmentation are not in it: hence HEADROOM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from shards.errors import ConfigError
from trainer.config import LoadConfig, RunConfig
from trainer.distributed import pick_device
from trainer.memory.simulation import ACTIVATIONS, BACKWARD, BATCH, GRADIENTS, Samples, SimulatedModel
from trainer.model_config import RandomBackboneConfig
from trainer.models.backbones.sizes import known_sizes
from trainer.models.fsdp import sharded_layers
from trainer.precision import autocast_dtype
from trainer.run.averaging import running_statistics

HEADROOM = 0.1  # of a card
GATHERED = "gathered weights"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part at the moment of a step when their sum is largest."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


class MemoryModel:
    """Memory of the configured training on one device, for any size of micro-batch. Raises ConfigError when the sizes
    of the ViT cannot be told without loading it, or for settings that do not fit each other."""

    def __init__(self, config: RunConfig, samples: Samples, ranks: int = 1) -> None:
        """`ranks`: how many share the trained weights with train.fsdp."""
        self.config = config
        self._share = ranks if config.train.fsdp else 1
        self.on_gpu = config.device != "cpu"
        self.low = _autocast_dtype(config)
        self._model = SimulatedModel(_without_source(config), samples, self.low)
        self._fixed = self._fixed_parts()
        self._peaks: dict[int, dict[str, dict[str, float]]] = {}

    def estimate(self, batch_size: int) -> MemoryEstimate:
        """Of micro-batches of this size. Takes a second or more."""
        return self._worst(self._phases(batch_size))

    def largest_batch(self, memory: float) -> int:
        """The largest micro-batch whose estimate is within `memory` bytes, less HEADROOM; 0 if there is none."""
        given = self.config.train.micro_batch_size
        small, large = self._phases(given), self._phases(4 * given)
        within = memory * (1 - HEADROOM)

        def total(batch_size: int) -> float:
            """Every tensor is a constant plus a multiple of the number of images, and so is each phase's peak."""
            share = (batch_size - given) / (3 * given)
            return self._worst({phase: {part: size + share * (large[phase].get(part, 0.0) - size)
                                        for part, size in parts.items()} for phase, parts in small.items()}).total

        if total(1) > within:
            return 0
        fits, too_large = 1, 2
        while total(too_large) <= within:
            fits, too_large = too_large, 2 * too_large
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            fits, too_large = (middle, too_large) if total(middle) <= within else (fits, middle)
        return fits

    def _phases(self, batch_size: int) -> dict[str, dict[str, float]]:
        if batch_size not in self._peaks:
            self._peaks[batch_size] = self._model.peaks(batch_size)
        return self._peaks[batch_size]

    def _worst(self, phases: Mapping[str, Mapping[str, float]]) -> MemoryEstimate:
        """The phase that needs most, with what is always there."""
        return max((MemoryEstimate(self._fixed | self._in_phase(parts)) for parts in phases.values()),
                   key=lambda found: found.total)

    def _in_phase(self, parts: Mapping[str, float]) -> dict[str, float]:
        """A phase's parts as they are reported."""
        found = {name: size for name, size in parts.items() if name != BACKWARD}
        found[ACTIVATIONS] = parts.get(ACTIVATIONS, 0.0) + parts.get(BACKWARD, 0.0)
        if self.on_gpu:
            found[BATCH] = 2 * parts.get(BATCH, 0.0)  # the next one is copied meanwhile
        if self.config.train.global_batch_size > self.config.train.micro_batch_size * self._share:
            found[GRADIENTS] = self._trained  # of the micro-batches before, or in DDP's buckets
        if self._share > 1:
            found[GRADIENTS] = found.get(GRADIENTS, 0.0) / self._share
            found[GATHERED] = self._gathered(with_gradients=parts.get(GRADIENTS, 0.0) > 0)
        return found

    def _fixed_parts(self) -> dict[str, float]:
        """Bytes of what is there all the time."""
        model = self._model.model
        self._trained = float(sum(weight.nbytes for weight in model.parameters() if weight.requires_grad))
        frozen = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
        others = sum(buffer.nbytes for buffer in model.buffers())
        kept = self._trained / self._share
        parts = {"frozen ViT": float(frozen), "trained weights": kept + others, "optimiser state": 2.0 * kept}
        if self.config.train.ema_decay is not None:
            parts["averaged weights"] = kept + sum(tensor.nbytes for tensor in running_statistics(model))
        return parts

    def _gathered(self, *, with_gradients: bool) -> float:
        """Bytes of weights that are whole while others are sharded: all outside the layers, a layer that runs and one
        that is fetched. In the backward pass also gradients, of one layer."""
        layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in sharded_layers(self._model.model)]
        outside, largest = self._trained - sum(layers), max(layers, default=0)
        return 2 * outside + 3 * largest if with_gradients else outside + 2 * largest


def described(config: RunConfig, samples: Samples, card: float | None, ranks: int = 1) -> list[str]:
    """The estimate for the configured micro-batch in lines of text and, with a `card` of so many bytes, the largest
    micro-batch for it and so many ranks, which divide the global batch. Errors as in `MemoryModel`, but none for a ViT
    whose sizes cannot be told."""
    try:
        known_sizes(config.backbone)
    except ConfigError as error:
        return [f"memory is not estimated: {error}"]
    model, size = MemoryModel(config, samples, ranks), config.train.micro_batch_size
    found = model.estimate(size)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.low or torch.float32, "fp32")
    parts = ", ".join(f"{name} {part / 1e9:.3g}" for name, part in found.parts.items())
    place = "GPU" if model.on_gpu else "process"
    shared = f" of {ranks} that share the trained weights" if config.train.fsdp and ranks > 1 else ""
    lines = [f"memory per {place}{shared}, estimated for micro-batches of {size} in {precision}, {samples.targets} "
             f"masks in each of {samples.height}x{samples.width} pixels: {found.total / 1e9:.3g} GB",
             f"  {parts}{'; CUDA itself comes on top' if model.on_gpu else ''}"]
    if card is not None:
        largest, whole = model.largest_batch(card), config.train.global_batch_size
        fitting = max((number for number in range(1, largest + 1) if whole % (number * ranks) == 0), default=0)
        advice = (f"{largest} fit, and train.micro_batch_size={fitting} divides train.global_batch_size ({whole}"
                  f"{f', by {ranks} GPUs' if ranks > 1 else ''})"
                  if fitting else "not one crop fits; set train.gradient_checkpointing=true or lower data.crop_size")
        lines.append(f"  within {card / 1e9:.3g} GB, of which a tenth is left free: {advice}")
    return lines


def _autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """Autocast's dtype here; where there is no GPU, that of a GPU with bf16."""
    if config.device == "cpu" or torch.cuda.is_available():
        return autocast_dtype(config, pick_device(config.device))
    return {"fp32": None, "fp16": torch.float16}.get(config.train.precision, torch.bfloat16)


def _without_source(config: RunConfig) -> RunConfig:
    """The same with a random ViT of the same sizes, and without anything to be loaded."""
    sizes = known_sizes(config.backbone)
    random = RandomBackboneConfig(
        hidden_size=sizes.dim, num_hidden_layers=sizes.blocks, num_attention_heads=sizes.heads,
        intermediate_size=sizes.ffn, num_register_tokens=sizes.registers, use_gated_mlp=sizes.gated)
    return replace(config, load=LoadConfig(), backbone=replace(config.backbone, source=None, random=random,
                                                               patch_resize="weights"))
