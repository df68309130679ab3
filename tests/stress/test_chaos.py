"""The short version of `python tests/stress/chaos.py --kills 50`: four minutes. Each kind alone is in
tests/runs/test_survival.py and tests/unit/test_trainer_run_checkpoint.py, which CI runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.chaos import KINDS, chaos

LATER = ("first seconds", "evaluation")  # they take long; tests/runs/test_survival.py has one of each


@pytest.mark.stress
def test_a_disturbed_run_ends_like_an_undisturbed_one(scene_shards: Path, tmp_path: Path) -> None:
    kinds = tuple(kind for kind in KINDS if kind not in LATER)
    account = chaos(scene_shards, tmp_path, kills=5, steps=260, seed=3, kinds=kinds)
    assert account.resumes == 5 and max(account.lost_steps) < 260
    assert set(kinds) - set(account.disturbed) <= {"full disk"}, "which not every machine can mount"
