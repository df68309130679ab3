"""Prefetch spans of samples, within a memory budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from shards.reader import ShardReader

_REQUESTS_AT_ONCE = 16
_Item = TypeVar("_Item")


@dataclass
class _Held:
    data: Future[dict[int, bytes]]
    size: int
    unused: int


class ReadAhead:
    """Holds requested spans, and drops each once all its samples were taken.

    At most `budget` bytes are held or being fetched, except that the span needed next is always fetched. A span that is
    evicted to make room is fetched again later.
    """

    def __init__(self, reader: ShardReader, budget: int) -> None:
        self.reader, self.budget = reader, budget
        self._spans: OrderedDict[Hashable, _Held] = OrderedDict()
        self._total = 0
        self._threads = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="read-ahead")

    def ask(self, span: Hashable, samples: Callable[[], Iterable[int]]) -> None:
        """Start fetching a span, unless it is held already or would exceed the budget."""
        if span not in self._spans:
            numbers = [int(number) for number in samples()]
            if self._total + self.reader.bytes_of(_distinct(numbers)) <= self.budget:
                self._begin(span, numbers)

    def take(self, span: Hashable, samples: Callable[[], Iterable[int]], number: int) -> bytes:
        """The bytes of one sample of a span. Re-raises errors of the fetch."""
        if span not in self._spans:
            numbers = [int(number) for number in samples()]
            self._make_room(self.reader.bytes_of(_distinct(numbers)))
            self._begin(span, numbers)
        held = self._spans[span]
        try:
            data = held.data.result()[number]
        except BaseException:
            self._drop(span)
            raise
        held.unused -= 1
        if held.unused:
            self._spans.move_to_end(span)
        else:
            self._drop(span)
        return data

    def close(self) -> None:
        """Drop all spans; waits for running requests."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._spans.clear()

    def _begin(self, span: Hashable, numbers: Sequence[int]) -> None:
        once = _distinct(numbers)
        held = _Held(self._threads.submit(lambda: dict(zip(once, self.reader.fetch(once), strict=True))),
                     self.reader.bytes_of(once), len(numbers))
        self._spans[span] = held
        self._total += held.size

    def _make_room(self, size: int) -> None:
        while self._spans and self._total + size > self.budget:
            self._drop(next(iter(self._spans)))

    def _drop(self, span: Hashable) -> None:
        held = self._spans.pop(span)
        if not held.data.cancel():
            wait([held.data])  # already running: its bytes will arrive anyway, and must not exceed the budget
        self._total -= held.size


def _distinct(numbers: Sequence[int]) -> list[int]:
    """Without the copies of samples that a plan repeats."""
    return list(dict.fromkeys(numbers))


def look_ahead(items: Iterable[_Item], count: int, see: Callable[[_Item], None]) -> Iterator[_Item]:
    """Yield the items, calling `see` on each `count` items before it is yielded."""
    waiting: list[_Item] = []
    for item in items:
        see(item)
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.pop(0)
    yield from waiting
