"""Fetch spans of samples before they are needed, within a fixed amount of memory."""

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
    """Holds spans that were asked for, and drops each when all its samples were taken.

    At most `budget` bytes are held or on their way, but always what is needed next: a span that has to make room for
    others is fetched again later.
    """

    def __init__(self, reader: ShardReader, budget: int) -> None:
        self.reader, self.budget = reader, budget
        self._spans: OrderedDict[Hashable, _Held] = OrderedDict()
        self._total = 0
        self._threads = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="read-ahead")

    def ask(self, span: Hashable, samples: Callable[[], Iterable[int]]) -> None:
        """Begin to fetch a span, unless it is held or would not fit."""
        if span not in self._spans:
            numbers = [int(number) for number in samples()]
            if self._total + self.reader.bytes_of(numbers) <= self.budget:
                self._begin(span, numbers)

    def take(self, span: Hashable, samples: Callable[[], Iterable[int]], number: int) -> bytes:
        """The bytes of one sample of a span. Raises what fetching raised."""
        if span not in self._spans:
            numbers = [int(number) for number in samples()]
            self._make_room(self.reader.bytes_of(numbers))
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
        """Forget everything; requests under way are awaited."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._spans.clear()

    def _begin(self, span: Hashable, numbers: Sequence[int]) -> None:
        held = _Held(self._threads.submit(lambda: dict(zip(numbers, self.reader.fetch(numbers), strict=True))),
                     self.reader.bytes_of(numbers), len(numbers))
        self._spans[span] = held
        self._total += held.size

    def _make_room(self, size: int) -> None:
        while self._spans and self._total + size > self.budget:
            self._drop(next(iter(self._spans)))

    def _drop(self, span: Hashable) -> None:
        held = self._spans.pop(span)
        if not held.data.cancel():
            wait([held.data])  # under way: its bytes will come, whoever wants them, and must not come on top
        self._total -= held.size


def look_ahead(items: Iterable[_Item], count: int, see: Callable[[_Item], None]) -> Iterator[_Item]:
    """The items, each shown to `see` `count` items before it comes."""
    waiting: list[_Item] = []
    for item in items:
        see(item)
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.pop(0)
    yield from waiting
