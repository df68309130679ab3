"""Loader processes: batches in the order asked for, whatever the number of workers, and errors instead of hangs."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader

from shards.errors import CorruptShardError, MaskStreamError, RunError
from shards.workers import exit_with_parent, keep_freed_memory
from trainer.data import Batch, LabelledImage, TrainCrops, WholeImages

_log = logging.getLogger(__name__)
_GRACE = 10  # seconds that a worker lives after SIGTERM, for the last step's batches
_WORKER_TIMEOUT = 600  # seconds without a batch after which a stuck worker is an error, not a hang


class LoaderError(RunError):
    """A loader process died or stopped answering."""


def train_loader(crops: TrainCrops, micro_batches: Iterable[int], device: torch.device) -> Iterator[Batch]:
    """The micro-batches of the given numbers (an iterable that can be sent to processes, and begun again in each), in
    that order whatever the number of workers.

    Raises what a worker raised (ShardError, ConfigError), and LoaderError when a worker died or hangs.
    """
    skipped: list[str] = []
    for batch in _items(_loader(crops, micro_batches, device)):
        for problem in batch.skipped:
            skipped.append(problem)
            _log.warning("skipped a training sample (%d of at most %d): %s", len(skipped), crops.config.corrupt_budget,
                         problem)
        if len(skipped) > crops.config.corrupt_budget:
            raise CorruptShardError(f"{len(skipped)} training samples were skipped, data.corrupt_budget is "
                                    f"{crops.config.corrupt_budget}; the last one: {skipped[-1]}")
        yield batch


def validation_loader(images: WholeImages, numbers: Iterable[int], device: torch.device) -> Iterator[LabelledImage]:
    """The validation images of the given numbers, in that order; as `train_loader`."""
    return _items(_loader(images, numbers, device))


def _items(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's items; errors of workers without the workers' tracebacks, which they carry as text."""
    try:
        yield from loader
    except MaskStreamError as error:
        message = str(error).strip().rpartition("\n")[2]
        raise type(error)(message.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter: a worker died while handing over
        if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
            raise
        raise LoaderError(
            f"a loader process died or hangs ({(str(error) or repr(error)).splitlines()[0]}). Often memory is short: "
            f"lower data.workers (now {loader.num_workers}) or data.prefetch_batches (now {loader.prefetch_factor})"
        ) from error


def _start_worker(number: int) -> None:
    exit_with_parent()
    keep_freed_memory()
    # Stop signals are ignored (see trainer.loader_processes), but a worker that is stuck must end with its DataLoader.
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE, os._exit, [0]).start())


def _start_resource_tracker() -> None:
    """Python's own helper process, which ignores all signals that stop a run but one: let it inherit that blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(dataset: TrainCrops | WholeImages, numbers: Iterable[int], device: torch.device) -> DataLoader[Any]:
    workers = dataset.config.workers
    dataset = copy.copy(dataset)
    dataset.numbers = numbers
    # A forked copy of a process with threads (autograd, NCCL, gloo) can deadlock. The fork server is a clean
    # process instead; it imports torch once, its children start in milliseconds.
    context = multiprocessing.get_context("forkserver")
    if workers:
        _start_resource_tracker()
    context.set_forkserver_preload(["trainer.loader_processes", "trainer.data"])
    return DataLoader(
        dataset,
        batch_size=None,  # an item is already a batch
        num_workers=workers,
        prefetch_factor=dataset.config.prefetch_batches if workers else None,
        multiprocessing_context=context if workers else None,
        timeout=_WORKER_TIMEOUT if workers else 0,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
    )
