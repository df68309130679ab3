"""The training loop: `train` sets the stage, `train_step` is the whole of one optimiser update."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from shards.config_file import config_to_dict, config_to_yaml
from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json
from shards.manifest import load_manifest
from shards.plan import MicroBatchNumbers, accumulation_for
from shards.reader import ShardReader
from trainer.config import RunConfig
from trainer.data.crops import Batch, TrainCrops, augmented_images, normalized_images, open_reader
from trainer.data.loader import train_loader
from trainer.distributed import DistContext
from trainer.evaluation.evaluation import Evaluation, EvaluationStopped, evaluate, format_metrics
from trainer.evaluation.predictor import autocast
from trainer.loss.matcher import count_masks
from trainer.optimizer import clip_gradients, set_learning_rates
from trainer.reporting.plots import batch_panel, draw_curves
from trainer.reporting.report import write_report
from trainer.reporting.run_logger import RunLogger
from trainer.reporting.wandb_run import WandbRun
from trainer.run.checkpoint import load_latest
from trainer.run.checkpoint_writer import CheckpointWriter
from trainer.run.failures import named_failures
from trainer.run.folder import only_run_in, start_noted
from trainer.run.identity import only_run_at
from trainer.run.non_finite import NonFiniteGuard, NonFiniteStepError, RollBack, TrainingDiverged
from trainer.run.progress import Progress
from trainer.run.run import (
    Run,
    build_run,
    check_ranks_agree,
    checkpoint_place,
    open_crops,
    required_folders,
    resume,
    snapshot,
    take_over,
)
from trainer.seeding import seed_micro_batch
from trainer.stopping import RunStopped, stop_on_signals

SKIPPED_NAME = "skipped-samples.jsonl"


def train(config: RunConfig, context: DistContext) -> dict[str, Any]:
    """Train to `train.total_steps` (continuing a run that is there), evaluate, and return the last metrics.

    Raises RunStopped after a signal that asks for it (see `trainer.stopping`), and other RunErrors and ConfigErrors.
    """
    root, folder = required_folders(config)
    if not context.is_main:  # these meet rank 0 where DDP wraps the model, before they look for a checkpoint
        return _train(config, context, root, folder)
    with (only_run_in(folder), start_noted(folder, config.train.total_steps, context.world_size),
          only_run_at(checkpoint_place(config), folder)):
        return _train(config, context, root, folder)


def _train(config: RunConfig, context: DistContext, root: str, folder: Path) -> dict[str, Any]:
    accumulation_for(config.train.global_batch_size, config.train.micro_batch_size, context.world_size)  # or an error
    # -- data ---------------------------------------------------------------------------------------------
    manifest = load_manifest(root)
    crops = open_crops(config, manifest)
    val_reader = open_reader(config.data, config.data.val_split, manifest)
    # -- model --------------------------------------------------------------------------------------------
    run = build_run(config, context, manifest, folder)
    resume(run)
    check_ranks_agree(run)
    # -- loop ---------------------------------------------------------------------------------------------
    logger = _start_logging(run) if context.is_main else None
    writer = CheckpointWriter(checkpoint_place(config), folder, config.train.keep_checkpoints, config.train.keep_every)
    try:
        with (closing(logger) if logger is not None else nullcontext(), Progress(run, logger, writer) as progress,
              writer):
            loop = _Loop(run, crops, val_reader, logger, writer, progress)
            with stop_on_signals(run.stop), named_failures(run):
                while not loop.is_done():
                    try:
                        loop.go_on()
                    except RollBack as reason:
                        loop.roll_back(str(reason))
                metrics = loop.metrics or loop.evaluate_finished_run()
            writer.close()
    finally:
        if context.is_main:
            draw_curves(folder)
            write_report(folder, config, manifest, context)
    return metrics


class _Loop:
    """What `train` does over and over, with what it needs for that."""

    def __init__(self, run: Run, crops: TrainCrops, val_reader: ShardReader, logger: RunLogger | None,
                 writer: CheckpointWriter, progress: Progress) -> None:
        self.run, self.crops, self.val_reader, self.logger, self.writer = run, crops, val_reader, logger, writer
        self.progress = progress
        self.settings = run.config.train
        self.guard = NonFiniteGuard(run)
        self.metrics: dict[str, Any] = {}

    def is_done(self) -> bool:
        return self.run.step == self.settings.total_steps and self.run.evaluated

    def go_on(self) -> None:
        """From the run's step to the end. Raises RollBack to be called again at another step."""
        run = self.run
        if not run.evaluated:  # a signal came in between
            self.finish_step()
        accumulation = accumulation_for(self.settings.global_batch_size, self.settings.micro_batch_size,
                                        run.context.world_size)
        numbers = MicroBatchNumbers(first_step=run.step, last_step=self.settings.total_steps, rank=run.context.rank,
                                    world_size=run.context.world_size, accumulation=accumulation)
        batches = train_loader(self.crops, numbers, run.context.device)
        with tqdm(total=self.settings.total_steps, initial=run.step, desc="training", unit="step",
                  disable=None if run.context.is_main else True) as bar:
            while run.step < self.settings.total_steps:
                run.beat("waiting for data")
                with self.progress.waiting():
                    micro_batches = list(islice(batches, accumulation))
                losses = self.step(micro_batches)
                run.step += 1
                bar.update()
                self.finish_step(losses)

    def step(self, micro_batches: list[Batch]) -> dict[str, float] | None:
        """One step; None when it is left out for numbers that are not finite."""
        run = self.run
        if run.step == 0 and self.logger is not None:
            first = micro_batches[0].to(torch.device("cpu"))
            self.logger.picture(0, "first-batch", batch_panel(augmented_images(first), first, run.manifest))
        self.record_skipped(micro_batches)
        if run.step + 1 in run.skipped_steps:
            return None
        self.guard.before_step()
        before = run.criterion.unmatched
        try:
            losses = train_step(run, micro_batches)
            if before == 0 < run.criterion.unmatched:
                self.say(f"step {run.step + 1}: {run.criterion.unmatched} targets stayed unmatched, of images with "
                         "more classes than decoder_head.num_queries; this is said once")
            return losses
        except NonFiniteStepError as error:
            self.guard.after(error, micro_batches)
            self.say(f"step {run.step + 1} left out: {error}")
            return None

    def finish_step(self, losses: dict[str, float] | None = None) -> None:
        """Log, evaluate and save what is due at the run's step, and stop if a rank was asked to."""
        run, settings = self.run, self.settings
        is_last = run.step == settings.total_steps
        due = is_last or run.step % settings.eval_every == 0
        if losses is not None:
            self.progress.step_done(losses)
        run.evaluated = not due
        if due and not run.stop.agreed:
            with suppress(EvaluationStopped), self.progress.paused():
                self.metrics = self.evaluate()
                run.evaluated = True
        stops = run.stop.agreed or not run.evaluated
        if due or stops or run.step % settings.checkpoint_every == 0:
            self.save()
        if stops:
            self.writer.close()
            raise RunStopped(f"{run.stop.signal_name or 'a signal to another rank'}: stopped after step {run.step} of "
                             f"{settings.total_steps}; its checkpoint is written, and the same command goes on from it")

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the model as it is. Raises EvaluationStopped."""
        run = self.run

        def go_on() -> bool:
            self.progress.still_alive()
            return not run.stop.requested

        # Without synchronised batch norm (CPU) each rank has statistics of its own batches; rank 0's are those saved.
        run.context.broadcast(run.model.buffers())
        result = evaluate(run.model, self.val_reader, run.config, run.context, run.config.eval.max_images,
                          go_on)
        if self.logger is not None:
            _log_evaluation(run, result, self.logger)
        return result.metrics

    def evaluate_finished_run(self) -> dict[str, Any]:
        """For a command given again after the end."""
        try:
            self.metrics = self.evaluate()
        except EvaluationStopped:
            raise RunStopped("stopped while evaluating a run that is complete") from None
        if self.run.best_miou is None:  # its last checkpoint was an ordinary one, of a run that should have been longer
            self.save()
        return self.metrics

    def save(self) -> None:
        """Rank 0 writes, in the background; all ranks know the best mIoU."""
        run = self.run
        miou = self.metrics.get("mIoU") if run.evaluated else None
        is_best = miou is not None and math.isfinite(miou) and (run.best_miou is None or miou > run.best_miou)
        if is_best:
            run.best_miou = miou
        if run.context.is_main:
            self.writer.save(snapshot(run), is_best=is_best)

    def record_skipped(self, micro_batches: list[Batch]) -> None:
        """Damaged samples that data.on_corrupt left out, of every rank in one file. Shard and number name them: a key
        is inside of what is damaged."""
        step, rank = self.run.step + 1, self.run.context.rank
        problems = [problem for batch in micro_batches for problem in batch.skipped]
        if self.logger is not None:
            for problem in problems:
                self.logger.event(step, f"left out a damaged sample: {problem}")
        if problems:
            lines = [to_json({"step": step, "rank": rank, "sample": problem}) for problem in problems]
            try:
                with (self.run.folder / SKIPPED_NAME).open("a", encoding="utf-8") as file:
                    file.write("\n".join([*lines, ""]))
            except OSError as error:
                warnings.warn(f"{SKIPPED_NAME} could not be written: {error}. Training goes on", stacklevel=2)

    def roll_back(self, reason: str) -> None:
        """Become what the last checkpoint says, but for the steps that are left out."""
        run, left_out = self.run, self.run.skipped_steps
        if run.context.is_main:
            self.writer.wait()
        run.context.barrier()
        checkpoint = load_latest(checkpoint_place(run.config))
        if checkpoint is None:
            raise TrainingDiverged(f"{reason}. There is no checkpoint yet to roll back to; lower "
                                   f"train.checkpoint_every (now {self.settings.checkpoint_every})")
        take_over(run, checkpoint)
        check_ranks_agree(run)
        run.skipped_steps = sorted({*run.skipped_steps, *left_out})
        self.metrics = {}  # of weights that are gone
        self.say(f"rolled back to step {run.step}: {reason}")

    def say(self, what: str) -> None:
        """Tell people of something that does not happen every day."""
        if self.logger is not None:
            tqdm.write(what)
            self.logger.event(self.run.step, what)


def train_step(run: Run, micro_batches: list[Batch]) -> dict[str, float]:
    """One optimiser update on this rank's share of a global batch.

    Returns the losses averaged over the whole global batch, their weighted total as "loss". Mask losses are
    divided by the number of masks in the whole global batch, so the update does not depend on how ranks and
    accumulation share it. Raises NonFiniteStepError on all ranks alike before the weights would be touched. Sets
    `run.stop.agreed` when any rank was asked to stop.
    """
    config, context = run.config, run.context
    run.beat("counting masks")
    num_masks = _count_masks(micro_batches, config, context)
    run.model.head.set_progress(run.step, config.train.total_steps)
    set_learning_rates(run.optimizer, run.step, config.optimizer, config.train.total_steps)
    run.optimizer.zero_grad(set_to_none=True)
    local: list[dict[str, Tensor]] = []  # of each micro-batch of this rank
    problems: list[str | None] = []
    for position, host_batch in enumerate(micro_batches):
        batch = host_batch.to(context.device)
        generator = seed_micro_batch(config.seed, batch.number, context.device)
        with _gradient_sync(run.wrapped, position == len(micro_batches) - 1):
            run.beat("forward pass")
            with autocast(config, context.device):
                outputs = run.wrapped(prepare_images(batch, config))
            total, losses, problem = run.criterion(outputs, batch.targets(), num_masks, generator)
            run.beat("backward pass")
            (total / len(micro_batches)).backward()
        local.append({**losses, "loss": total.detach()})
        problems.append(problem)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    grad_norm = clip_gradients(parameters, config.optimizer.clip_grad_norm)
    values = _over_ranks(run, local, grad_norm)
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteStepError(values, local, problems)
    run.optimizer.step()
    return values


def prepare_images(batch: Batch, config: RunConfig) -> Tensor:
    """What the model sees: float32 `[B,3,H,W]` on the batch's device (see `normalized_images`)."""
    return normalized_images(batch, config.backbone.image_mean, config.backbone.image_std)


def _count_masks(micro_batches: list[Batch], config: RunConfig, context: DistContext) -> Tensor:
    """Masks per micro-batch, averaged over the global batch, at least 1; one all-reduce per step."""
    masks = sum(count_masks(batch.counts, config.decoder_head.num_queries, config.loss.num_masks_counts)
                for batch in micro_batches)
    mine = torch.tensor([masks, len(micro_batches)], dtype=torch.float32)
    total = context.all_reduce_sum(mine.to(context.device, non_blocking=True))
    return (total[0] / total[1]).clamp(min=1.0)


def _gradient_sync(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """All-reduce gradients only in the last backward pass of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return nullcontext()


def _over_ranks(run: Run, local: list[dict[str, Tensor]], grad_norm: Tensor) -> dict[str, float]:
    """Means over the global batch, the same on all ranks; whether a rank was asked to stop comes along."""
    logged = {name: torch.stack([losses[name] for losses in local]).mean() for name in local[0]}
    logged["grad_norm"] = grad_norm
    logged["stop"] = torch.full((), float(run.stop.requested), device=run.context.device)
    summed = run.context.all_reduce_sum(torch.stack(list(logged.values())))
    values = dict(zip(logged, (summed / run.context.world_size).tolist(), strict=True))  # the step's one wait
    run.stop.agreed = values.pop("stop") > 0
    return values


def _start_logging(run: Run) -> RunLogger:
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
    if run.changes:
        print(f"settings changed since: {'; '.join(run.changes)}", flush=True)
    if run.step:
        logger.event(run.step, "; ".join([f"continued with {run.context.world_size} rank(s)", *run.changes]))
    return logger


def _log_evaluation(run: Run, result: Evaluation, logger: RunLogger) -> None:
    logger.evaluation(run.step, result.metrics)
    if result.panels is not None:
        logger.picture(run.step, "val-panels", result.panels)
    tqdm.write(f"step {run.step}: val {format_metrics(result.metrics, run.manifest.classes).splitlines()[0]}")
    write_report(run.folder, run.config, run.manifest, run.context)
