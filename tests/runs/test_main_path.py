"""How many functions lie between the command line and the loss."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.support.training_run import TINY
from trainer import train
from trainer.loss.mask_classification_loss import MaskClassificationLoss

MOST_FUNCTIONS = 6


def test_six_functions_lead_from_the_command_line_to_the_loss(scene_shards: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    real, walked = MaskClassificationLoss.step, []

    def step(self: MaskClassificationLoss, *arguments: Any) -> Any:
        stack = traceback.extract_stack()[:-1]
        walked.append([f"{Path(frame.filename).stem}.{frame.name}" for frame in stack
                       if Path(frame.filename).is_relative_to(REPOSITORY / "trainer")] + ["step"])
        return real(self, *arguments)

    monkeypatch.setattr(MaskClassificationLoss, "step", step)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(TINY), f"data.root={scene_shards}",
                                      f"output_dir={tmp_path / 'run'}", "train.total_steps=1", "eval.max_images=1"])
    assert train.main() == 0
    assert walked[0] == ["train.main", "loop.train", "loop.run_steps", "loop.train_step", "criterion.forward", "step"]
    assert len(walked[0]) <= MOST_FUNCTIONS
