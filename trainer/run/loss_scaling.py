"""Loss scaling for `train.precision: fp16`, whose smallest numbers are too large for many gradients.

The loss is multiplied by a scale before the backward pass, and the gradients divided by it afterwards (Micikevicius et
al., arXiv:1710.03740, sec. 3.2). The scale halves when gradients overflow, and doubles after 2000 steps without that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

MOST_OVERFLOWS = 16  # in a row: so many halvings take the first scale, 65536, down to 1


class Outcome(Enum):
    """What to do after a backward pass."""

    UPDATE = auto()  # all is finite
    OVERFLOW = auto()  # leave the weights alone; the scale was too high
    NON_FINITE = auto()  # leave the weights alone; `train.on_non_finite` decides


def outcome_of(losses: Mapping[str, float], scale: float | None, overflows: int) -> Outcome:
    """Judge a step by its losses and "grad_norm", equal on all ranks. `scale`: of the loss, None without scaling;
    `overflows`: steps just before that overflowed.

    Losses come from the forward pass, before the scale, so that a lower one cannot make them finite. Nor is it a scale
    of 1 that makes gradients overflow.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if not bad:
        return Outcome.UPDATE
    is_curable = bad == ["grad_norm"] and scale is not None and scale > 1 and overflows < MOST_OVERFLOWS
    return Outcome.OVERFLOW if is_curable else Outcome.NON_FINITE


class LossScaler:
    """torch's GradScaler, with a limit to overflows; without scaling everything passes through unchanged."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.is_enabled, self._device = enabled, device
        self.restore(None)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Begin with the scale of a checkpoint; None: with the first one."""
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self.is_enabled)
        self._overflows = 0
        if self.is_enabled and state is not None:
            self._overflows = state["overflows"]
            self._scaler.load_state_dict(state)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps; None without scaling. Waits for the device."""
        return {**self._scaler.state_dict(), "overflows": self._overflows} if self.is_enabled else None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to backpropagate."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale. Call it once per step, before clipping."""
        self._scaler.unscale_(optimizer)

    def judge(self, losses: Mapping[str, float]) -> Outcome:
        """What to do with the unscaled gradients (see `outcome_of`); sets the next step's scale."""
        scale = None if all(map(math.isfinite, losses.values())) else self.scale  # only then worth waiting for
        outcome = outcome_of(losses, scale, self._overflows)
        if outcome is Outcome.NON_FINITE:
            self._scaler.update(scale)  # unchanged: as if there had been no such step
        else:
            self._overflows = self._overflows + 1 if outcome is Outcome.OVERFLOW else 0
            self._scaler.update()
        return outcome

    @property
    def scale(self) -> float | None:
        """The scale; None without scaling. Waits for the device."""
        return self._scaler.get_scale() if self.is_enabled else None

    def logged(self) -> dict[str, float]:
        """The scale as a value to log, if there is one."""
        scale = self.scale
        return {} if scale is None else {"loss_scale": scale}
