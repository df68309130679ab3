"""Prefetching: copies on a stream of their own, waited for by the device before it uses them. With a fake of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.geometry import Move
from trainer.data.prefetch import Prefetch

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def batch(number: int) -> Batch:
    return Batch(number=number, keys=["a"], images=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
                 segment_maps=torch.zeros(1, 4, 4, dtype=torch.uint8), masks=None, labels=torch.zeros(2).long(),
                 counts=[2], photometric=None, valid=[(4, 4)], moves=[Move()], skipped=[])


class FakeCuda:
    """Notes what is asked of CUDA, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        fake, self.current = self, "kernels"

        class Stream:
            def __init__(self, name: str | torch.device) -> None:
                self.name = name if isinstance(name, str) else "copies"

            def wait_event(self, event: Any) -> None:
                fake.log.append(f"{self.name} waits for {event.what}")

        class Event:
            what = "nothing"

            def record(self, stream: Stream) -> None:
                self.what = f"what {stream.name} has by now"
                fake.log.append(f"event on {stream.name}")

            def synchronize(self) -> None:
                raise AssertionError("the host waits")

        @contextmanager
        def stream(of: Stream) -> Iterator[None]:
            before, fake.current = fake.current, of.name
            yield
            fake.current = before

        def copied_to(self: Batch, device: torch.device) -> Batch:
            fake.log.append(f"copy {self.number} on {fake.current}")
            return self.map_tensors(lambda tensor: tensor.as_subclass(Copied))

        class Copied(Tensor):
            def record_stream(self, stream: Any) -> None:
                fake.log.append(f"{self.dtype} is used on {stream.name}")

        self.copied = Copied
        for name, part in (("Stream", Stream), ("Event", Event), ("stream", stream),
                           ("current_stream", lambda device: Stream(fake.current))):
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(Batch, "copied_to", copied_to)


def test_a_batch_is_copied_beside_the_kernels_and_used_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, prefetch, first = FakeCuda(monkeypatch), None, batch(1)
    prefetch = Prefetch(CUDA)
    prefetch.start(first)
    assert cuda.log == ["copy 1 on copies", "event on copies"]
    cuda.log.clear()
    taken = prefetch.take(first)
    assert taken.number == 1 and isinstance(taken.images, cuda.copied)
    assert cuda.log[0] == "kernels waits for what copies has by now"
    assert sorted(cuda.log[1:]) == ["torch.int64 is used on kernels", *2 * ["torch.uint8 is used on kernels"]]


def test_what_was_not_begun_is_left_to_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rollback, batches of the same numbers come from another loader."""
    cuda = FakeCuda(monkeypatch)
    prefetch, same_number = Prefetch(CUDA), batch(1)
    prefetch.start(batch(1))
    assert prefetch.take(same_number) is same_number
    prefetch.start(same_number)
    prefetch.take(same_number)
    assert prefetch.take(same_number) is same_number, "a copy is used once"
    assert sum(entry.startswith("copy") for entry in cuda.log) == 2


def test_elsewhere_nothing_is_copied() -> None:
    prefetch, given = Prefetch(CPU), batch(1)
    prefetch.start(given)
    assert prefetch.take(given) is given
