"""Copy the next micro-batch to the device while the one before is computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.batch import Batch


class _Copy(NamedTuple):
    """A micro-batch on its way to the device."""

    source: Batch
    copied: Batch
    arrived: torch.cuda.Event


class Prefetch:
    """One micro-batch at a time, from pinned memory, on a stream of its own. Only on CUDA; elsewhere nothing happens.

    On the stream of the kernels a copy would begin after all kernels queued before it, and those of its own batch
    after it: the device would not compute meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _Copy | None = None

    def start(self, batch: Batch) -> None:
        """Begin to copy a batch of the host that `take` will want next, instead of any begun before."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            copied = batch.copied_to(self._device)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._ahead = _Copy(batch, copied, arrived)

    def take(self, batch: Batch) -> Batch:
        """The batch on the device, for kernels queued from now on; or as it is, if `start` was not called for it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.source is not batch:
            return batch
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ahead.arrived)  # the device waits, not the host

        def used_here(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)  # or its memory, which belongs to the other stream, could be reused too early
            return tensor

        return ahead.copied.map_tensors(used_here)
