"""Non-finite losses or gradients: write a record for finding the cause, then apply `train.on_non_finite`."""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.errors import RunError
from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json
from trainer.data.batch import Batch
from trainer.models.fsdp import whole
from trainer.run.run import Run

RECORD_FOLDER = "non-finite"


class TrainingDiverged(RunError):
    """A loss or gradient is not finite; the message names the step, the quantity and the samples."""


@dataclass(frozen=True)
class NonFiniteStep:
    """A step with a non-finite loss or gradient, detected on all ranks alike before the weights were updated."""

    global_losses: Mapping[str, float]  # of the whole global batch
    losses: Sequence[Mapping[str, Tensor]]  # of each of this rank's micro-batches
    problems: Sequence[str | None]  # the cause, where the loss knows it, for each of these micro-batches
    loss_scale: float | None = None  # with train.precision fp16

    @property
    def reason(self) -> str:
        """What is not finite, briefly."""
        bad = next(name for name, value in self.global_losses.items() if not math.isfinite(value))
        scale = "" if self.loss_scale is None else f" at a loss scale of {self.loss_scale:g}"
        return next(filter(None, self.problems), f"{bad} is {self.global_losses[bad]}{scale}")


class RollBack(Exception):
    """The run must continue from its last checkpoint."""


class NonFiniteGuard:
    """Applies `train.on_non_finite` after a step with NaN or infinity, in the same way on all ranks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.buffers: list[Tensor] = []  # of the model, as before the last step

    def before_step(self) -> None:
        """Save batch norm's running statistics: the forward pass updates them, which leaving out the step must undo."""
        if self.run.config.train.on_non_finite == "skip" or self.run.reads_late:
            buffers = list(self.run.model.buffers())
            self.buffers = [torch.empty_like(buffer) for buffer in buffers]
            _copy(self.buffers, buffers)

    def undo(self, buffers: list[Tensor]) -> None:
        """Give the model the buffers that it had before a step."""
        _copy(list(self.run.model.buffers()), buffers)

    def leave_out(self, step: NonFiniteStep, micro_batches: Sequence[Batch]) -> None:
        """Write the record; return if the run continues without this step.

        Otherwise raises RollBack, or TrainingDiverged to stop the run.
        """
        run, settings = self.run, self.run.config.train
        policy = settings.on_non_finite
        run.update_guard.forget()
        write_record(run, step, micro_batches)
        keys = [key for batch in micro_batches for key in batch.keys]
        where = f"step {run.step + 1}, rank {run.context.rank}: {step.reason}; samples: {', '.join(keys)}"
        if policy == "stop":
            raise TrainingDiverged(f"{where}. The weights were not updated; for details see "
                                   f"{run.folder / RECORD_FOLDER}. Lower optimizer.lr, set optimizer.clip_grad_norm, "
                                   "inspect these samples, or set train.on_non_finite to skip or rollback")
        run.skipped_steps = sorted({*run.skipped_steps, run.step + 1})
        if len(run.skipped_steps) > settings.non_finite_budget:
            raise TrainingDiverged(f"{where}. Steps {run.skipped_steps} were skipped, but train.non_finite_budget is "
                                   f"{settings.non_finite_budget}")
        if policy == "rollback":
            raise RollBack(where)
        self.undo(self.buffers)


def write_record(run: Run, step: NonFiniteStep, micro_batches: Sequence[Batch]) -> None:
    """Write `<run>/non-finite/step-N-rank-R.json`: samples, losses and gradient norms, for finding the cause."""
    record = {
        "step": run.step + 1, "rank": run.context.rank, "host": socket.gethostname(),
        "policy": run.config.train.on_non_finite, "what": step.reason,
        "global_losses": dict(step.global_losses), "loss_scale": step.loss_scale,
        "micro_batches": [
            {"number": batch.number, "keys": batch.keys, "problem": problem,
             "losses": {name: float(loss) for name, loss in losses.items()}}
            for batch, losses, problem in zip(micro_batches, step.losses, step.problems, strict=True)],
        "gradient_norms": _gradient_norms(run),
    }
    folder = run.folder / RECORD_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"step-{run.step + 1:08d}-rank-{run.context.rank}.json",
                         to_json(record, indent=1, not_finite=str).encode())
    except OSError as error:  # a full disk must not end a run that could continue
        warnings.warn(f"the record of a non-finite step could not be written to {folder}: {error}", stacklevel=2)


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors with few kernels: those of a dtype together."""
    for dtype in {target.dtype for target in targets}:
        torch._foreach_copy_([target for target in targets if target.dtype == dtype],
                             [source for source in sources if source.dtype == dtype])


def _gradient_norms(run: Run) -> dict[str, float]:
    """L2 gradient norm, over all ranks, of each part of the model: modules up to three levels deep."""
    squares: dict[str, Tensor] = {}
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[:3])
            square = whole(parameter.grad.float().square().sum()).cpu()
            squares[part] = squares.get(part, torch.zeros(())) + square
    return {part: float(square.sqrt()) for part, square in squares.items()}
