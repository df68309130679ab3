"""Start a run: lock its folders, then begin at step 0 or resume from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from shards.cli.config_file import config_changes
from shards.errors import ConfigError
from shards.files.storage import open_storage
from shards.shown_text import masked_value, shown
from trainer.config import RunConfig, load_run_config
from trainer.distributed import DistContext
from trainer.models.weights import read_weights
from trainer.precision import store_for_autocast
from trainer.run.checkpoint import Checkpoint, load_latest, numbered
from trainer.run.folder import lock_run_folder, record_start
from trainer.run.identity import check_identity, lock_checkpoints
from trainer.run.non_finite import TrainingDiverged
from trainer.run.run import Run, RunPlaces, build_run, run_places
from trainer.stopping import process_seconds


@contextmanager
def lock_run(config: RunConfig, context: DistContext) -> Iterator[RunPlaces]:
    """The run's locations; rank 0 locks output_dir and the checkpoint location on behalf of all ranks.

    The other ranks wait for rank 0's weights when the model is built, before they look for a checkpoint. Raises
    ConfigError and FolderInUse.
    """
    places = run_places(config)
    if not context.is_main:
        yield places
        return
    with (lock_run_folder(places.folder), record_start(places.folder, config.train.total_steps, context.world_size),
          lock_checkpoints(places.checkpoints, places.folder)):
        yield places


def start_run(config: RunConfig, context: DistContext, places: RunPlaces) -> Run:
    """A new run, or one resumed from its newest checkpoint. Raises ConfigError like `build_run` and `resume`."""
    run = build_run(config, context, places)
    resume(run)
    store_for_autocast(run.model, config, context.device)  # not earlier: load.weights may compare the exact ViT
    seconds = context.all_reduce_sum(torch.tensor(process_seconds(), device=context.device)).item()
    run.stop.limit(config.train.max_hours, seconds / context.world_size)  # the same moment on all ranks
    return run


def resume(run: Run) -> None:
    """Resume from the newest checkpoint; without one, start from `load.weights` if set.

    Raises ConfigError when `resume` forbids it, or when the checkpoint is of another run, other data, another backbone
    or another sequence of global batches.
    """
    if run.config.resume == "never" and (run.folder / "config.yaml").exists():
        raise ConfigError(f"{run.folder} already holds a run and resume is 'never'; "
                          "choose another output_dir, or set resume=auto to resume it")
    checkpoint = load_latest(run.places.checkpoints, mmap=run.sharded is not None)
    check_ranks_agree(run, checkpoint)
    if checkpoint is None:
        _refuse_moved_checkpoints(run)
        _start_from_weights(run)
        return
    old, new = checkpoint.run_config, run.config
    check_identity(run.run_id, run.folder, checkpoint.run_id, old.output_dir)
    identities = [f"{name} was {before} and is {now}" for name, before, now in (
        ("the data (manifest_sha256)", checkpoint.data_hash, run.manifest.sha256),
        ("the backbone's weights (sha256)", checkpoint.backbone_sha256, run.backbone_sha256),
        *((f"data.sources[{number}] (manifest_sha256)", *pair)  # their number is a setting
          for number, pair in enumerate(zip(checkpoint.source_hashes, run.source_hashes, strict=False))),
    ) if before != now]
    changes = [*identities, *config_changes(_resume_invariants(old), _resume_invariants(new))]
    if changes:
        raise ConfigError(f"cannot resume {run.folder}: {'; '.join(changes)}; undo these changes, or choose another "
                          "output_dir")
    if checkpoint.step > new.train.total_steps:
        raise ConfigError(f"train.total_steps is {new.train.total_steps}, but {run.folder} has already been trained "
                          f"for {checkpoint.step} steps; legal: at least that many, or choose another output_dir")
    run.changes = config_changes(replace(old, output_dir=new.output_dir), new)  # output_dir may have been moved
    if (run.averaged is None) != (checkpoint.averaged is None):
        run.changes.append("its averaged weights are dropped" if run.averaged is None else
                           f"it has no averaged weights: averaging starts from the weights of step {checkpoint.step}")
    run.restore(checkpoint)


def roll_back(run: Run, reason: str) -> None:
    """Restore the last checkpoint, but remember the steps skipped since, so that they are skipped again.

    Raises TrainingDiverged when there is no checkpoint yet. Call it on all ranks.
    """
    skipped_steps = run.skipped_steps
    if run.context.is_main:
        run.writer.wait()
    run.context.barrier()
    checkpoint = load_latest(run.places.checkpoints, mmap=run.sharded is not None)
    check_ranks_agree(run, checkpoint)
    if checkpoint is None:
        raise TrainingDiverged(f"{reason}. There is no checkpoint yet to roll back to; lower train.checkpoint_every "
                               f"(now {run.config.train.checkpoint_every})")
    run.restore(checkpoint)
    run.skipped_steps = sorted({*run.skipped_steps, *skipped_steps})


def check_ranks_agree(run: Run, checkpoint: Checkpoint | None) -> None:
    """Raise ConfigError unless all ranks found the same checkpoint: a node that cannot see the run's folder would
    restart at step 0 on its own. Before anything is restored, which is collective with train.fsdp."""
    step = 0 if checkpoint is None else checkpoint.step
    steps = run.context.all_reduce_sum(torch.tensor([step, step**2], device=run.context.device)).tolist()
    if steps[1] * run.context.world_size != steps[0] ** 2:  # Cauchy-Schwarz: equal only if all are equal
        raise ConfigError(f"rank {run.context.rank} found a checkpoint of step {step} in {run.folder}, but other "
                          "ranks found other steps; output_dir must be a folder shared by all nodes")


def _resume_invariants(config: RunConfig) -> RunConfig:
    """The settings that determine the network and the sequence of batches, with all others at their defaults."""
    default = RunConfig()
    sources = [replace(source, root=None) for source in config.data.sources]  # manifests are compared, not places
    return replace(
        default, seed=config.seed, backbone=replace(config.backbone, source=None),
        adapter=replace(config.adapter, drop_path=default.adapter.drop_path),
        decoder_head=replace(config.decoder_head, dropout=default.decoder_head.dropout,
                             **{name: getattr(default.decoder_head, name) for name in
                                ("mask_annealing", "mask_annealing_starts", "mask_annealing_ends")}),
        data=replace(default.data, sources=sources,
                     online=replace(config.data.online, resample_on=default.data.online.resample_on),
                     **{name: getattr(config.data, name)
                        for name in ("train_split", "crop_size", "lanes", "span_samples", "sampling",
                                     "sampling_threshold")}),
        train=replace(default.train, global_batch_size=config.train.global_batch_size),
        optimizer=replace(default.optimizer, decay_all=config.optimizer.decay_all),
    )


def _refuse_moved_checkpoints(run: Run) -> None:
    """Raise ConfigError instead of restarting at step 0 when train.checkpoint_dir has changed and the old location
    still has checkpoints."""
    try:
        before = load_run_config(run.folder / "config.yaml", [])
    except ConfigError:  # there is no config.yaml, or another version wrote it
        return
    old = run_places(replace(before, data=run.config.data, output_dir=str(run.folder))).checkpoints
    new = run.places.checkpoints
    if masked_value(old) != masked_value(new) and numbered(open_storage(old)):
        raise ConfigError(f"{run.folder} holds a run with checkpoints in {old}, but there are none in {new}; change "
                          "train.checkpoint_dir back, copy the checkpoints, or choose another output_dir")


def _start_from_weights(run: Run) -> None:
    """Fine-tuning: load adapter and head from `load.weights`, if set. Raises ConfigError if they do not fit."""
    settings = run.config.load
    if settings.weights is None:
        return
    weights = read_weights(settings.weights)
    ignored = run.model.load_weights(weights, settings.ignore, settings.base_sha256)
    if run.averaged is not None:
        run.averaged.restore(None)
    loaded = len(run.model.trainable_state_dict()) - len(ignored)  # on all ranks: collective with train.fsdp
    if run.context.is_main:
        kind = ", averaged weights" if weights.is_averaged else ""
        random = f"; randomly initialised because of load.ignore: {', '.join(ignored)}" if ignored else ""
        vit = "ViT, " if run.model.backbone.trainable else ""
        print(f"{shown(settings.weights)}: loaded {loaded} tensors of {vit}adapter and head{kind}{random}", flush=True)
        if weights.class_names not in (None, [info.name for info in run.manifest.classes]) and not ignored:
            print("its classes have other names than those of data.root, or another order, and their classifier was "
                  "loaded; to start with a new one, name it in load.ignore", flush=True)
