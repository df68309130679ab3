"""Follow tensors' memory through a computation, real or simulated: what is allocated for what, and until when.

Not torch.distributed._tools.MemTracker: that attributes memory by hooks on modules and optimisers, so it has no notion
of a loss, and it reports one peak where another batch size may have its peak elsewhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """Notes the storage of every tensor that an operator returns, for the phase of the computation that it belongs to.

    Memory within an operator, such as a convolution's workspace, is not seen.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """`existing`: tensors from before, of which operators may return views."""
        super().__init__()
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self._now = 0  # operators so far
        self._phase = ""
        self._phases: dict[str, tuple[int, int]] = {}  # when it begins and ends
        self._known: dict[int, int] = {}  # address of a living storage -> its number
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._parts: list[str] = []  # of each storage, by number
        self._sizes: list[int] = []
        self._begins: list[int] = []
        self._ends: dict[int, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, memory is allocated for this part."""
        begin, self._phase = self._now, name
        yield
        self._phase, self._phases[name] = "", (begin, self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._now += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def attribute(self, tensors: Iterable[Tensor], part: str) -> None:
        """Attribute the memory of tensors, all in use, to another part than the phase that allocated it."""
        for tensor in tensors:
            number = self._known.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._parts[number] = part

    def peaks(self) -> dict[str, dict[str, float]]:
        """For each phase: bytes of each part, at the moment of the phase when their sum is largest."""
        courses = {part: self._course(part) for part in dict.fromkeys(self._parts)}
        total = np.sum([*courses.values()], axis=0)
        found = {}
        for name, (begin, end) in self._phases.items():
            moment = begin + 1 + int(np.argmax(total[begin + 1 : end + 1])) if end > begin else begin
            found[name] = {part: float(course[moment]) for part, course in courses.items()}
        return found

    def _course(self, part: str) -> np.ndarray:
        """Bytes that a part has in use after each operator, float64 [operators + 1]."""
        change = np.zeros(self._now + 2)
        for number, (own, size, begin) in enumerate(zip(self._parts, self._sizes, self._begins, strict=True)):
            if own == part:
                change[begin] += size
                change[self._ends.get(number, self._now + 1)] -= size
        return change.cumsum()[:-1]

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._existing:
            return
        number = self._known[key] = len(self._sizes)
        self._parts.append(self._phase)
        self._sizes.append(storage.nbytes())
        self._begins.append(self._now)

        def freed(_: Any) -> None:
            self._ends[number] = self._now + 1  # after the last operator it was still there
            del self._known[key], self._refs[number]

        self._refs[number] = weakref.ref(storage, freed)
