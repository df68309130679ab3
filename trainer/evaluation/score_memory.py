"""How many rows of an image's scores fit into a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from trainer.evaluation.views import View
from trainer.models.outputs import Outputs
from trainer.models.resizing import Rows
from trainer.out_of_memory import OutOfMemory

_STEP = 16  # rows; the fewest in a band
_CACHED = 16 << 20  # bytes of a band's scores on the CPU: larger ones leave its caches, see benchmarks/evaluation.py
_FLOAT = 4


class ScoreMemory:
    """Memory that predicting an image takes beside the network's own, in bytes, for bands of a number of rows."""

    def __init__(self, views: Sequence[View], num_classes: int, outputs: Outputs, batch: int, *,
                 averages: bool) -> None:
        self.views, self.num_classes, self.batch = views, num_classes, batch
        tensors = list(cast(Mapping[str, Tensor], outputs).values())
        self.window_bytes = sum(tensor.nbytes for tensor in tensors)
        self.queries = max(tensor.shape[1] for tensor in tensors)  # for pixel heads: classes
        self.averages = averages

    def of_band(self, rows: int) -> int:
        """The scores of a band: one map per class for the sum of the views and for the softmax of one, two more to
        resize it, one for the sum and the part of a window each, and two maps per query."""
        full, widest = self.views[0].full[1], max(view.size[1] for view in self.views)
        window = max(window.size[1] for view in self.views for window in view.windows[:1])
        resized = 2 if any(view.size != view.full for view in self.views) else 0
        per_class = full * (2 + resized + 2 * self.averages) + widest + window
        return _FLOAT * rows * (self.num_classes * per_class + 2 * self.queries * window)

    def total(self, rows: int) -> int:
        """All of it: the pixels of all views, the outputs of the windows that a band needs, and its scores."""
        pixels = {id(view.pixels): view.pixels.nbytes for view in self.views}
        most = max(sum(len(view.needs(band)) for view in self.views) for band in self._bands(rows))
        return sum(pixels.values()) + (most + self.batch) * self.window_bytes + self.of_band(rows)

    def bands(self, budget: int) -> list[Rows]:
        """The bands, from top to bottom, with as many rows as fit. Raises OutOfMemory if the fewest do not."""
        rows = -(-self.views[0].full[0] // _STEP) * _STEP
        on_cpu = self.views[0].pixels.device == torch.device("cpu")
        while rows > _STEP and (self.total(rows) > budget or (on_cpu and self._row_bytes * rows > _CACHED)):
            rows = -(-rows // (2 * _STEP)) * _STEP
        if self.total(rows) > budget:
            height, width = self.views[0].full
            raise OutOfMemory(
                f"image of {width}x{height} pixels, {self.num_classes} classes, {len(self.views)} views: its pixels, "
                f"the network's outputs and {rows} rows of scores take {self.total(rows) / 1e9:.2f} GB, but "
                f"eval.memory_gb is {budget / 1e9:g}. Raise it; set eval.half_scores=true; lower eval.window_batch "
                f"(now {self.batch}); or use fewer or smaller views (eval.tta_ratios, eval.tta_flip, "
                "eval.resize_short_side)")
        return self._bands(rows)

    @property
    def _row_bytes(self) -> int:
        return _FLOAT * self.num_classes * self.views[0].full[1]

    def _bands(self, rows: int) -> list[Rows]:
        height = self.views[0].full[0]
        return [(first, min(first + rows, height)) for first in range(0, height, rows)]
