"""An exponential moving average (EMA) of the weights, which usually segments better than the last weights themselves.

The average follows each step with `a += (1 - d) * (w - a)`, d being the decay: Polyak averaging (SIAM J. Control Optim.
30(4), 1992) with exponential weights, as in timm's ModelEma and torch's AveragedModel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.models import Segmenter
from trainer.models.fsdp import is_sharded, own_part


def decay_after(updates: int, decay: float, warmup: bool) -> float:
    """The decay of the update that follows `updates` others: `decay`, or at first with a warm-up (1 + n) / (10 + n), as
    in TensorFlow's ExponentialMovingAverage: the average then covers about the last ninth of the steps so far."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Batch norm's running means and variances, float32 [channels] each."""
    return [tensor for module in model.modules() if isinstance(module, _BatchNorm)
            for tensor in (module.running_mean, module.running_var) if tensor is not None]


class AveragedWeights:
    """The average of what training changes in a model: its trainable parameters, and batch norm's running statistics.

    The statistics are averaged like the weights, as timm, torchvision's references and YOLO's trainers do: those of the
    last weights do not fit features that averaged weights compute. All else is shared with the model: a frozen ViT, and
    buffers that follow a schedule (EoMT's masking). Equal on all ranks; with `train.fsdp` each averages its own part.
    """

    def __init__(self, model: Segmenter, settings: TrainConfig, context: DistContext) -> None:
        assert settings.ema_decay is not None
        self.decay, self.warmup = settings.ema_decay, settings.ema_warmup
        self.updates = 0
        self._model, self._context = model, context
        self._statistics = running_statistics(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._parts = len(trained) if is_sharded(model) else 0  # how many of the weights are FSDP's memory
        self._weights = [*map(own_part, trained), *self._statistics]
        self._averages = [weight.detach().clone() for weight in self._weights]

    def update(self) -> None:
        """Follow an optimiser step: one fused pass over weights and averages on CUDA, without waiting for the device.

        Call it on all ranks.
        """
        if self._context.device.type != "cuda":  # there batch norm is synchronised; elsewhere rank 0's counts
            self._context.broadcast(self._statistics)
        decay = decay_after(self.updates, self.decay, self.warmup)
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, self.updates)
        self.updates += 1

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model has the averages for its weights. They change places, and copies only where the weights are
        parts, whose memory is FSDP's."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the averages, in the layout of the model's own, and the number of updates. It shares
        tensors, which the next update modifies."""
        with self.in_model():
            return {"model": self._model.trainable_state_dict(), "updates": self.updates}

    def restore(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`, once the model has its own weights; None: start again from these."""
        if state is None:
            self.updates = 0
            for average, weight in zip(self._averages, self._weights, strict=True):
                average.copy_(weight.detach())
            return
        self.updates = state["updates"]
        with self.in_model():
            self._model.load_trainable_state_dict(state["model"], "the checkpoint's averaged weights")

    def _exchange(self) -> None:
        for number, (weight, average) in enumerate(zip(self._weights, self._averages, strict=True)):
            if number < self._parts:
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)
            else:
                weight.data, average.data = average.data, weight.data
