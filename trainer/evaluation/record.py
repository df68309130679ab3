"""Where evaluations are put, and what `metrics.json` says: what was measured, by which settings, of which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.cli.config_file import config_from_dict
from shards.errors import ConfigError
from shards.files.outside_json import parse_json
from trainer.config import EvalConfig

METRICS_NAME = "metrics.json"
PUBLISHED = ("mIoU", "aAcc", "mAcc")
_FOLDER, _CHECKPOINTS = "evaluation", "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measurement on a split of a shard set.

    metrics   those of PUBLISHED that are finite
    images    how many there were
    settings  by which they were predicted
    """

    metrics: Mapping[str, float]
    images: int
    split: str
    settings: EvalConfig


def usual_folder(checkpoint: Path) -> Path:
    """Where the results of a checkpoint file or an export go by default: in the folder of its run, if it is in one's
    checkpoints/; else beside the file, or in the export."""
    if checkpoint.is_dir():
        return checkpoint / _FOLDER
    folder = checkpoint.parent
    return (folder.parent if folder.name == _CHECKPOINTS else folder) / _FOLDER


def metrics_record(metrics: Mapping[str, Any], *, model: Mapping[str, Any], split: str, is_folder: bool,
                   step: int | None, checkpoint: Path) -> dict[str, Any]:
    """The content of metrics.json; `model` is `trainer.pretrained.model_identity`, `is_folder`: not from shards."""
    return {**metrics, "step": step, "checkpoint": str(checkpoint), "split": split,
            "source": "folder" if is_folder else "shards", "model": dict(model)}


def measured(folder: Path, model: Mapping[str, Any]) -> Measured | None:
    """What metrics.json in a folder says about a model, given its identity; None if it says nothing, is about other
    weights, or not about a split of a shard set."""
    path = folder / METRICS_NAME
    try:
        record = parse_json(path.read_bytes(), str(path))
        of = record["model"]
        if record["source"] != "shards" or any(of[name] != model[name] for name in ("head", "backbone")):
            return None
        settings = config_from_dict(EvalConfig, of["eval"], str(path))
        metrics = {name: float(record[name]) for name in PUBLISHED
                   if type(record.get(name)) in (int, float) and math.isfinite(record[name])}
        found = Measured(metrics=metrics, images=int(record["images"]), split=str(record["split"]), settings=settings)
    except (OSError, ConfigError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return found if metrics else None
