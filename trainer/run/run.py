"""`Run`: all parts of one training run in one object, with its state as a checkpoint."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shards.cli.config_file import config_to_dict
from shards.errors import ConfigError
from shards.manifest import Manifest, class_table
from shards.plan import accumulation_for
from shards.reader import ShardReader
from trainer.build import build_criterion, build_model, check_crop_size, resolve_class_weights
from trainer.config import RunConfig
from trainer.data.batch import Batch
from trainer.data.crops import TrainCrops, open_reader
from trainer.data.prefetch import Prefetch
from trainer.data.sources import class_counts, train_sources
from trainer.data.user_transform import Transform, load_transform, transformed
from trainer.distributed import DistContext
from trainer.loss.criterion import Criterion
from trainer.models import Segmenter
from trainer.models.deform_attn import sample_by_gathers, sample_by_triton
from trainer.models.fsdp import ShardedModel
from trainer.optimizer import build_optimizer, load_optimizer
from trainer.reporting.versions import versions
from trainer.run.averaging import AveragedWeights
from trainer.run.checkpoint import Checkpoint
from trainer.run.checkpoint_writer import CheckpointWriter
from trainer.run.early_stopping import EarlyStopping
from trainer.run.identity import run_id
from trainer.run.loss_scaling import LossScaler
from trainer.run.update_guard import UpdateGuard
from trainer.seeding import transform_generator
from trainer.stopping import StopRequest


class RunPlaces(NamedTuple):
    """Where a run reads and writes."""

    root: str  # the shard set: folder or URL
    folder: Path  # output_dir
    checkpoints: str  # folder or URL


def run_places(config: RunConfig) -> RunPlaces:
    """The configured locations. Raises ConfigError with an example command if data.root or output_dir is not set."""
    missing = [name for name, value in (("data.root", config.data.root), ("output_dir", config.output_dir))
               if value is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not set. Try for example: torchrun --standalone --nproc-per-node 2 "
            "trainer/train.py data.root=<folder of shards> output_dir=<folder for the run>"
        )
    assert config.data.root is not None and config.output_dir is not None
    folder = Path(config.output_dir)
    return RunPlaces(config.data.root, folder, config.train.checkpoint_dir or str(folder / "checkpoints"))


@dataclass(kw_only=True)
class Run:
    """The parts of a run and its state; `step` counts completed optimiser updates."""

    config: RunConfig
    context: DistContext
    places: RunPlaces
    manifest: Manifest
    crops: TrainCrops
    val_reader: ShardReader
    accumulation: int  # micro-batches of this rank in each step
    model: Segmenter
    wrapped: nn.Module  # the model; with a process group wrapped in DDP, or with train.fsdp sharded itself
    criterion: Criterion
    source_hashes: list[str]  # sha256 of the manifests of data.sources
    class_weights: list[float] | None  # of the criterion, a function of settings and data, so equal when resumed
    optimizer: torch.optim.AdamW
    sharded: ShardedModel | None  # with train.fsdp, when there is a process group
    update_guard: UpdateGuard
    scaler: LossScaler
    averaged: AveragedWeights | None  # None: train.ema_decay is not set
    early_stopping: EarlyStopping
    writer: CheckpointWriter
    prefetch: Prefetch
    backbone_sha256: str
    run_id: str  # the same whenever the run is resumed (`trainer.run.identity`)

    step: int = 0
    best_miou: float | None = None
    metrics: dict[str, Any] | None = None  # of the last evaluation, for the weights that count (`eval.weights`)
    evaluated: bool = True  # False: an evaluation is due at `step` and was interrupted
    transform: Transform | None = None  # the user's augmentation
    skipped_steps: list[int] = field(default_factory=list)  # because of NaN or infinity
    changes: list[str] = field(default_factory=list)  # what differs from the resumed checkpoint: settings, averages
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def folder(self) -> Path:
        return self.places.folder

    @property
    def is_finished(self) -> bool:
        """Whether all steps, or as many as early stopping allows, and the last evaluation are done."""
        return (self.step == self.config.train.total_steps or self.early_stopping.is_over) and self.evaluated

    @property
    def early_end(self) -> str:
        """Why the run ended before its last step; empty if it did not."""
        total = self.config.train.total_steps
        if not self.early_stopping.is_over or self.step == total:
            return ""
        return f"early stopping at step {self.step} of {total}: {self.early_stopping.reason()}"

    @property
    def weights(self) -> dict[str, AbstractContextManager[None]]:
        """The kinds of weights to evaluate, those that count first: averaged and raw, or, without averages, only raw.
        In its context the model has these weights."""
        kinds: dict[str, AbstractContextManager[None]] = {"raw": nullcontext()}
        if self.averaged is None:
            return kinds
        averaged = {"averaged": self.averaged.in_model()}
        return kinds | averaged if self.config.eval.weights == "raw" else averaged | kinds

    def beat(self, phase: str) -> None:
        """Report the start of a phase to the watchdog, if there is one."""
        self.context.beat(phase, self.step)

    @property
    def guards_on_device(self) -> bool:
        """Whether the device itself leaves out updates with bad numbers, so that nothing waits for the host's word.

        Not with fp16: what an overflow does to the scale is decided by what happened before, on the host.
        """
        return self.update_guard.is_active and not self.scaler.is_enabled

    @property
    def reads_late(self) -> bool:
        """Whether the host may read a step's numbers while the next one is computed (see `trainer.run.late_reading`).

        Not with averaged weights: they would follow a step, and batch norm's statistics, that may not count.
        """
        return self.guards_on_device and self.averaged is None

    def on_device(self, batch: Batch) -> Batch:
        """A micro-batch on the training device, moved and, with data.transform, changed by the user's function."""
        device = self.context.device
        moved = self.prefetch.take(batch).to(device)
        if self.transform is None:
            return moved
        return transformed(moved, self.transform, transform_generator(self.config.seed, batch.number, device))

    def save_checkpoint(self) -> None:
        """Rank 0 writes in the background; every rank tracks the best mIoU. Call it on all ranks."""
        miou = self.metrics["mIoU"] if self.metrics is not None and self.evaluated else None
        is_best = miou is not None and math.isfinite(miou) and (self.best_miou is None or miou > self.best_miou)
        if is_best:
            self.best_miou = miou
        if self.context.is_main:
            self.writer.wait()  # not with the checkpoint before in memory
        if self.sharded is not None:
            with self.sharded.states_on(self.context.is_main):
                snapshot = self.snapshot()
        elif self.context.is_main:
            snapshot = self.snapshot()
        if self.context.is_main:
            self.writer.save(snapshot, is_best=is_best, is_copy=self.sharded is not None)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, this rank may run the model without the others. Collective at its start."""
        return nullcontext() if self.sharded is None else self.sharded.whole_weights()

    def snapshot(self) -> Checkpoint:
        """The state as a checkpoint. It shares the run's tensors, which the next step modifies.

        Collective if the model is sharded.
        """
        moments = self.optimizer.state_dict()
        return Checkpoint(
            step=self.step, model=self.model.trainable_state_dict(),
            optimizer=moments if self.sharded is None else self.sharded.gathered(moments),
            config=config_to_dict(self.config), classes=class_table(self.manifest.classes),
            ignore_index=self.manifest.ignore_index, data_hash=self.manifest.sha256,
            source_hashes=list(self.source_hashes),
            backbone_sha256=self.backbone_sha256, best_miou=self.best_miou, evaluated=self.evaluated,
            skipped_steps=list(self.skipped_steps), versions=versions(), run_id=self.run_id,
            averaged=None if self.averaged is None else self.averaged.state(), loss_scale=self.scaler.state(),
            early_stopping=self.early_stopping.state(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of `snapshot`."""
        self.model.load_trainable_state_dict(checkpoint.model)
        load_optimizer(self.optimizer, checkpoint.optimizer)
        if self.averaged is not None:
            self.averaged.restore(checkpoint.averaged)
        self.scaler.restore(checkpoint.loss_scale)
        self.early_stopping.restore(checkpoint.early_stopping)
        self.step, self.best_miou, self.evaluated = checkpoint.step, checkpoint.best_miou, checkpoint.evaluated
        self.skipped_steps = list(checkpoint.skipped_steps)
        self.metrics = None


def open_crops(config: RunConfig, manifest: Manifest) -> TrainCrops:
    """The training samples in the planned order; `manifest` is data.root's. Raises ConfigError when their kind does not
    fit data.online, or their size the head, and as `train_sources`."""
    sources = train_sources(config.data, config.train.micro_batch_size, config.seed, manifest)
    reader = sources[0].reader  # all are of one kind
    if reader.info.kind == "crops" and config.data.online.scaled_side in ("short", "long"):
        raise ConfigError(f"data.online.scaled_side is {config.data.online.scaled_side}, legal with split "
                          f"{reader.split!r}, which holds crops: stored; or make shards of whole images "
                          "(crops.splits=[]), as configs/ade20k-whole-shards.yaml does")
    crops = TrainCrops(sources, config.data, global_batch_size=config.train.global_batch_size)
    for source in range(len(sources)):  # the first batch with a sample of each
        batch = crops[crops.mixture.first_of(source) // crops.micro_batch_size]
        height, width = batch.to(torch.device("cpu")).images.shape[2:]
        check_crop_size(config, height, width)
    if config.data.quarter_turns and height != width:
        raise ConfigError(f"data.quarter_turns is {config.data.quarter_turns}, legal with training samples of {height}x"
                          f"{width} pixels: 0; set data.crop_size to train on squares")
    return crops


def build_run(config: RunConfig, context: DistContext, places: RunPlaces) -> Run:
    """Build a run at step 0: data, model, criterion and optimiser, on the device.

    All ranks draw the same initial weights from the seed. Raises ConfigError for settings that are inconsistent with
    the data, with each other or with the number of ranks.
    """
    settings = config.train
    accumulation = accumulation_for(settings.global_batch_size, settings.micro_batch_size, context.world_size)
    # -- data ---------------------------------------------------------------------------------------------
    val_reader = open_reader(config.data, config.data.val_split)  # reads the manifest by the configured retry policy
    manifest = val_reader.manifest
    crops = open_crops(config, manifest)
    transform = None if config.data.transform is None else load_transform(config.data.transform)
    # -- model --------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    model = build_model(config, manifest.num_classes)
    backbone_sha256 = model.backbone.weights_sha256()
    if context.device.type == "cuda" and context.world_size > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(context.device).train()
    sharded = None
    if settings.fsdp and torch.distributed.is_initialized():
        context.broadcast(tensor.detach() for tensor in [*model.parameters(), *model.buffers()])  # as DDP
        sharded = ShardedModel(model)
    if settings.triton:
        sample_by_triton(model, context.device)
    if settings.deterministic:
        sample_by_gathers(model)
    if settings.compile:
        model.head.compile()  # in place, so parameter names stay the same
    optimizer = build_optimizer(model, config.optimizer)
    weights = resolve_class_weights(config, manifest, partial(class_counts, crops.sources))
    criterion = build_criterion(config, manifest.num_classes, manifest.ignore_index, weights).to(context.device)
    return Run(
        config=config, context=context, places=places, manifest=manifest, crops=crops, val_reader=val_reader,
        accumulation=accumulation, model=model, wrapped=_wrapped(model, context, sharded), criterion=criterion,
        class_weights=weights,
        source_hashes=[source.reader.manifest.sha256 for source in crops.sources if config.data.sources],
        optimizer=optimizer, sharded=sharded, update_guard=UpdateGuard(optimizer), prefetch=Prefetch(context.device),
        backbone_sha256=backbone_sha256,
        scaler=LossScaler(settings.precision == "fp16", context.device),
        averaged=None if settings.ema_decay is None else AveragedWeights(model, settings, context),
        early_stopping=EarlyStopping.of(settings),
        writer=CheckpointWriter(places.checkpoints, places.folder, settings.keep_checkpoints, settings.keep_every),
        run_id=run_id(places.folder),
        transform=transform,
    )


def _wrapped(model: Segmenter, context: DistContext, sharded: ShardedModel | None) -> nn.Module:
    """What a step runs."""
    if sharded is not None or not torch.distributed.is_initialized():
        return model
    device_ids = [context.device.index] if context.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
