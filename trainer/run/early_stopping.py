"""Early stopping: end a run once a metric of its evaluations has stopped to rise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig


@dataclass
class EarlyStopping:
    """Counts evaluations in a row without a rise of a metric; equal on all ranks, as the metrics are."""

    metric: str | None  # None: never stops
    patience: int = 1  # evaluations
    min_delta: float = 0.0  # a rise is more than this above the best
    best: float | None = None
    best_step: int = 0
    misses: int = 0

    @classmethod
    def of(cls, settings: TrainConfig) -> EarlyStopping:
        """As configured."""
        return cls(settings.early_stopping, settings.patience, settings.min_delta)

    @property
    def is_over(self) -> bool:
        """Whether the run should end."""
        return self.metric is not None and self.misses >= self.patience

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Count an evaluation. A metric that is NaN has not risen."""
        if self.metric is None:
            return
        value = metrics[self.metric]
        if math.isfinite(value) and (self.best is None or value > self.best + self.min_delta):
            self.best, self.best_step, self.misses = value, step, 0
        else:
            self.misses += 1

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps."""
        if self.metric is None:
            return None
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "misses": self.misses}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue counting; of another metric, or without a state, from the beginning."""
        if state is None or state["metric"] != self.metric:
            state = {"best": None, "best_step": 0, "misses": 0}
        self.best, self.best_step, self.misses = state["best"], state["best_step"], state["misses"]

    def reason(self) -> str:
        """Why the run ends, if `is_over`."""
        rise = f" by more than {self.min_delta:g}" if self.min_delta else ""
        best = "been defined" if self.best is None else f"risen{rise} above {self.best:.4f} (step {self.best_step})"
        return f"{self.metric} has not {best} for {self.misses} evaluations (train.patience)"
