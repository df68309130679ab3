"""Handing a batch from a loader process to the trainer: it arrives, or the worker raises.

torch shares tensors through /dev/shm, which containers often limit to 64 MB, and it does so in a queue's own thread,
where an error only prints a traceback and loses the batch. A parcel is packed before it is queued, in one anonymous
file in memory that no mount limits, and what is queued is its descriptor. Where there is no such file (a limit on file
sizes or open files, a sandbox) the bytes themselves go through the queue's pipe, which is slower and said once.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, Protocol, Self

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_ALIGNMENT = 64  # bytes between the starts of arrays, a cache line
_IOV_MAX = 1024  # buffers in one call of writev


class Packable(Protocol):
    """What can be sent: its tensors can be exchanged for arrays of the same memory, and back."""

    def map_tensors(self, change: Callable[[Any], Any]) -> Self:
        """A copy with `change` applied to each tensor."""


class Parcel:
    """An item on its way; unpickling one gives the item itself. Raises OSError when it cannot be packed at all."""

    def __init__(self, item: Packable) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(item.map_tensors(_to_array), protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        self._contents: tuple[Any, ...]
        try:
            self._contents = (_from_file, *_write_file(head, arrays))
        except OSError as error:
            reason = f"{type(error).__name__}: {error.strerror or error}"
            self._contents = (_from_bytes, head, [bytes(array) for array in arrays], reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._contents[0], self._contents[1:]


def _write_file(head: bytes, arrays: Sequence[memoryview]) -> tuple[Any, int, list[int]]:
    """(descriptor to send, bytes of the head, bytes of each array): arrays first, each at a multiple of _ALIGNMENT."""
    descriptor = _anonymous_file()
    try:
        pieces: list[bytes | memoryview] = []
        for array in arrays:
            pieces += [array, bytes((-array.nbytes) % _ALIGNMENT)]
        _write_all(descriptor, [*pieces, head])
        return DupFd(descriptor), len(head), [array.nbytes for array in arrays]
    finally:
        os.close(descriptor)


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has such (Linux). Raises OSError."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("maskstream-batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Written, not mapped and copied: where memory is short, writing is an error and touching a page is a crash."""
    left = [memoryview(piece) for piece in pieces if len(piece)]
    while left:
        written = os.writev(descriptor, left[:_IOV_MAX])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def _from_file(descriptor: Any, head_size: int, sizes: Sequence[int]) -> Any:
    """The item, its tensors in the file's own memory."""
    opened = descriptor.detach()
    try:
        contents = memoryview(mmap.mmap(opened, 0))
    finally:
        os.close(opened)
    arrays, start = [], 0
    for size in sizes:
        arrays.append(contents[start : start + size])
        start += size + (-size % _ALIGNMENT)
    return _unpack(contents[start : start + head_size], arrays)


def _from_bytes(head: bytes, arrays: Sequence[bytes], reason: str) -> Any:
    _warn_once(reason)
    return _unpack(head, [bytearray(array) for array in arrays])


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("warning: loader processes cannot share memory (%s), so batches go through a pipe, which is slower; "
                 "%s", reason, shared_memory_advice())


def _unpack(head: bytes | memoryview, arrays: Sequence[memoryview | bytearray]) -> Any:
    item: Packable = pickle.loads(head, buffers=arrays)  # noqa: S301 - of our own child process
    return item.map_tensors(_to_tensor)


def _to_array(tensor: Tensor) -> tuple[Any, list[int]]:
    """(array in the order of the tensor's memory, dimensions in that order): pixels stay as they were decoded."""
    order = sorted(range(tensor.ndim), key=lambda dimension: tensor.stride(dimension), reverse=True)
    return tensor.permute(order).contiguous().numpy(), order


def _to_tensor(packed: tuple[Any, list[int]]) -> Tensor:
    array, order = packed
    tensor: Tensor = torch.from_numpy(array)
    return tensor.permute([order.index(dimension) for dimension in range(len(order))])


def shared_memory_advice() -> str:
    """What /dev/shm holds and what to change when processes cannot share memory."""
    try:
        found = os.statvfs("/dev/shm")
        size = f"{found.f_bavail * found.f_frsize >> 20} of {found.f_blocks * found.f_frsize >> 20} MB of /dev/shm free"
    except OSError:
        size = "no /dev/shm"
    return (f"there is {size}: start the container with a larger one (docker run --shm-size=8g; Kubernetes: an "
            "emptyDir with medium Memory at /dev/shm), raise ulimit -n and ulimit -f, or set data.workers=0")
