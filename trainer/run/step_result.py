"""What a step computed. Its numbers are on their way to the host while the host goes on; who reads them, waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainer.run.loss_scaling import LossScaler, Outcome
from trainer.run.non_finite import NonFiniteStep


class HostNumbers:
    """Numbers [K] of the device, which the host can read as soon as the device has computed them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)  # from CUDA into pinned memory, so nobody waits yet
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers. Waits for the device, but only up to what it was given before this copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


@dataclass(kw_only=True)
class StepResult:
    """Result of one step. Equal on all ranks, except for `unmatched`, `micro_batch_losses` and `problems`.

    The properties wait for the device.
    """

    names: Sequence[str]
    numbers: HostNumbers  # mean of each name's values over the global batch, and the share of ranks asked to stop
    unmatched: int  # this rank's targets for which no query was left
    micro_batch_losses: Sequence[Mapping[str, Tensor]]
    problems: Sequence[str | None]
    scaler: LossScaler

    @cached_property
    def losses(self) -> dict[str, float]:
        """Means over the global batch, with "loss" (their weighted total) and "grad_norm"."""
        return dict(zip(self.names, self._read[:-1], strict=True))

    @cached_property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop."""
        return self._read[-1] > 0

    @cached_property
    def outcome(self) -> Outcome:
        """What to do with the weights; sets the next step's loss scale."""
        return self.scaler.judge(self.losses)

    @cached_property
    def non_finite(self) -> NonFiniteStep | None:
        """If set, the weights were not updated, and `train.on_non_finite` decides."""
        if self.outcome is not Outcome.NON_FINITE:
            return None
        return NonFiniteStep(self.losses, self.micro_batch_losses, self.problems, self.scaler.scale)

    @cached_property
    def _read(self) -> list[float]:
        return self.numbers.read()
