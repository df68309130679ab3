"""No labelled pixels, and non-finite numbers: refused at the start, null in all JSON, and still displayed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
import torch

from shards.errors import ConfigError
from shards.files.strict_json import nan_for_null, to_json
from shards.manifest import load_manifest, manifest_bytes
from tests.conftest import REPOSITORY
from trainer.config import RunConfig, load_run_config
from trainer.distributed import DistContext
from trainer.loop import train
from trainer.reporting.report import write_report
from trainer.reporting.run_logger import EVALUATION_NAME, METRICS_NAME, RunLogger, read_evaluation, read_metrics
from trainer.reporting.state import RunState, write_state

NAN, INF = math.nan, math.inf
ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))


def tiny(root: Path, run: Path, *overrides: str) -> RunConfig:
    return load_run_config(REPOSITORY / "tests" / "support" / "tiny.yaml",
                           [f"data.root={root}", f"output_dir={run}", *overrides])


def strict(text: str) -> Any:
    """Parse JSON as strictly as other languages do."""
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_null_where_a_number_is_not_finite() -> None:
    value = {"a": [1.5, NAN, (INF, -INF)], "b": {"c": NAN, "d": None}, "e": np.float64(NAN), "f": "NaN"}
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None, "d": None}, "e": None, "f": "NaN"}
    assert strict(to_json(value)) == expected
    assert strict(to_json(value, not_finite=str))["a"] == [1.5, "nan", ["inf", "-inf"]]
    assert repr(nan_for_null(strict(to_json({"a": [1.5, NAN]})))) == repr({"a": [1.5, NAN]})


def test_a_run_without_a_miou_is_recorded_shown_and_reported(scene_shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(scene_shards)
    logger = RunLogger(tmp_path, 0)
    logger.scalars(1, "train", {"loss": 1.0, "lr": 0.1, "grad_norm": INF, "images_per_second": 2.0})
    metrics = dict.fromkeys(("mIoU", "aAcc", "mAcc", "mDice", "mF1", "mPrecision", "mRecall", "baseline_mIoU"), NAN)
    logger.evaluation(1, {"raw": {**metrics, "per_class_iou": [NAN] * manifest.num_classes, "confused_pairs": []}})
    logger.close()
    write_state(tmp_path, RunState(status="finished", step=1, total_steps=1, world_size=1, host="h", pid=1, started=1.0,
                                   updated=2.0, seconds_per_step=NAN, best_miou=None, checkpoint=None))
    for line in (tmp_path / METRICS_NAME).read_text().splitlines():
        strict(line)
    assert strict((tmp_path / EVALUATION_NAME).read_text())["mIoU"] is None
    evaluation = read_evaluation(tmp_path)
    assert evaluation is not None and math.isnan(evaluation["mIoU"])
    assert [math.isnan(record["mIoU"]) for record in read_metrics(tmp_path) if record["kind"] == "val"] == [True]
    for option in ((), ("--json",)):
        status = run([sys.executable, str(REPOSITORY / "trainer/status.py"), str(tmp_path), *option],
                     capture_output=True, text=True, check=False)
        assert status.returncode == 0, status.stderr
    strict(status.stdout)
    write_report(tmp_path, tiny(scene_shards, tmp_path), manifest, ALONE)  # a failure would be a warning
    assert "mIoU nan" in (tmp_path / "report.html").read_text()


@pytest.fixture
def unlabelled(scene_shards: Path, tmp_path: Path) -> Path:
    """The scenes, as an older version would have published them with a fully ignored val split."""
    root = Path(shutil.copytree(scene_shards, tmp_path / "shards"))
    manifest = load_manifest(root)
    nothing = [0] * manifest.num_classes
    val = dataclasses.replace(manifest.splits["val"], class_pixels=nothing, class_samples=nothing,
                              classes=None)
    manifest = dataclasses.replace(manifest, splits={**manifest.splits, "val": val})
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))
    return root


def test_training_and_evaluation_refuse_a_val_split_without_a_labelled_pixel(unlabelled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split 'val' has no labelled pixel in its 5 samples.*data\.val_split"):
        train(tiny(unlabelled, tmp_path / "run"), ALONE)
    trained = tmp_path / "trained"
    train(tiny(unlabelled, trained, "data.val_split=train", "train.total_steps=1", "eval.max_images=1"), ALONE)
    result = run([sys.executable, str(REPOSITORY / "trainer/eval.py"), "--config", str(trained / "config.yaml"),
                  "--checkpoint", str(trained / "checkpoints/best.pt"), "data.val_split=val"],
                 capture_output=True, text=True, check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "split 'val' has no labelled pixel" in result.stderr
