"""A run and its parts: what it is made of, and how it is begun or continued."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shards.config_file import config_changes, config_to_dict
from shards.errors import ConfigError
from shards.files.storage import open_storage
from shards.manifest import Manifest
from shards.plan import TrainPlan
from shards.shown_text import masked_value, shown
from trainer.build import build_criterion, build_model, check_crop_size
from trainer.config import RunConfig, load_run_config
from trainer.data.crops import TrainCrops, open_reader
from trainer.distributed import DistContext
from trainer.loss.criterion import Criterion
from trainer.models import Segmenter
from trainer.models.weights import read_weights
from trainer.optimizer import build_optimizer, load_optimizer
from trainer.reporting.versions import versions
from trainer.run.checkpoint import Checkpoint, class_table, load_latest, numbered
from trainer.run.identity import check_identity, run_id
from trainer.stopping import StopRequest


@dataclass(kw_only=True)
class Run:
    """The objects one run is made of. `step` counts finished optimiser updates."""

    config: RunConfig
    context: DistContext
    manifest: Manifest
    model: Segmenter
    wrapped: nn.Module  # the model, in DDP when there is a process group
    criterion: Criterion
    optimizer: torch.optim.AdamW
    folder: Path
    backbone_sha256: str
    run_id: str = ""  # of all its starts (`trainer.run.identity`)
    step: int = 0
    best_miou: float | None = None
    evaluated: bool = True  # whether an evaluation that is due at `step` was done
    skipped_steps: list[int] = field(default_factory=list)  # left out for numbers that were not finite
    changes: list[str] = field(default_factory=list)  # settings that are not those of the checkpoint it continues
    stop: StopRequest = field(default_factory=StopRequest)

    def beat(self, phase: str) -> None:
        """Tell the watchdog, if there is one, that a phase begins."""
        self.context.beat(phase, self.step)


def required_folders(config: RunConfig) -> tuple[str, Path]:
    """(data.root, output_dir). Raises ConfigError saying what to type when one is missing."""
    missing = [name for name, value in (("data.root", config.data.root), ("output_dir", config.output_dir))
               if value is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not set. Type for example: torchrun --standalone --nproc-per-node 2 "
            "trainer/train.py data.root=<folder of shards> output_dir=<folder for the run>"
        )
    assert config.data.root is not None and config.output_dir is not None
    return config.data.root, Path(config.output_dir)


def checkpoint_place(config: RunConfig) -> str:
    """Folder or URL of a run's checkpoints."""
    return config.train.checkpoint_dir or str(Path(str(config.output_dir)) / "checkpoints")


def open_crops(config: RunConfig, manifest: Manifest) -> TrainCrops:
    """The training samples in their order. Raises ConfigError when their size does not suit the head."""
    reader = open_reader(config.data, config.data.train_split, manifest)
    plan = TrainPlan([shard.samples for shard in reader.info.shards], config.train.micro_batch_size, config.seed,
                     config.data.lanes, config.data.span_samples)
    crops = TrainCrops(reader, plan, config.data, global_batch_size=config.train.global_batch_size)
    height, width = crops[0].images.shape[2:]
    check_crop_size(config, height, width)
    return crops


def build_run(config: RunConfig, context: DistContext, manifest: Manifest, folder: Path) -> Run:
    """Model, criterion and optimiser on the device. All ranks draw the same initial weights from the seed."""
    torch.manual_seed(config.seed)
    model = build_model(config, manifest.num_classes)
    backbone_sha256 = model.backbone.weights_sha256()
    if context.device.type == "cuda" and context.world_size > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(context.device).train()
    if config.train.compile:
        model.head.compile()  # in place: parameter names stay
    wrapped: nn.Module = model
    if torch.distributed.is_initialized():
        device_ids = [context.device.index] if context.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    criterion = build_criterion(config, manifest.num_classes, manifest.ignore_index).to(context.device)
    return Run(
        config=config, context=context, manifest=manifest, model=model, wrapped=wrapped, criterion=criterion,
        optimizer=build_optimizer(model, config.optimizer), folder=folder, backbone_sha256=backbone_sha256,
        run_id=run_id(folder),
    )  # fmt: skip


def resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run's folder; a run that has none starts from `load.weights`.

    Raises ConfigError when `resume` forbids it, or when the checkpoint belongs to other data, another
    backbone or another sequence of global batches.
    """
    if run.config.resume == "never" and (run.folder / "config.yaml").exists():
        raise ConfigError(f"{run.folder} holds a run and resume is 'never'; "
                          "choose another output_dir, or set resume=auto to continue it")
    checkpoint = load_latest(checkpoint_place(run.config))
    if checkpoint is None:
        _refuse_to_begin_again(run)
        start_from_weights(run)
        return
    old, new = checkpoint.run_config, run.config
    check_identity(run.run_id, run.folder, checkpoint.run_id, old.output_dir)
    identities = [f"{name} was {before} and is {now}" for name, before, now in (
        ("the data (manifest_sha256)", checkpoint.data_hash, run.manifest.sha256),
        ("the backbone's weights (sha256)", checkpoint.backbone_sha256, run.backbone_sha256)) if before != now]
    changes = [*identities, *config_changes(_what_has_to_stay(old), _what_has_to_stay(new))]
    if changes:
        raise ConfigError(f"cannot continue {run.folder}: {'; '.join(changes)}; restore that, or choose another "
                          "output_dir")
    if checkpoint.step > new.train.total_steps:
        raise ConfigError(f"train.total_steps is {new.train.total_steps}, but {run.folder} has been trained for "
                          f"{checkpoint.step} steps; legal: at least that, or another output_dir")
    run.changes = config_changes(replace(old, output_dir=new.output_dir), new)  # a folder may have been moved
    take_over(run, checkpoint)


def _what_has_to_stay(config: RunConfig) -> RunConfig:
    """Settings that the sequence of batches and the network follow from; all others are the defaults."""
    default = RunConfig()
    return replace(
        default, seed=config.seed, backbone=replace(config.backbone, source=None),
        adapter=replace(config.adapter, drop_path=default.adapter.drop_path),
        decoder_head=replace(config.decoder_head, dropout=default.decoder_head.dropout,
                             **{name: getattr(default.decoder_head, name) for name in
                                ("mask_annealing", "mask_annealing_starts", "mask_annealing_ends")}),
        data=replace(default.data, **{name: getattr(config.data, name)
                                      for name in ("train_split", "crop_size", "lanes", "span_samples")}),
        train=replace(default.train, global_batch_size=config.train.global_batch_size),
        optimizer=replace(default.optimizer, decay_all=config.optimizer.decay_all),
    )  # fmt: skip


def _refuse_to_begin_again(run: Run) -> None:
    """A run whose checkpoints lie where train.checkpoint_dir was before would be begun anew over itself."""
    try:
        before = load_run_config(run.folder / "config.yaml", [])
    except ConfigError:  # there is none, or it is another version's
        return
    old, new = checkpoint_place(replace(before, output_dir=str(run.folder))), checkpoint_place(run.config)
    if masked_value(old) != masked_value(new) and numbered(open_storage(old)):
        raise ConfigError(f"{run.folder} holds a run with checkpoints in {old}, but there are none in {new}; set "
                          "train.checkpoint_dir as it was, copy them there, or choose another output_dir")


def take_over(run: Run, checkpoint: Checkpoint) -> None:
    """Make the run what it was when the checkpoint was written."""
    run.model.load_trainable_state_dict(checkpoint.model)
    load_optimizer(run.optimizer, checkpoint.optimizer)
    run.step, run.best_miou, run.evaluated = checkpoint.step, checkpoint.best_miou, checkpoint.evaluated
    run.skipped_steps = list(checkpoint.skipped_steps)


def snapshot(run: Run) -> Checkpoint:
    """The opposite of `take_over`. Tensors are the run's own, which its next step changes."""
    return Checkpoint(
        step=run.step, model=run.model.trainable_state_dict(), optimizer=run.optimizer.state_dict(),
        config=config_to_dict(run.config), classes=class_table(run.manifest), ignore_index=run.manifest.ignore_index,
        data_hash=run.manifest.sha256, backbone_sha256=run.backbone_sha256, best_miou=run.best_miou,
        evaluated=run.evaluated, skipped_steps=list(run.skipped_steps), versions=versions(),
        run_id=run.run_id,
    )  # fmt: skip


def start_from_weights(run: Run) -> None:
    """Fine-tuning: fill adapter and head from `load.weights`, if it is set. Raises ConfigError when it does not fit."""
    settings = run.config.load
    if settings.weights is None:
        return
    left = run.model.load_weights(read_weights(settings.weights), settings.ignore)
    if run.context.is_main:
        loaded = len(run.model.trainable_state_dict()) - len(left)
        random = f"; left random, as load.ignore says: {', '.join(left)}" if left else ""
        print(f"{shown(settings.weights)}: loaded {loaded} tensors of adapter and head{random}", flush=True)


def check_ranks_agree(run: Run) -> None:
    """All ranks must have found the same checkpoint, or none: a node without the run's folder would train alone."""
    steps = run.context.all_reduce_sum(torch.tensor([run.step, run.step**2], device=run.context.device)).tolist()
    if steps[1] * run.context.world_size != steps[0] ** 2:  # Cauchy-Schwarz: equal only if all are equal
        raise ConfigError(f"rank {run.context.rank} found a checkpoint of step {run.step} in {run.folder}, other ranks "
                          "found others; output_dir must be one folder that all nodes see")
