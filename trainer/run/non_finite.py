"""What becomes of a run when a loss or gradient is NaN or infinite: a record for people, then `train.on_non_finite`."""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shards.errors import RunError
from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json
from trainer.data.crops import Batch
from trainer.run.run import Run

RECORD_FOLDER = "non-finite"


class TrainingDiverged(RunError):
    """A loss or gradient is not finite; the message names step, what is not, and samples."""


class NonFiniteStepError(Exception):
    """Losses or gradients of a step are not finite, seen by all ranks alike, before the weights were touched."""

    def __init__(self, values: Mapping[str, float], local: Sequence[Mapping[str, Tensor]],
                 problems: Sequence[str | None]) -> None:
        """`values` are those of the whole global batch, `local` those of each of this rank's micro-batches."""
        bad = next(name for name, value in values.items() if not math.isfinite(value))
        super().__init__(next(filter(None, problems), f"{bad} is {values[bad]}"))
        self.values, self.local, self.problems = values, local, problems


class RollBack(Exception):
    """The run is to go on from its last checkpoint."""


class NonFiniteGuard:
    """Decides, on all ranks alike, how a run goes on after a NonFiniteStepError."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._buffers: list[Tensor] = []

    def before_step(self) -> None:
        """A forward pass moves batch norm's statistics, which a skipped step must not have done."""
        if self.run.config.train.on_non_finite == "skip":
            self._buffers = [buffer.clone() for buffer in self.run.model.buffers()]

    def after(self, error: NonFiniteStepError, micro_batches: Sequence[Batch]) -> None:
        """Write the record; return when the step is to be left out. Raises RollBack; TrainingDiverged to stop."""
        run, settings = self.run, self.run.config.train
        policy = settings.on_non_finite
        self._write_record(error, micro_batches)
        keys = [key for batch in micro_batches for key in batch.keys]
        where = f"step {run.step + 1}, rank {run.context.rank}: {error}; samples: {', '.join(keys)}"
        if policy == "stop":
            raise TrainingDiverged(f"{where}. The weights were not updated; {run.folder / RECORD_FOLDER} says more. "
                                   "Lower optimizer.lr, set optimizer.clip_grad_norm, look at these samples, or set "
                                   "train.on_non_finite to skip or rollback")
        run.skipped_steps = sorted({*run.skipped_steps, run.step + 1})
        if len(run.skipped_steps) > settings.non_finite_budget:
            raise TrainingDiverged(f"{where}. Steps {run.skipped_steps} were left out, and train.non_finite_budget is "
                                   f"{settings.non_finite_budget}")
        if policy == "rollback":
            raise RollBack(where)
        with torch.no_grad():
            for buffer, before in zip(run.model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)

    def _write_record(self, error: NonFiniteStepError, micro_batches: Sequence[Batch]) -> None:
        run = self.run
        record = {
            "step": run.step + 1, "rank": run.context.rank, "host": socket.gethostname(),
            "policy": run.config.train.on_non_finite, "what": str(error),
            "global_losses": dict(error.values),
            "micro_batches": [
                {"number": batch.number, "keys": batch.keys, "problem": problem,
                 "losses": {name: float(loss) for name, loss in losses.items()}}
                for batch, losses, problem in zip(micro_batches, error.local, error.problems, strict=True)],
            "gradient_norms": _gradient_norms(run),
        }  # fmt: skip
        folder = run.folder / RECORD_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"step-{run.step + 1:08d}-rank-{run.context.rank}.json",
                             to_json(record, indent=1, not_finite=str).encode())
        except OSError as problem:  # a full disk is no reason to end a run that is to go on
            warnings.warn(f"what was not finite could not be written to {folder}: {problem}", stacklevel=2)


def _gradient_norms(run: Run) -> dict[str, float]:
    """L2 norm of the gradient of each part, three levels of modules deep, over all ranks."""
    squares: dict[str, Tensor] = {}
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[:3])
            squares[part] = squares.get(part, torch.zeros(())) + parameter.grad.float().square().sum().cpu()
    return {part: float(square.sqrt()) for part, square in squares.items()}
