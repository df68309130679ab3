"""Loader processes: batches in the requested order for any number of workers, and errors instead of hangs."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from shards.errors import CorruptShardError, MaskStreamError, RunError
from shards.workers import exit_with_parent, keep_freed_memory, use_own_temporary_folder
from trainer.data.batch import Batch
from trainer.data.crops import TrainCrops
from trainer.data.parcel import Parcel, shared_memory_advice
from trainer.data.whole_images import LabelledImage, ValidationImages

_log = logging.getLogger(__name__)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GRACE = 10  # seconds that a worker keeps running after SIGTERM, for the last step's batches


class LoaderError(RunError):
    """A loader process died, or a batch requested from it did not arrive."""


def train_loader(crops: TrainCrops, micro_batches: Iterable[int], device: torch.device) -> Iterator[Batch]:
    """The micro-batches of the given numbers, in that order for any number of workers. The iterable must be picklable,
    and each process iterates over it anew.

    Raises what a worker raised (ShardError, ConfigError), and LoaderError when a worker died or a batch is missing.
    """
    skipped: list[str] = []
    for batch in _items(crops, micro_batches, device):
        for problem in batch.skipped:
            skipped.append(problem)
            _log.warning("skipped a training sample (%d of at most %d): %s", len(skipped), crops.config.corrupt_budget,
                         problem)
        if len(skipped) > crops.config.corrupt_budget:
            raise CorruptShardError(f"{len(skipped)} training samples were skipped, but data.corrupt_budget is "
                                    f"{crops.config.corrupt_budget}; the last one: {skipped[-1]}")
        yield batch


def validation_loader(images: ValidationImages, numbers: Iterable[int],
                      device: torch.device) -> Iterator[LabelledImage]:
    """The validation images of the given numbers, in that order; raises like `train_loader`."""
    return _items(images, numbers, device)


def _items(dataset: TrainCrops | ValidationImages, numbers: Iterable[int], device: torch.device) -> Iterator[Any]:
    """Exactly the items of these numbers. Workers' errors are raised without the worker tracebacks that torch adds to
    their text."""
    dataset = copy.copy(dataset)
    dataset.numbers = numbers
    config, workers = dataset.config, []
    try:
        items = iter(_loader(dataset, device))
        workers = list(getattr(items, "_workers", ()))  # torch drops them when one dies
        for number, item in zip(numbers, items, strict=True):
            if item.number != number:
                raise LoaderError(f"loader processes delivered number {item.number} where {number} was expected; "
                                  f"{shared_memory_advice()}")
            yield item
    except MaskStreamError as error:
        message = str(error).strip().rpartition("\n")[2]
        raise type(error)(message.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        if not config.workers or not _concerns_workers(error):
            raise
        ends = _deaths(workers)
        for worker in workers:
            worker.kill()  # torch would wait seconds for each of them to finish work that is no longer needed
        raise LoaderError(
            f"loader processes died or could not deliver a batch{ends}: "
            f"{_reason(error)}. Lower data.workers (now {config.workers}) or "
            f"data.prefetch_batches (now {config.prefetch_batches}); {shared_memory_advice()}"
        ) from error


def _concerns_workers(error: BaseException) -> bool:
    """Whether the error is about workers: raised by DataLoader, its pinning thread or `zip`, or by a broken connection
    to a dead worker."""
    if isinstance(error, RuntimeError | ValueError):
        return any(sign in str(error) for sign in ("DataLoader", "Pin memory thread", "zip()", "open files", "ancdata"))
    return True


def _reason(error: BaseException) -> str:
    """The error in one line: the last for a worker's own error, as its traceback comes first."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1 if "Original Traceback" in str(error) else 0]


def _deaths(workers: Iterable[Any]) -> str:
    """The signals that killed worker processes, as text."""
    signals = sorted({-worker.exitcode for worker in workers if (worker.exitcode or 0) < 0})
    notes = {signal.SIGKILL: ", as the kernel does when memory runs out", signal.SIGBUS: ", as when memory runs out"}
    return "".join(f" (one was killed by {signal.Signals(number).name}{notes.get(number, '')})" for number in signals)


def _start_worker(number: int) -> None:
    """Runs first in each loader process, which starts with _STOP_SIGNALS blocked (see `_start_helpers`)."""
    for stop in _STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)  # also discards a pending one
    os.setsid()  # leave the trainer's process group, to which torchrun and terminals send their signals
    # A stuck worker must exit when its DataLoader, which sends SIGTERM, shuts down.
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE, os._exit, [0]).start())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    exit_with_parent()
    keep_freed_memory()


def _start_helpers() -> None:
    """Start Python's helper processes, the fork server and the resource tracker, with _STOP_SIGNALS blocked.

    A stop signal often goes to all processes of a run (a terminal's Ctrl-C, torchrun, Slurm). The current step still
    needs its batches, so the signal must kill neither the helpers nor the loader processes. They inherit the mask, so
    they are never exposed to it; a signal that the trainer receives meanwhile stays pending until the mask is restored.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # each time: the tracker's start unblocks two
            start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Parcels(IterableDataset[Parcel]):
    """The dataset that loader processes iterate over: items packed into parcels before they are queued."""

    def __init__(self, dataset: TrainCrops | ValidationImages) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Parcel]:
        return map(Parcel, self.dataset)


def _loader(dataset: TrainCrops | ValidationImages, device: torch.device) -> DataLoader[Any]:
    workers = dataset.config.workers
    pin_memory = device.type == "cuda"
    if not workers:
        return DataLoader(dataset, batch_size=None, pin_memory=pin_memory)  # None: items are batches already
    use_own_temporary_folder()
    # Forking a process that has threads (autograd, NCCL, gloo) can deadlock. The fork server is a clean process
    # instead: it imports torch once, and its children start in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.data.whole_images"])
    _start_helpers()
    # No timeout: with one, torch no longer checks every five seconds whether its workers are alive.
    return DataLoader(_Parcels(dataset), batch_size=None, num_workers=workers,
                      prefetch_factor=dataset.config.prefetch_batches, multiprocessing_context=context,
                      worker_init_fn=_start_worker, pin_memory=pin_memory)
