"""Transfer a batch from a loader process to the trainer: either it arrives, or the worker raises.

torch shares tensors through /dev/shm, which containers often limit to 64 MB, and does so in the queue's feeder thread,
where an error only prints a traceback and loses the batch. A parcel is packed before it is queued: tensors go into one
anonymous memory file, which no mount limits, and the queue gets its descriptor. Where no such file can be created (a
limit on file sizes or open files, a sandbox), the bytes go through the queue's pipe, which is slower; a warning says so
once.
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
    """An item that can be sent: its tensors can be replaced by their locations in the parcel, and back."""

    def map_tensors(self, change: Callable[[Any], Any]) -> Self:
        """A copy with `change` applied to each tensor."""


class _Place(NamedTuple):
    """Location of a tensor in a parcel's bytes. Dimensions are in memory order, so pixels stay as decoded."""

    start: int
    dtype: torch.dtype
    shape: list[int]
    order: list[int]  # order[i]: the tensor's dimension that comes i-th in memory


class Parcel:
    """An item in transit; unpickling it yields the item itself."""

    def __init__(self, item: Packable) -> None:
        pieces: list[memoryview | bytes] = []
        packed = item.map_tensors(functools.partial(_add_tensor, pieces))
        self._contents: tuple[Any, ...]
        try:
            self._contents = (_from_file, packed, _send_file(pieces))
        except OSError as error:
            self._contents = (_from_bytes, packed, b"".join(pieces), error.strerror or repr(error))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._contents[0], self._contents[1:]


def _add_tensor(pieces: list[memoryview | bytes], tensor: Tensor) -> _Place:
    """Append a tensor's bytes, padded to a multiple of _ALIGNMENT."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order).contiguous()
    start, size = sum(map(len, pieces)), ordered.nbytes
    if size:
        pieces += [ordered.view(-1).view(torch.uint8).numpy().data, bytes((-size) % _ALIGNMENT)]
    return _Place(start, tensor.dtype, list(ordered.shape), order)


def _tensor_at(contents: mmap.mmap | bytearray, place: _Place) -> Tensor:
    """The tensor at a place, as a view of `contents`."""
    count = math.prod(place.shape)
    flat = (torch.frombuffer(contents, dtype=place.dtype, count=count, offset=place.start) if count
            else torch.empty(0, dtype=place.dtype))
    return flat.view(place.shape).permute([place.order.index(dimension) for dimension in range(len(place.order))])


def _send_file(pieces: Sequence[memoryview | bytes]) -> Any:
    """The descriptor of a new memory file with these bytes, ready to be sent. Raises OSError."""
    descriptor = write_anonymous_file("maskstream-batch", pieces)
    try:
        return DupFd(descriptor)
    finally:
        os.close(descriptor)


def _from_file(packed: Packable, descriptor: Any) -> Any:
    opened = descriptor.detach()
    try:
        contents = mmap.mmap(opened, 0) if os.fstat(opened).st_size else bytearray()
    finally:
        os.close(opened)
    return packed.map_tensors(functools.partial(_tensor_at, contents))


def _from_bytes(packed: Packable, contents: bytes, reason: str) -> Any:
    _warn_once(reason)
    return packed.map_tensors(functools.partial(_tensor_at, bytearray(contents)))


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("warning: loader processes cannot share memory (%s), so batches go through a pipe, which is slower; "
                 "%s", reason, shared_memory_advice())


def shared_memory_advice() -> str:
    """How much space /dev/shm has, and what to change when processes cannot share memory."""
    try:
        stat = os.statvfs("/dev/shm")
        size = f"{stat.f_bavail * stat.f_frsize >> 20} of {stat.f_blocks * stat.f_frsize >> 20} MB of /dev/shm free"
    except OSError:
        size = "no /dev/shm"
    return (f"there is {size}: start the container with a larger one (docker run --shm-size=8g; Kubernetes: an "
            "emptyDir with medium Memory at /dev/shm), raise ulimit -n and ulimit -f, or set data.workers=0")
