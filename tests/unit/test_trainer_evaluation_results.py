"""Files of an evaluation: written last to first in importance, nothing stale among them; where they go by default."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shards.cli.config_file import config_to_dict
from shards.files.strict_json import to_json
from shards.manifest import ClassInfo
from trainer.config import EvalConfig
from trainer.data.whole_images import LabelledImage
from trainer.distributed import DistContext
from trainer.evaluation import results
from trainer.evaluation.counts import BINS, Counts
from trainer.evaluation.image_scores import ImageScores, ScoredImages
from trainer.evaluation.record import measured, metrics_record, usual_folder
from trainer.evaluation.reliability import reliability_picture, short_count
from trainer.evaluation.results import write_pictures, write_results

CLASSES = [ClassInfo(name=name, color=(9 * number, 0, 0)) for number, name in enumerate("abc")]
MODEL = {"head": "1" * 64, "backbone": "2" * 64, "eval": config_to_dict(EvalConfig(tta_flip=True))}


class Images(list[LabelledImage]):
    classes = CLASSES


def evaluation(confidence: float | None = 0.8) -> tuple[Images, dict[str, Any], ScoredImages]:
    """Three images, the first of which is predicted best: images, metrics and scores."""
    images, total, scores = Images(), Counts(3, 255), ImageScores("val")
    for number in range(3):
        label = torch.zeros(8, 8, dtype=torch.uint8)
        pred = label.clone()
        pred[: 2 * number] = 1
        counts = Counts(3, 255)
        counts.add_image(label, pred, None if confidence is None else torch.full((8, 8), confidence))
        total.merge(counts)
        scores.add(number, f"key {number}", counts)
        images.append(LabelledImage(number=number, key=f"key {number}", image=torch.zeros(3, 8, 8, dtype=torch.uint8),
                                    label_map=label))
    context = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
    return images, total.summary(), scores.gather(context, 3)


def write(output: Path, confidence: float | None = 0.8, panels: int = 1) -> list[str]:
    images, metrics, scored = evaluation(confidence)
    asked: list[Tensor] = []

    def predict(image: Tensor) -> Tensor:
        asked.append(image)
        return torch.zeros(8, 8, dtype=torch.uint8)

    names = write_results(output, metrics, scored, CLASSES, False)
    names += write_pictures(output, metrics, scored, images, predict, panels)  # type: ignore[arg-type]
    assert len(asked) == 2 * panels
    return names


def test_what_is_not_written_this_time_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(first) and "images.parquet" in first
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    second = write(tmp_path, confidence=None, panels=0)
    assert set(first) - set(second) == {"images.parquet", "panels.png", "calibration.png"}
    assert {path.name for path in tmp_path.iterdir()} == set(second)


def test_metrics_come_after_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, it leaves no metrics beside tables of an earlier evaluation."""
    written: list[str] = []
    monkeypatch.setattr(results, "write_atomically", lambda path, data: written.append(path.name))
    _, metrics, scored = evaluation()
    write_results(tmp_path, metrics, scored, CLASSES, False)
    assert written[-1] == "metrics.json" and len(written) == 5


def pixel(picture: Image.Image, bin_number: int, height: float) -> Any:
    """Within a bin's bar, at a height from 0 to 1."""
    return picture.getpixel((46 + bin_number * 32 + 10, 34 + round(320 * (1 - height))))


def test_the_picture_of_the_calibration() -> None:
    empty = (0.0, float("nan"), float("nan"))
    calibration: Sequence[Sequence[float]] = [empty] * (BINS - 2) + [(0.25, 0.4, 0.9), (0.75, 0.8, 0.97)]
    picture = reliability_picture(calibration, 0.2345, 4000)
    for number, accuracy, confidence in ((BINS - 2, 0.4, 0.9), (BINS - 1, 0.8, 0.97)):
        inside, above, mark = (pixel(picture, number, place) for place in (accuracy - 0.03, accuracy + 0.03,
                                                                           confidence))
        assert inside != above and mark not in (inside, (255, 255, 255))
    assert pixel(picture, 3, 0.1) == (255, 255, 255)
    other = reliability_picture(calibration, 0.2345, 4_000_000)
    assert np.any(np.asarray(picture) != np.asarray(other)), "the numbers of pixels are told"


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (9949, "9.9k"), (9950, "10k"),
                                             (35_499, "35k"), (4_100_000, "4.1M"), (2 * 10**9, "2.0G")])
def test_counts_are_short(count: int, text: str) -> None:
    assert short_count(count) == text


def test_where_results_go_by_default(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert usual_folder(tmp_path / "run/checkpoints/best.pt") == tmp_path / "run/evaluation"
    assert usual_folder(tmp_path / "best.pt") == tmp_path / "evaluation", "not beside the folder of a lone file"
    for name in ("run", "run/checkpoints"):
        assert usual_folder(tmp_path / name) == tmp_path / name / "evaluation", "of an export"


def test_what_was_measured_is_told_only_of_the_same_weights(tmp_path: Path) -> None:
    _, metrics, _ = evaluation()
    record = metrics_record(metrics, model=MODEL, split="val", is_folder=False, step=3, checkpoint=Path("best.pt"))

    def read(**changes: Any) -> Any:
        (tmp_path / "metrics.json").write_text(to_json({**record, **changes}))
        return measured(tmp_path, MODEL)

    found = read()
    assert found.metrics == {name: metrics[name] for name in ("mIoU", "aAcc", "mAcc")}
    assert (found.images, found.split, found.settings.tta_flip) == (3, "val", True)
    nothing = {"mIoU": None, "aAcc": None, "mAcc": None}
    for changes in ({"model": {**MODEL, "head": "3" * 64}}, {"model": {**MODEL, "backbone": "3" * 64}},
                    {"model": {**MODEL, "eval": {"mode": "guess"}}}, {"model": None}, {"model": {}}, nothing,
                    {"source": "folder"}, {"images": "many"}):
        assert read(**changes) is None
    for text in ("", "[]", json.dumps({"mIoU": 1.0, "step": 3})):
        (tmp_path / "metrics.json").write_text(text)
        assert measured(tmp_path, MODEL) is None
    assert measured(tmp_path / "nowhere", MODEL) is None
