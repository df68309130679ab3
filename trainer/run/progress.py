"""How a run goes on: the numbers of an interval of steps, one line of them, and state.json."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from trainer.reporting.run_logger import RunLogger
from trainer.reporting.state import RunState, format_duration, write_state
from trainer.run.checkpoint import checkpoint_name
from trainer.run.checkpoint_writer import CheckpointWriter
from trainer.run.run import Run
from trainer.stopping import RunStopped

_REFRESH_SECONDS = 30.0


class Progress:
    """Counts steps and times them; on rank 0, which has a `logger`, it also logs them and writes the run's state."""

    def __init__(self, run: Run, logger: RunLogger | None, writer: CheckpointWriter,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.run, self.logger, self.writer, self._clock = run, logger, writer, clock
        self._started = time.time()
        self._first_step, self._first_clock = run.step, clock()
        self._begin_interval()
        writer.on_wait = self._still_writing
        self.write_state("running")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """The last word in state.json."""
        if error is None:
            self.write_state("finished")
        elif isinstance(error, RunStopped | KeyboardInterrupt):
            self.write_state("stopped", str(error) or "interrupted without a checkpoint")
        else:
            self.write_state("failed", f"{type(error).__name__}: {error}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside counts as waiting for data."""
        entered = self._clock()
        yield
        self._data_seconds += self._clock() - entered

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside, an evaluation, is no part of the steps' speed."""
        entered = self._clock()
        yield
        self._interval_start += self._clock() - entered

    def still_alive(self) -> None:
        """To be called often while an evaluation or a checkpoint takes its time: refreshes state.json now and then."""
        if self._clock() - self._written >= _REFRESH_SECONDS:
            self.write_state("running")

    def _still_writing(self) -> None:
        """Slow storage is no hang."""
        self.run.beat("checkpoint")
        self.still_alive()

    def step_done(self, losses: dict[str, float]) -> None:
        """To be called after each step; logs every `train.log_every` steps and at the end."""
        self._steps += 1
        settings = self.run.config.train
        if self.logger is None or (self.run.step % settings.log_every and self.run.step != settings.total_steps):
            return
        values, state = {**losses, **self._speed()}, self._state("running", "")
        self.logger.scalars(self.run.step, "train", values)
        write_state(self.run.folder, state)
        tqdm.write(interval_line(state, values))
        self._begin_interval()

    def write_state(self, status: str, message: str = "") -> None:
        """Say in state.json how the run stands; see `RunState.status`. Does nothing on other ranks."""
        self._written = self._clock()
        if self.logger is not None:
            write_state(self.run.folder, self._state(status, message))

    def _state(self, status: str, message: str) -> RunState:
        run, steps = self.run, self.run.step - self._first_step
        resumed = checkpoint_name(self._first_step) if self._first_step else None
        return RunState(
            status=status, step=run.step, total_steps=run.config.train.total_steps, world_size=run.context.world_size,
            host=socket.gethostname(), pid=os.getpid(), started=self._started, updated=time.time(),
            seconds_per_step=(self._clock() - self._first_clock) / steps if steps else None,
            best_miou=run.best_miou, checkpoint=self.writer.newest or resumed, message=message,
        )  # fmt: skip

    def _begin_interval(self) -> None:
        self._interval_start, self._data_seconds, self._steps = self._clock(), 0.0, 0

    def _speed(self) -> dict[str, float]:
        seconds = self._clock() - self._interval_start
        return {
            "lr": self.run.optimizer.param_groups[0]["lr"],
            "images_per_second": self._steps * self.run.config.train.global_batch_size / seconds,
            "data_wait_share": self._data_seconds / seconds,
            "seconds_per_step": seconds / self._steps,
            "memory_gb": memory_gb(self.run.context.device),
        }


def interval_line(state: RunState, values: dict[str, float]) -> str:
    """The one line that a log interval prints."""
    return (f"step {state.step}/{state.total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad {values['grad_norm']:.2f}  {values['images_per_second']:.1f} images/s  "
            f"waiting for data {values['data_wait_share']:.0%}  {values['seconds_per_step']:.3g} s/step  "
            f"{values['memory_gb']:.1f} GB  ETA {format_duration(state.seconds_left or 0)}")


def memory_gb(device: torch.device) -> float:
    """CUDA: the most that tensors took since the last call. CPU: what this process holds now (0 without /proc)."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 1e9
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return 0.0
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kilobytes) * 1024 / 1e9
