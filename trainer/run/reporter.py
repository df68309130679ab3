"""Progress reporting: log lines, state.json, events and evaluations; curves and the report at the end of the run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm

from shards.cli.config_file import config_to_dict, config_to_yaml
from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json
from shards.shown_text import shown
from trainer.data.batch import Batch, augmented_images
from trainer.data.sources import source_lines
from trainer.evaluation.evaluation import Evaluation, format_metrics
from trainer.loss.class_weights import described
from trainer.reporting.plots import batch_panel, draw_curves
from trainer.reporting.report import write_report
from trainer.reporting.run_logger import RunLogger, append_skipped_samples
from trainer.reporting.state import RunState, format_duration, write_state
from trainer.reporting.wandb_run import WandbRun
from trainer.run.checkpoint import checkpoint_name
from trainer.run.run import Run
from trainer.stopping import RunStopped

CLASS_WEIGHTS_NAME = "class-weights.json"
_REFRESH_SECONDS = 30.0


@contextmanager
def report_on(run: Run) -> Iterator[RunReporter]:
    """A reporter for a run. On exit, even after an error, rank 0 writes curves.png and report.html."""
    logger = start_logging(run) if run.context.is_main else None
    try:
        with closing(logger) if logger is not None else nullcontext(), RunReporter(run, logger) as reporter:
            yield reporter
    finally:
        if run.context.is_main:
            draw_curves(run.folder)
            write_report(run.folder, run.config, run.manifest, run.context)


class RunReporter:
    """Counts and times steps; on rank 0, which has a `logger`, also logs them and writes state.json."""

    def __init__(self, run: Run, logger: RunLogger | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.run, self.logger, self._clock = run, logger, clock
        self._started = time.time()
        self._first_step, self._first_clock = run.step, clock()
        self._warned_unmatched = False
        self._begin_interval()
        run.writer.on_wait = self._still_writing
        self.write_state("running")

    def __enter__(self) -> RunReporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Write the final status to state.json."""
        if error is None:
            self.write_state("finished", self.run.early_end)
        elif isinstance(error, RunStopped | KeyboardInterrupt):
            self.write_state("stopped", str(error) or "interrupted without a checkpoint")
        else:
            self.write_state("failed", f"{type(error).__name__}: {error}")

    # -- timing -------------------------------------------------------------------------------------------

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        entered = self._clock()
        yield
        self._data_seconds += self._clock() - entered

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside, such as an evaluation, from the speed of steps."""
        entered = self._clock()
        yield
        self._interval_start += self._clock() - entered

    def still_alive(self) -> None:
        """Refresh state.json if it is old. Call it often during an evaluation or while a checkpoint is written."""
        if self._clock() - self._written >= _REFRESH_SECONDS:
            self.write_state("running")

    def _still_writing(self) -> None:
        """Tell watchdog and state.json that the run is alive: slow storage is not a hang."""
        self.run.beat("checkpoint")
        self.still_alive()

    # -- what happened ------------------------------------------------------------------------------------

    def batches_loaded(self, micro_batches: Sequence[Batch]) -> None:
        """Save a picture of the run's first batch, and record corrupt samples that data.on_corrupt skipped."""
        step, run = self.run.step, self.run
        if step == 0 and self.logger is not None:
            first = run.on_device(micro_batches[0]).map_tensors(Tensor.cpu)
            self.logger.picture(0, "first-batch", batch_panel(augmented_images(first), first, run.manifest))
        skipped = [problem for batch in micro_batches for problem in batch.skipped]
        append_skipped_samples(run.folder, step + 1, run.context.rank, skipped)
        if self.logger is not None:
            for problem in skipped:
                self.logger.event(step + 1, f"skipped a corrupt sample: {problem}")

    def unmatched_targets(self, count: int) -> None:
        """Warn once if images have more targets than queries; `count` targets stayed unmatched in this step."""
        if count and not self._warned_unmatched:
            self.announce(f"step {self.run.step + 1}: {count} targets stayed unmatched, in images with more classes "
                          "than decoder_head.num_queries; this is reported only once")
            self._warned_unmatched = True

    def step_done(self, losses: dict[str, float]) -> None:
        """Call after each step; logs every `train.log_every` steps and at the last one."""
        self._steps += 1
        settings = self.run.config.train
        if self.logger is None or (self.run.step % settings.log_every and self.run.step != settings.total_steps):
            return
        values, state = {**losses, **self._speed()}, self._state("running", "")
        self.logger.scalars(self.run.step, "train", values)
        write_state(self.run.folder, state)
        tqdm.write(interval_line(state, values))
        self._begin_interval()

    def evaluation_done(self, results: Mapping[str, Evaluation]) -> None:
        """Log metrics and panels of each kind of weights, those that count first, and update the report."""
        run = self.run
        if self.logger is None:
            return
        self.logger.evaluation(run.step, {kind: result.metrics for kind, result in results.items()})
        for kind, result in results.items():
            if result.panels is not None:
                self.logger.picture(run.step, "val-panels", result.panels)
            of = f" of the {kind} weights" if len(results) > 1 else ""
            means = format_metrics(result.metrics, run.manifest.classes).splitlines()[0]
            tqdm.write(f"step {run.step}: val{of} {means}")
        write_report(run.folder, run.config, run.manifest, run.context)

    def announce(self, what: str) -> None:
        """Print an unusual event and record it in the log."""
        if self.logger is not None:
            tqdm.write(what)
            self.logger.event(self.run.step, what)

    # -- state.json ---------------------------------------------------------------------------------------

    def write_state(self, status: str, message: str = "") -> None:
        """Write state.json on rank 0; see `RunState.status`. A no-op on other ranks."""
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
            best_miou=run.best_miou, checkpoint=run.writer.newest or resumed, message=message,
        )

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
            **self.run.scaler.logged(),
        }


def start_logging(run: Run) -> RunLogger:
    """Save the resolved configuration, print a summary of the run, and open its log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / "config.yaml", config_to_yaml(run.config).encode())
    trainable = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in run.model.parameters()) - trainable
    start = f"continuing at step {run.step}" if run.step else "new run"
    print(f"{run.folder}: {start}; {trainable / 1e6:.2f} M trainable and {frozen / 1e6:.2f} M frozen parameters; "
          f"{run.context.world_size} rank(s) on {run.context.device.type}", flush=True)
    project = run.config.train.wandb_project
    wandb = None if project is None else WandbRun(run.folder, project, config_to_dict(run.config))
    logger = RunLogger(run.folder, run.step, wandb)
    _log_sources(run, logger)
    _log_class_weights(run, logger)
    if run.changes:
        print(f"settings changed since: {'; '.join(run.changes)}", flush=True)
    if run.step:
        logger.event(run.step, "; ".join([f"continued with {run.context.world_size} rank(s)", *run.changes]))
    return logger


def _log_sources(run: Run, logger: RunLogger) -> None:
    settings = run.config.train
    samples = settings.total_steps * settings.global_batch_size
    for line in source_lines(run.crops.sources, run.config.data, samples, run.manifest):
        print(line, flush=True)
        if not run.step:
            logger.event(run.step, line)


def _log_class_weights(run: Run, logger: RunLogger) -> None:
    """Say the range of the classes' weights in the loss, and save all of them: class name -> weight."""
    path, weights = run.folder / CLASS_WEIGHTS_NAME, run.class_weights
    if weights is None:
        path.unlink(missing_ok=True)  # the setting was removed before the run was resumed
        return
    names = [info.name for info in run.manifest.classes]
    write_atomically(path, (to_json(dict(zip(names, weights, strict=True)), indent=1) + "\n").encode())
    what = f"class weights from {described(weights, run.manifest)}, all in {CLASS_WEIGHTS_NAME}"
    print(shown(what), flush=True)
    if not run.step:
        logger.event(run.step, what)


def interval_line(state: RunState, values: dict[str, float]) -> str:
    """The line printed for each log interval."""
    return (f"step {state.step}/{state.total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad {values['grad_norm']:.2f}  {values['images_per_second']:.1f} images/s  "
            f"waiting for data {values['data_wait_share']:.0%}  {values['seconds_per_step']:.3g} s/step  "
            f"{values['memory_gb']:.1f} GB  ETA {format_duration(state.seconds_left or 0)}")


def memory_gb(device: torch.device) -> float:
    """CUDA: peak memory allocated since the last call. CPU: this process's resident memory now (0 without /proc)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return 0.0
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kilobytes) * 1024 / 1e9
