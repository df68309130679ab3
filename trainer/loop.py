"""The training loop: `train` -> `run_steps` -> `train_step`, which performs one complete optimiser update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from shards.plan import MicroBatchNumbers
from trainer.config import RunConfig
from trainer.data.batch import Batch, normalized_images
from trainer.data.loader import train_loader
from trainer.data.whole_images import WholeImages
from trainer.distributed import DistContext
from trainer.evaluation.evaluation import Evaluation, EvaluationStopped, evaluate
from trainer.loss.matcher import count_masks
from trainer.optimizer import clip_gradients, set_learning_rates
from trainer.precision import autocast
from trainer.run.failures import explain_failures
from trainer.run.late_reading import LateReading
from trainer.run.loss_scaling import Outcome
from trainer.run.non_finite import NonFiniteGuard, RollBack
from trainer.run.reporter import RunReporter, report_on
from trainer.run.run import Run
from trainer.run.start import lock_run, roll_back, start_run
from trainer.run.step_result import HostNumbers, StepResult
from trainer.seeding import deterministic_algorithms, seed_micro_batch
from trainer.stopping import RunStopped, stop_on_signals


def train(config: RunConfig, context: DistContext) -> Run:
    """Train to `train.total_steps`, resuming an existing run, and evaluate; returns the finished run.

    Raises RunStopped after a stop signal or `train.max_hours` (see `trainer.stopping`), and other RunErrors and
    ConfigErrors.
    """
    with deterministic_algorithms(config.train.deterministic), lock_run(config, context) as places:
        run = start_run(config, context, places)
        with report_on(run) as reporter, run.writer:
            with stop_on_signals(run.stop), explain_failures(run):
                while not run.is_finished:
                    try:
                        run_steps(run, reporter)
                    except RollBack as reason:
                        roll_back(run, str(reason))
                        reporter.announce(f"rolled back to step {run.step}: {reason}")
                if run.metrics is None:  # the run was already complete when this command started
                    evaluate_finished_run(run, reporter)
            run.writer.close()
    return run


def run_steps(run: Run, reporter: RunReporter) -> None:
    """Train from the current step until the run is finished. After RollBack, restore a checkpoint and call it again."""
    settings, guard = run.config.train, NonFiniteGuard(run)
    if not run.evaluated:  # a signal interrupted the evaluation at this step
        finish_step(run, reporter)
    numbers = MicroBatchNumbers(first_step=run.step, last_step=settings.total_steps, rank=run.context.rank,
                                world_size=run.context.world_size, accumulation=run.accumulation)
    batches = train_loader(run.crops, numbers, run.context.device)
    late = LateReading(run, guard)
    with tqdm(total=settings.total_steps, initial=run.step, desc="training", unit="step",
              disable=None if run.context.is_main else True) as bar:
        while not run.is_finished:
            micro_batches = late.next_again() or _load(run, reporter, batches)
            run.prefetch.start(micro_batches[0])
            result = None
            if run.step + 1 not in run.skipped_steps:
                guard.before_step()
                result = train_step(run, micro_batches)
                reporter.unmatched_targets(result.unmatched)
            unread = late.take()
            if unread is not None and unread.result.non_finite is not None:
                late.go_back(unread, micro_batches)
                bar.update(-1)
                continue
            if unread is not None:
                reporter.step_done(unread.result.losses)
            is_left = result is not None and late.defers(micro_batches, result, unread)
            if result is not None and not is_left and result.non_finite is not None:
                guard.leave_out(result.non_finite, micro_batches)
                reporter.announce(f"step {run.step + 1} skipped: {result.non_finite.reason}")
            run.step += 1
            bar.update()
            if not is_left:
                finish_step(run, reporter, result)


def _load(run: Run, reporter: RunReporter, batches: Iterator[Batch]) -> list[Batch]:
    """This rank's micro-batches of the next step, from the loader."""
    run.beat("waiting for data")
    with reporter.waiting():
        micro_batches = list(islice(batches, run.accumulation))
    reporter.batches_loaded(micro_batches)
    return micro_batches


def train_step(run: Run, micro_batches: Sequence[Batch]) -> StepResult:
    """One optimiser update from this rank's share of a global batch.

    Mask losses are divided by the number of masks in the whole global batch, so the update does not depend on how the
    batch is split over ranks and micro-batches. Waits for the device once per micro-batch, for matching; and, unless
    the device guards its updates, for the losses. Reading the result waits for the losses.
    """
    config, context = run.config, run.context
    run.beat("counting masks")
    num_masks = _count_masks(micro_batches, config, context)
    run.model.head.set_progress(run.step, config.train.total_steps)
    set_learning_rates(run.optimizer, run.step, config.optimizer, config.train.total_steps)
    run.optimizer.zero_grad(set_to_none=True)
    local: list[dict[str, Tensor]] = []  # losses of each micro-batch of this rank
    problems: list[str | None] = []
    unmatched = 0
    for position, host_batch in enumerate(micro_batches):
        batch = run.on_device(host_batch)
        if position + 1 < len(micro_batches):
            run.prefetch.start(micro_batches[position + 1])
        generator = seed_micro_batch(config.seed, batch.number, context.device)
        with _gradient_sync(run.wrapped, position == len(micro_batches) - 1):
            run.beat("forward pass")
            with autocast(config, context.device):
                outputs = run.wrapped(prepare_images(batch, config))
            loss = run.criterion(outputs, batch.targets(), num_masks, generator)
            del outputs  # masks of all predictions, which the backward pass does not need
            run.beat("backward pass")
            run.scaler.scaled(loss.total / len(micro_batches)).backward()
        local.append({**loss.losses, "loss": loss.total.detach()})
        problems.append(loss.problem)
        unmatched += loss.unmatched
    run.scaler.unscale(run.optimizer)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    grad_norm = clip_gradients(parameters, config.optimizer.clip_grad_norm)
    names, numbers = _mean_over_global_batch(local, grad_norm, run.stop.requested, context)
    result = StepResult(names=names, numbers=HostNumbers(numbers), unmatched=unmatched, micro_batch_losses=local,
                        problems=problems, scaler=run.scaler)
    if run.guards_on_device:
        run.update_guard.see(numbers)
        run.optimizer.step()
    elif result.outcome is Outcome.UPDATE:
        run.optimizer.step()
    if run.averaged is not None and result.outcome is Outcome.UPDATE:
        run.averaged.update()
    return result


def prepare_images(batch: Batch, config: RunConfig) -> Tensor:
    """The model's input: float32 `[B,3,H,W]` on the batch's device (see `normalized_images`)."""
    return normalized_images(batch, config.backbone.image_mean, config.backbone.image_std)


def finish_step(run: Run, reporter: RunReporter, result: StepResult | None = None) -> None:
    """Log the step, then evaluate and save a checkpoint if due. Raises RunStopped if a rank was asked to stop.

    `result` is None for a step that is skipped after a rollback, and to redo an interrupted evaluation.
    """
    settings = run.config.train
    stop_requested = result is not None and result.stop_requested
    if result is not None and result.non_finite is None:
        reporter.step_done(result.losses)
    due = run.step == settings.total_steps or run.step % settings.eval_every == 0
    run.evaluated = not due
    if due and not stop_requested:
        with suppress(EvaluationStopped):
            run.early_stopping.record(run.step, evaluate_run(run, reporter))
            if run.early_end:
                reporter.announce(run.early_end)
    stops = stop_requested or not run.evaluated
    if due or stops or run.step % settings.checkpoint_every == 0:
        run.save_checkpoint()
    if stops:
        run.writer.close()
        reason = run.stop.reason or "a signal to another rank, or its time limit"
        raise RunStopped(f"{reason}: stopped after step {run.step} of {settings.total_steps}; its checkpoint was "
                         "saved, and the same command resumes from it")


def evaluate_run(run: Run, reporter: RunReporter) -> dict[str, Any]:
    """Evaluate the current model on all ranks: averaged and raw weights, if there are both.

    Returns the metrics of those that count (`eval.weights`). Raises EvaluationStopped when a rank was asked to stop.
    """

    def should_continue() -> bool:
        reporter.still_alive()
        return not run.stop.requested

    # Without synchronised batch norm (CPU) each rank has its own running statistics; rank 0's are the ones saved.
    run.context.broadcast(run.model.buffers())
    images, settings, results = WholeImages(run.val_reader, run.config.data), run.config.eval, dict[str, Evaluation]()
    with reporter.paused():
        for kind, in_model in run.weights.items():
            with in_model, run.whole_weights():  # pictures of the first kind, which counts
                results[kind] = evaluate(run.model, images, run.config, run.context, settings.max_images,
                                         should_continue, panels=0 if results else settings.panels)
        metrics = next(iter(results.values())).metrics
        run.metrics, run.evaluated = metrics, True
        reporter.evaluation_done(results)
    return metrics


def evaluate_finished_run(run: Run, reporter: RunReporter) -> None:
    """Evaluate again when the training command is repeated on a complete run."""
    try:
        evaluate_run(run, reporter)
    except EvaluationStopped:
        raise RunStopped("stopped while evaluating a complete run") from None
    if run.best_miou is None:  # total_steps was lowered to the step of a checkpoint that had not been evaluated
        run.save_checkpoint()


def _count_masks(micro_batches: Sequence[Batch], config: RunConfig, context: DistContext) -> Tensor:
    """Mean number of masks per micro-batch over the global batch, at least 1; one all-reduce per step."""
    masks = sum(count_masks(batch.counts, config.decoder_head.num_queries, config.loss.num_masks_counts)
                for batch in micro_batches)
    total = context.all_reduce_sum(torch.full((), float(masks), device=context.device))  # all ranks have as many
    return (total / (len(micro_batches) * context.world_size)).clamp(min=1.0)


def _gradient_sync(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """All-reduce gradients only in the last backward pass of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return nullcontext()


def _mean_over_global_batch(local: list[dict[str, Tensor]], grad_norm: Tensor, stop_requested: bool,
                            context: DistContext) -> tuple[list[str], Tensor]:
    """Names of the losses and "grad_norm", and on the device their means over all ranks; last, without a name, the
    share of ranks that were asked to stop. One all-reduce."""
    logged = {name: torch.stack([losses[name] for losses in local]).mean() for name in local[0]}
    logged["grad_norm"] = grad_norm
    stop = torch.full((), float(stop_requested), device=context.device)
    summed = context.all_reduce_sum(torch.stack([*logged.values(), stop]))
    return list(logged), summed / context.world_size
