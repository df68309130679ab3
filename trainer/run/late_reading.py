"""Read a step's losses while the next step is computed, so that the host never waits for the last kernels of a step.

Until then the host does not know whether the step was finite. It need not: `trainer.run.update_guard` keeps a bad step,
and what follows it, away from the weights. Once the host reads of one, everything is as before the bad step but for
batch norm's statistics, which it restores; and the step is computed again, the same to the last bit, as weights, data
and random numbers are. This time the host waits, and does what it does about any bad step: so records, messages,
policies and budgets are the same, whenever the numbers are read.

Steps whose numbers are needed at once (to log them, or because an evaluation or a checkpoint follows) are read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from trainer.data.batch import Batch
from trainer.run.non_finite import NonFiniteGuard
from trainer.run.run import Run
from trainer.run.step_result import StepResult


class UnreadStep(NamedTuple):
    """A step that was computed, whose numbers the host has not read."""

    micro_batches: Sequence[Batch]
    result: StepResult
    buffers: list[Tensor]  # of the model, before the step


class LateReading:
    """Which steps are read late, and the way back to one that was not finite.

    All decisions depend on the step, the settings and numbers that are equal on all ranks.
    """

    def __init__(self, run: Run, guard: NonFiniteGuard) -> None:
        self._run, self._guard = run, guard
        self._unread: UnreadStep | None = None
        self._again: deque[Sequence[Batch]] = deque()  # micro-batches of steps to be computed again
        self._waits_until = 0  # up to this step, numbers are read at once

    def next_again(self) -> Sequence[Batch] | None:
        """This rank's micro-batches of the next step, if it is computed again."""
        return self._again.popleft() if self._again else None

    def take(self) -> UnreadStep | None:
        """The step before, if it is unread. Call it when the step after it is on its way: then reading waits for
        nothing that the device would not have finished anyway."""
        unread, self._unread = self._unread, None
        return unread

    def defers(self, micro_batches: Sequence[Batch], result: StepResult, before: UnreadStep | None) -> bool:
        """Leave the next step unread, unless its numbers are needed at once, as after a request to stop in the step
        before; returns whether it is left."""
        step, settings = self._run.step + 1, self._run.config.train
        every = (settings.log_every, settings.checkpoint_every, settings.eval_every)
        is_due = step == settings.total_steps or any(step % interval == 0 for interval in every)
        stops = before is not None and before.result.stop_requested
        if is_due or stops or step <= self._waits_until or not self._run.reads_late:
            return False
        self._unread = UnreadStep(micro_batches, result, self._guard.buffers)
        return True

    def go_back(self, unread: UnreadStep, micro_batches: Sequence[Batch]) -> None:
        """To the start of a step that was not finite; `micro_batches` are those of the step after it."""
        self._run.update_guard.forget()
        self._guard.undo(unread.buffers)
        self._again.extend([unread.micro_batches, micro_batches])
        self._waits_until = self._run.step
        self._run.step -= 1
