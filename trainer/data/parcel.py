"""Handing a batch from a loader process to the trainer: it arrives, or the worker raises.

torch shares tensors through /dev/shm, which containers often limit to 64 MB, and it does so in a queue's own thread,
where an error only prints a traceback and loses the batch. A parcel is packed before it is queued: tensors go into one
anonymous file in memory, which no mount limits, and the queue gets its descriptor. Where there is no such file (a limit
on file sizes or open files, a sandbox) the bytes themselves go through the queue's pipe, which is slower and said once.
"""

from __future__ import annotations

import functools
import logging
import math
import mmap
import os
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from shards.files.anonymous_file import write_anonymous_file

_log = logging.getLogger(__name__)
_ALIGNMENT = 64  # bytes between the starts of tensors, a cache line


class Packable(Protocol):
    """What can be sent: its tensors can be exchanged for notes of where they lie, and back."""

    def map_tensors(self, change: Callable[[Any], Any]) -> Self:
        """A copy with `change` applied to each tensor."""


class _Place(NamedTuple):
    """Where a tensor lies in a parcel's bytes. Dimensions are in the order of memory: pixels stay as decoded."""

    start: int
    dtype: torch.dtype
    shape: list[int]
    order: list[int]  # order[i]: the tensor's dimension that is i-th in memory


class Parcel:
    """An item on its way; unpickling one gives the item itself."""

    def __init__(self, item: Packable) -> None:
        pieces: list[memoryview | bytes] = []
        places = item.map_tensors(functools.partial(_add_tensor, pieces))
        self._contents: tuple[Any, ...]
        try:
            self._contents = (_from_file, places, _send_file(pieces))
        except OSError as error:
            self._contents = (_from_bytes, places, b"".join(pieces), error.strerror or repr(error))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._contents[0], self._contents[1:]


def _add_tensor(pieces: list[memoryview | bytes], tensor: Tensor) -> _Place:
    """Append the bytes of a tensor, and what fills them up to _ALIGNMENT."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order).contiguous()
    start, size = sum(map(len, pieces)), ordered.nbytes
    if size:
        pieces += [ordered.view(-1).view(torch.uint8).numpy().data, bytes((-size) % _ALIGNMENT)]
    return _Place(start, tensor.dtype, list(ordered.shape), order)


def _tensor_at(contents: mmap.mmap | bytearray, place: _Place) -> Tensor:
    """The tensor of a place, in the memory of `contents`."""
    count = math.prod(place.shape)
    flat = (torch.frombuffer(contents, dtype=place.dtype, count=count, offset=place.start) if count
            else torch.empty(0, dtype=place.dtype))
    return flat.view(place.shape).permute([place.order.index(dimension) for dimension in range(len(place.order))])


def _send_file(pieces: Sequence[memoryview | bytes]) -> Any:
    """A new file's descriptor, to be sent. Raises OSError."""
    descriptor = write_anonymous_file("maskstream-batch", pieces)
    try:
        return DupFd(descriptor)
    finally:
        os.close(descriptor)


def _from_file(places: Packable, descriptor: Any) -> Any:
    opened = descriptor.detach()
    try:
        contents = mmap.mmap(opened, 0) if os.fstat(opened).st_size else bytearray()
    finally:
        os.close(opened)
    return places.map_tensors(functools.partial(_tensor_at, contents))


def _from_bytes(places: Packable, contents: bytes, reason: str) -> Any:
    _warn_once(reason)
    return places.map_tensors(functools.partial(_tensor_at, bytearray(contents)))


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("warning: loader processes cannot share memory (%s), so batches go through a pipe, which is slower; "
                 "%s", reason, shared_memory_advice())


def shared_memory_advice() -> str:
    """What /dev/shm holds and what to change when processes cannot share memory."""
    try:
        found = os.statvfs("/dev/shm")
        size = f"{found.f_bavail * found.f_frsize >> 20} of {found.f_blocks * found.f_frsize >> 20} MB of /dev/shm free"
    except OSError:
        size = "no /dev/shm"
    return (f"there is {size}: start the container with a larger one (docker run --shm-size=8g; Kubernetes: an "
            "emptyDir with medium Memory at /dev/shm), raise ulimit -n and ulimit -f, or set data.workers=0")
