"""Run tasks on the processes of this machine, or on a Ray cluster, behind one interface."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol

from preprocess.blocks import Interrupted
from preprocess.execution.tasks import Job, Task
from shards.errors import DatasetError
from shards.workers import exit_with_parent, use_own_temporary_folder

_POLL_SECONDS = 0.2


class Counts(NamedTuple):
    """Images done so far, and those that could not be used."""

    images: int = 0
    failed: int = 0


class Executor(Protocol):
    """Runs tasks; more may be submitted while results come."""

    workers: int
    shares_scratch: bool  # whether its workers see the job's scratch folder

    def submit(self, task: Task) -> None:
        """Run a task some time."""

    def finished(self, report: Callable[[Counts], object]) -> Iterator[tuple[Task, Any]]:
        """(task, result) of all submitted tasks, in any order; ends when none is left.

        `report` is called now and then. Raises what a task raises, after all others have stopped.
        """


class LocalExecutor:
    """Processes of this machine. A context manager; leaving it stops them."""

    shares_scratch = True

    def __init__(self, job: Job, workers: int) -> None:
        use_own_temporary_folder()
        self.workers = workers
        context = multiprocessing.get_context("spawn")  # image libraries may have threads, which do not survive a fork
        self._stop, self._counts = context.Event(), (context.Value("q", 0), context.Value("q", 0))
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (job, self._stop, *self._counts))
        self._waiting: dict[Future[Any], Task] = {}
        self._sigterm = contextlib.ExitStack()

    def __enter__(self) -> LocalExecutor:
        self._pool.__enter__()
        self._sigterm.enter_context(_interrupt_on_sigterm())
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        with self._sigterm:
            if kind is not None:
                self._stop.set()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, task: Task) -> None:
        """Queue a task for the next free process."""
        self._waiting[self._pool.submit(_run, task)] = task

    def finished(self, report: Callable[[Counts], object]) -> Iterator[tuple[Task, Any]]:
        """As in `Executor`. Raises DatasetError when a process dies."""
        try:
            while self._waiting:
                done, _ = wait(self._waiting, _POLL_SECONDS, FIRST_COMPLETED)
                report(Counts(*(count.value for count in self._counts)))
                for future in sorted(done, key=lambda future: future.exception() is not None):  # successes first
                    yield self._waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process died (killed, or out of memory). Finished blocks are kept: rerun the same command, "
                "with fewer --workers if memory ran out"
            ) from error


class InlineExecutor:
    """This process: no worker to start, one task after the other."""

    shares_scratch, workers = True, 1

    def __init__(self, job: Job) -> None:
        self._job, self._waiting = job, deque[Task]()
        self._counts = Counts()
        self._report: Callable[[Counts], object] = _ignore
        self._sigterm = contextlib.ExitStack()

    def __enter__(self) -> InlineExecutor:
        self._sigterm.enter_context(_interrupt_on_sigterm())
        return self

    def __exit__(self, *error: object) -> None:
        self._sigterm.close()

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self._waiting.append(task)

    def finished(self, report: Callable[[Counts], object]) -> Iterator[tuple[Task, Any]]:
        """As in `Executor`."""
        self._report = report
        while self._waiting:
            task = self._waiting.popleft()
            yield task, task.run(self._job, self)

    def image_done(self, failed: bool = False) -> None:
        """As in `Progress`."""
        self._counts = Counts(self._counts.images + 1, self._counts.failed + failed)
        self._report(self._counts)


def _ignore(counts: Counts) -> None:
    """Nobody asked for reports yet."""


class _SharedProgress:
    """Counts in memory that all processes share."""

    def __init__(self, stop: Any, images: Any, failed: Any) -> None:
        self._stop, self._images, self._failed = stop, images, failed

    def image_done(self, failed: bool = False) -> None:
        """As in `Progress`."""
        for count, is_one in ((self._images, True), (self._failed, failed)):
            if is_one:
                with count.get_lock():
                    count.value += 1
        if self._stop.is_set():
            raise Interrupted


_worker_state: tuple[Job, _SharedProgress]


def _start_worker(job: Job, stop: Any, images: Any, failed: Any) -> None:
    """Initialise a worker: store the job, leave Ctrl-C to the parent, exit when the parent does."""
    global _worker_state
    _worker_state = (job, _SharedProgress(stop, images, failed))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


def _run(task: Task) -> Any:
    return task.run(*_worker_state)


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Handle SIGTERM (sent by schedulers) like Ctrl-C, so that unfinished shards are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
