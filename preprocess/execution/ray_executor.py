"""Run tasks on a Ray cluster (the extra `ray`). No Ray object holds a shard: a task writes them and returns counts."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from preprocess.execution.local_executor import Counts
from preprocess.execution.ray_address import check_ray_address
from preprocess.execution.tasks import Job, Task
from shards.errors import ConfigError, DatasetError, MaskStreamError

_POLL_SECONDS, _SEND_SECONDS = 0.2, 0.5
_RETRIES = 10  # of a task whose worker process or machine died
_QUEUED = 2  # tasks submitted for each CPU


class RayExecutor:
    """The CPUs of a Ray cluster. A context manager; leaving it cancels what is left."""

    shares_scratch = False

    def __init__(self, job: Job, address: str | None, workers: int | None) -> None:
        self._ray = _imported()
        self._joins = not self._ray.is_initialized()
        if self._joins:
            check_ray_address(address)
            try:
                self._ray.init(address=address, num_cpus=None if address else workers or None, log_to_driver=False,
                               include_dashboard=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"ray_address is {address!r}: {error}") from error
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._job = self._ray.put(job)
        self._counter = self._ray.remote(num_cpus=0)(_Counter).remote()
        self._task = self._ray.remote(max_retries=_RETRIES)(_run)
        self._queue: list[Task] = []
        self._running: dict[Any, Task] = {}

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._ray.kill(self._counter)
        if self._joins:
            self._ray.shutdown()

    def submit(self, task: Task) -> None:
        """Queue a task; it is handed to Ray when there is room."""
        self._queue.append(task)

    def finished(self, report: Callable[[Counts], object]) -> Iterator[tuple[Task, Any]]:
        """As in `Executor`. Raises DatasetError when a task's workers die again and again."""
        while self._queue or self._running:
            while self._queue and len(self._running) < _QUEUED * self.workers:
                task = self._queue.pop(0)
                self._running[self._task.remote(task, self._job, self._counter)] = task
            done, _ = self._ray.wait(list(self._running), timeout=_POLL_SECONDS)
            report(Counts(*self._ray.get(self._counter.read.remote())))
            for reference in done:
                task = self._running.pop(reference)
                yield task, self._result(reference, task)

    def _result(self, reference: Any, task: Task) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, MaskStreamError | OSError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            raise DatasetError(f"block {task.block.name} failed {_RETRIES + 1} times, as its worker died (killed, or "
                               f"out of memory): {error}. Finished blocks are kept: rerun the same command") from error


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"executor is ray, which is not installed ({error}): pip install 'maskstream[ray]'") from None


def _run(task: Task, job: Job, counter: Any) -> Any:
    """A task in a worker of the cluster."""
    with _SentProgress(counter) as progress:
        return task.run(job, progress)


class _Counter:
    """An actor that adds up what all workers have done."""

    def __init__(self) -> None:
        self._counts = Counts()

    def add(self, images: int, failed: int) -> None:
        """Count."""
        self._counts = Counts(self._counts.images + images, self._counts.failed + failed)

    def read(self) -> tuple[int, int]:
        """(images, failed)"""
        return self._counts.images, self._counts.failed


class _SentProgress:
    """Sends counts to the actor twice a second. What a worker counted before it was killed is counted again later."""

    def __init__(self, counter: Any) -> None:
        self._counter, self._images, self._failed, self._sent = counter, 0, 0, time.monotonic()

    def __enter__(self) -> _SentProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._send()

    def image_done(self, failed: bool = False) -> None:
        """As in `Progress`; Ray itself stops tasks."""
        self._images, self._failed = self._images + 1, self._failed + failed
        if time.monotonic() - self._sent > _SEND_SECONDS:
            self._send()

    def _send(self) -> None:
        self._counter.add.remote(self._images, self._failed)
        self._images = self._failed = 0
        self._sent = time.monotonic()
