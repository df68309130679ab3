"""The training loop: `train` sets the stage, `train_step` is the whole of one optimiser update."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from shards.atomic import write_atomically
from shards.config_file import config_to_dict, config_to_yaml
from shards.errors import MaskStreamError
from shards.manifest import load_manifest
from shards.plan import MicroBatchNumbers, accumulation_for
from shards.reader import ShardReader
from trainer.checkpoint import Checkpoint, class_table, versions
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import RunConfig
from trainer.data import Batch, augmented_images, open_reader
from trainer.distributed import DistContext
from trainer.evaluation import autocast, evaluate, format_metrics
from trainer.loader import train_loader
from trainer.matcher import NonFiniteLossError
from trainer.optimizer import clip_gradients, set_learning_rates
from trainer.plots import batch_panel, draw_curves
from trainer.progress import Progress
from trainer.report import write_report
from trainer.run import Run, build_run, check_ranks_agree, checkpoint_place, open_crops, required_folders, resume
from trainer.run_logger import RunLogger
from trainer.seeding import seed_micro_batch
from trainer.transforms import normalize
from trainer.wandb_run import WandbRun


class TrainingDiverged(MaskStreamError):
    """A loss or gradient is not finite; the message names step, loss and samples."""


def train(config: RunConfig, context: DistContext) -> dict[str, Any]:
    """Train to `train.total_steps` (continuing a run that is there), evaluate, and return the last metrics."""
    # -- data ---------------------------------------------------------------------------------------------
    root, folder = required_folders(config)
    manifest = load_manifest(root)
    crops = open_crops(config, manifest)
    val_reader = open_reader(config.data, config.data.val_split, manifest)
    accumulation = accumulation_for(config.train.global_batch_size, config.train.micro_batch_size, context.world_size)
    # -- model --------------------------------------------------------------------------------------------
    run = build_run(config, context, manifest, folder)
    resume(run)
    check_ranks_agree(run)
    logger = _start_logging(run) if context.is_main else None
    # -- loop ---------------------------------------------------------------------------------------------
    numbers = MicroBatchNumbers(first_step=run.step, last_step=config.train.total_steps, rank=context.rank,
                                world_size=context.world_size, accumulation=accumulation)
    batches = train_loader(crops, numbers, context.device)
    writer = CheckpointWriter(checkpoint_place(config), folder, config.train.keep_checkpoints, config.train.keep_every)
    metrics: dict[str, Any] = {}
    progress = Progress(run, logger, writer)
    with tqdm(total=config.train.total_steps, initial=run.step, desc="training", unit="step",
              disable=None if context.is_main else True) as bar:
        while run.step < config.train.total_steps:
            with progress.waiting():
                micro_batches = list(islice(batches, accumulation))
            if run.step == 0 and logger is not None:
                first = micro_batches[0]
                logger.picture(0, "first-batch", batch_panel(augmented_images(first), first, manifest))
            losses = train_step(run, micro_batches)
            run.step += 1
            bar.update()
            progress.step_done(losses)
            is_last = run.step == config.train.total_steps
            if is_last or run.step % config.train.eval_every == 0:
                with progress.paused():
                    metrics = _evaluate(run, val_reader, logger)
            if is_last or run.step % config.train.checkpoint_every == 0 or run.step % config.train.eval_every == 0:
                _save(run, metrics, writer)
    writer.close()
    if not metrics:  # the run was complete already
        metrics = _evaluate(run, val_reader, logger)
    progress.write_state("finished")
    if logger is not None:
        logger.close()
        draw_curves(folder)
        write_report(folder, config, manifest, context)
    return metrics


def train_step(run: Run, micro_batches: list[Batch]) -> dict[str, float]:
    """One optimiser update on this rank's share of a global batch.

    Returns the losses averaged over the whole global batch, their weighted total as "loss". Mask losses are
    divided by the number of masks in the whole global batch, so the update does not depend on how ranks and
    accumulation share it. Raises TrainingDiverged before the weights would be touched.
    """
    config, context = run.config, run.context
    num_masks = _count_masks(micro_batches, context)
    run.model.head.set_progress(run.step / config.train.total_steps)
    set_learning_rates(run.optimizer, run.step, config.optimizer, config.train.total_steps)
    run.optimizer.zero_grad(set_to_none=True)
    logged: dict[str, Tensor] = {}
    for position, host_batch in enumerate(micro_batches):
        batch = host_batch.to(context.device)
        generator = seed_micro_batch(config.seed, batch.number, context.device)
        with _gradient_sync(run.wrapped, position == len(micro_batches) - 1):
            with autocast(config, context.device):
                outputs = run.wrapped(prepare_images(batch, config))
            try:
                total, losses = run.criterion(outputs, batch.targets(), num_masks, generator)
            except NonFiniteLossError as error:
                raise _diverged(run, batch, str(error)) from error
            (total / len(micro_batches)).backward()
        for name, value in {**losses, "loss": total}.items():
            logged[name] = logged.get(name, 0) + value.detach() / len(micro_batches)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    logged["grad_norm"] = clip_gradients(parameters, config.optimizer.clip_grad_norm)
    summed = context.all_reduce_sum(torch.stack(list(logged.values())))  # so that all ranks see, and stop, alike
    values = dict(zip(logged, (summed / context.world_size).tolist(), strict=True))  # the step's one wait
    for name, value in values.items():
        if value != value or abs(value) == float("inf"):
            raise _diverged(run, micro_batches[-1], f"{name} is {value}", micro_batches)
    run.optimizer.step()
    return values


def prepare_images(batch: Batch, config: RunConfig) -> Tensor:
    """Float32 normalised `[B,3,H,W]` on the batch's device, colour-augmented if the batch carries parameters."""
    return normalize(augmented_images(batch), config.backbone.image_mean, config.backbone.image_std)


def _count_masks(micro_batches: list[Batch], context: DistContext) -> Tensor:
    """Masks per micro-batch, averaged over the global batch, at least 1; one all-reduce per step."""
    mine = torch.tensor([sum(sum(batch.counts) for batch in micro_batches), len(micro_batches)], dtype=torch.float32)
    total = context.all_reduce_sum(mine.to(context.device, non_blocking=True))
    return (total[0] / total[1]).clamp(min=1.0)


def _gradient_sync(wrapped: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """All-reduce gradients only in the last backward pass of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def _diverged(run: Run, batch: Batch, what: str, batches: list[Batch] | None = None) -> TrainingDiverged:
    keys = [key for item in batches or [batch] for key in item.keys]
    return TrainingDiverged(
        f"step {run.step + 1}, rank {run.context.rank}: {what}; samples: {', '.join(keys)}. The weights were not "
        "updated. Lower optimizer.lr, set optimizer.clip_grad_norm, or look at these samples"
    )


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
    if run.step:
        logger.event(run.step, f"continued with {run.context.world_size} rank(s)")
    return logger


def _evaluate(run: Run, reader: ShardReader, logger: RunLogger | None) -> dict[str, Any]:
    # Without synchronised batch norm (CPU) each rank has statistics of its own batches; rank 0's are the ones saved.
    run.context.broadcast(run.model.buffers())
    result = evaluate(run.model, reader, run.config, run.context, run.config.eval.max_images)
    if logger is not None:
        logger.evaluation(run.step, result.metrics)
        if result.panels is not None:
            logger.picture(run.step, "val-panels", result.panels)
        tqdm.write(f"step {run.step}: val {format_metrics(result.metrics, run.manifest.classes).splitlines()[0]}")
        write_report(run.folder, run.config, run.manifest, run.context)
    return result.metrics


def _save(run: Run, metrics: dict[str, Any], writer: CheckpointWriter) -> None:
    """Rank 0 writes, in the background; all ranks know the best mIoU."""
    miou = metrics.get("mIoU")
    is_best = miou is not None and (run.best_miou is None or miou > run.best_miou)
    if is_best:
        run.best_miou = miou
    if run.context.is_main:
        writer.save(Checkpoint(
            step=run.step, model=run.model.trainable_state_dict(), optimizer=run.optimizer.state_dict(),
            config=config_to_dict(run.config), classes=class_table(run.manifest),
            ignore_index=run.manifest.ignore_index, data_hash=run.manifest.sha256,
            backbone_sha256=run.backbone_sha256, best_miou=run.best_miou, versions=versions(),
        ), is_best=is_best)  # fmt: skip
