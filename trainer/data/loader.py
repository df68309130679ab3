"""Loader processes: batches in the order asked for, whatever the number of workers, and errors instead of hangs."""

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
from trainer.data.crops import Batch, LabelledImage, TrainCrops, WholeImages
from trainer.data.parcel import Parcel, shared_memory_advice

_log = logging.getLogger(__name__)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GRACE = 10  # seconds that a worker lives after SIGTERM, for the last step's batches


class LoaderError(RunError):
    """A loader process died, or something it was asked for did not arrive."""


def train_loader(crops: TrainCrops, micro_batches: Iterable[int], device: torch.device) -> Iterator[Batch]:
    """The micro-batches of the given numbers (an iterable that can be sent to processes, and begun again in each), in
    that order whatever the number of workers.

    Raises what a worker raised (ShardError, ConfigError), and LoaderError when a worker died or a batch is missing.
    """
    skipped: list[str] = []
    for batch in _items(crops, micro_batches, device):
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
    return _items(images, numbers, device)


def _items(dataset: TrainCrops | WholeImages, numbers: Iterable[int], device: torch.device) -> Iterator[Any]:
    """Exactly the items of the numbers; errors of workers without the workers' tracebacks, which they carry as text."""
    dataset = copy.copy(dataset)
    dataset.numbers = numbers
    config, workers = dataset.config, []
    try:
        items = iter(_loader(dataset, device))
        workers = list(getattr(items, "_workers", ()))  # torch forgets them when one dies
        for number, item in zip(numbers, items, strict=True):
            if item.number != number:
                raise LoaderError(f"loader processes handed over number {item.number} where {number} was due; "
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
            worker.kill()  # torch would give each of them seconds to finish what nobody waits for
        raise LoaderError(
            f"loader processes ended or could not hand over a batch{ends}: "
            f"{_reason(error)}. Lower data.workers (now {config.workers}) or "
            f"data.prefetch_batches (now {config.prefetch_batches}); {shared_memory_advice()}"
        ) from error


def _concerns_workers(error: BaseException) -> bool:
    """Whether the DataLoader, its pinning thread or `zip` says so; connection errors and EOF come from dead workers."""
    if isinstance(error, RuntimeError | ValueError):
        return any(sign in str(error) for sign in ("DataLoader", "Pin memory thread", "zip()", "open files", "ancdata"))
    return True


def _reason(error: BaseException) -> str:
    """One line; of a worker's own error the last, as the others are its traceback."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1 if "Original Traceback" in str(error) else 0]


def _deaths(workers: Iterable[Any]) -> str:
    """How worker processes ended that ended by a signal."""
    signals = sorted({-worker.exitcode for worker in workers if (worker.exitcode or 0) < 0})
    notes = {signal.SIGKILL: ", as the kernel does when memory runs out", signal.SIGBUS: ", as when memory runs out"}
    return "".join(f" (one was ended by {signal.Signals(number).name}{notes.get(number, '')})" for number in signals)


def _start_worker(number: int) -> None:
    """Runs first in each loader process, which was born with _STOP_SIGNALS blocked (see `_start_helpers`)."""
    for stop in _STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)  # one that came already is dropped
    os.setsid()  # what is sent to the trainer's group, as torchrun does, is no longer sent here
    # A worker that is stuck must end with its DataLoader, which asks by SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE, os._exit, [0]).start())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    exit_with_parent()
    keep_freed_memory()


def _start_helpers() -> None:
    """Start Python's own helper processes, the fork server and the resource tracker, with _STOP_SIGNALS blocked.

    A signal that asks a run to stop often goes to all its processes (a terminal's Ctrl-C, torchrun, Slurm). The step
    under way still needs its batches, so neither the helpers nor the loader processes may end by it. They inherit the
    mask, so there is no moment in which they could; one that comes to the trainer meanwhile is kept until afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # each time: the tracker's start unblocks two
            start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Parcels(IterableDataset[Parcel]):
    """What loader processes iterate over: a dataset's items, packed before they are queued."""

    def __init__(self, dataset: TrainCrops | WholeImages) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Parcel]:
        return map(Parcel, self.dataset)


def _loader(dataset: TrainCrops | WholeImages, device: torch.device) -> DataLoader[Any]:
    workers = dataset.config.workers
    pin_memory = device.type == "cuda"
    if not workers:
        return DataLoader(dataset, batch_size=None, pin_memory=pin_memory)  # an item is already a batch
    use_own_temporary_folder()
    # A forked copy of a process with threads (autograd, NCCL, gloo) can deadlock. The fork server is a clean
    # process instead; it imports torch once, its children start in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.data.crops"])
    _start_helpers()
    # No timeout: with one, torch no longer looks every five seconds whether its workers live.
    return DataLoader(_Parcels(dataset), batch_size=None, num_workers=workers,
                      prefetch_factor=dataset.config.prefetch_batches, multiprocessing_context=context,
                      worker_init_fn=_start_worker, pin_memory=pin_memory)
