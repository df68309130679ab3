"""What an evaluation writes for people and programs to look at.

    metrics.json     all metrics, with intervals, confused pairs and the calibration
    classes.csv      a row per class
    images.jsonl     a row per image (see `shards.looking.image_scores`); images.csv, images.parquet: with IoU per class
    panels.png       the images with the lowest mIoU, then those with the highest: image, truth, prediction, classes
    calibration.png  accuracy against confidence (see `trainer.evaluation.reliability`)

What is not written this time does not stay from an earlier evaluation.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json
from shards.looking.image_scores import IMAGE_SCORES, ImageScore, encode_scores
from shards.looking.sheet import TILE, Row, fitted, legend_of, legend_sheet
from shards.manifest import ClassInfo
from shards.picture import encode_png, overlay
from shards.shown_text import shown
from trainer.data.whole_images import LabelledImage, ValidationImages
from trainer.evaluation.bootstrap import Intervals, bootstrap
from trainer.evaluation.image_scores import ScoredImages
from trainer.evaluation.record import METRICS_NAME
from trainer.evaluation.reliability import reliability_picture

_POOR = 0.5  # IoU below which a class is marked in the legend


def write_results(output: Path, metrics: dict[str, Any], scored: ScoredImages, classes: Sequence[ClassInfo],
                  absent_as_zero: bool) -> list[str]:
    """Write everything but the pictures; returns the names of the files. Parquet only where pyarrow is installed.

    The metrics come last: the tables beside them are never of an earlier evaluation.
    """
    output.mkdir(parents=True, exist_ok=True)
    intervals = bootstrap(scored.areas, absent_as_zero=absent_as_zero)
    scores = scored.scores()
    rows = list(_image_rows(scored, scores, classes))
    record = {**metrics, "mIoU_95": list(intervals.miou)}
    files = {"classes.csv": _as_csv(_class_rows(metrics, scored, classes, intervals)),
             IMAGE_SCORES: encode_scores(scores), "images.csv": _as_csv(rows), "images.parquet": _as_parquet(rows),
             METRICS_NAME: to_json(record, indent=1).encode()}
    return [name for name, data in files.items() if _write_or_remove(output / name, data)]


def write_pictures(output: Path, metrics: dict[str, Any], scored: ScoredImages, images: ValidationImages,
                   predict: Callable[[Tensor], Tensor], count: int) -> list[str]:
    """Write the panels of `count` worst and best images and the calibration; returns the names of the files."""
    drawn = {"panels.png": draw_extremes(scored, images, predict, count), "calibration.png": None}
    if metrics["ECE"] == metrics["ECE"]:
        drawn["calibration.png"] = reliability_picture(metrics["calibration"], metrics["ECE"],
                                                       int(scored.areas[:, 2].sum()))
    return [name for name, picture in drawn.items()
            if _write_or_remove(output / name, None if picture is None else encode_png(picture))]


def draw_extremes(scored: ScoredImages, images: ValidationImages, predict: Callable[[Tensor], Tensor],
                  count: int) -> Image.Image | None:
    """The `count` images with the lowest mIoU and the `count` with the highest; None without any.

    They are predicted again, by `predict`: uint8 [3, H, W] -> class ids [H, W].
    """
    ranked = sorted((score for score in scored.scores() if score.miou == score.miou),
                    key=lambda score: (score.miou, score.number))
    worst = ranked[:count]
    best = ranked[max(len(worst), len(ranked) - count):][::-1]
    if not worst:
        return None
    iou, rows = scored.iou(), []
    for title, chosen in (("worst", worst), ("best", best)):
        for place, score in enumerate(chosen):
            item = images[score.number]
            label_map = predict(item.image).cpu().numpy()
            caption = f"{title} {place + 1}: {score.key}, mIoU {score.miou:.3f}: image, truth, prediction"
            poor = {label for label, value in enumerate(iou[score.number].tolist()) if value < _POOR}
            rows.append(_row(item, label_map, images.classes, caption, poor))
    return legend_sheet(rows)


def _row(item: LabelledImage, prediction: Any, classes: Sequence[ClassInfo], caption: str, poor: set[int]) -> Row:
    pixels, truth = item.image.permute(1, 2, 0).numpy(), item.label_map.numpy()
    colors = [info.color for info in classes]
    image, small_truth = fitted(pixels, truth, TILE)
    _, small_prediction = fitted(pixels, prediction, TILE)
    predicted = set(np.unique(prediction).tolist())
    return Row(caption=caption, legend=legend_of(truth, classes, poor, predicted),
               pictures=[image, overlay(image, small_truth, colors), overlay(image, small_prediction, colors)])


def _class_rows(metrics: dict[str, Any], scored: ScoredImages, classes: Sequence[ClassInfo],
                intervals: Intervals) -> Iterable[dict[str, Any]]:
    _, pred, label = scored.areas.sum(0)
    for number, info in enumerate(classes):
        yield {
            "id": number, "name": shown(info.name),
            "IoU": metrics["per_class_iou"][number], "IoU_low": float(intervals.iou[number, 0]),
            "IoU_high": float(intervals.iou[number, 1]), "Acc": metrics["per_class_acc"][number],
            "Precision": metrics["per_class_precision"][number], "Dice": metrics["per_class_dice"][number],
            "BoundaryIoU": metrics["per_class_boundary_iou"][number],
            "labelled_pixels": int(label[number]), "predicted_pixels": int(pred[number]),
            "images": int((scored.areas[:, 2, number] > 0).sum()),
        }  # fmt: skip


def _image_rows(scored: ScoredImages, scores: Sequence[ImageScore],
                classes: Sequence[ClassInfo]) -> Iterable[dict[str, Any]]:
    names = [f"IoU {number} {shown(info.name)}" for number, info in enumerate(classes)]
    pixels = scored.areas[:, 2].sum(1).tolist()
    for score, labelled, iou in zip(scores, pixels, scored.iou().tolist(), strict=True):
        yield {"split": score.split, "number": score.number, "key": score.key, "labelled_pixels": labelled,
               "mIoU": score.miou, "aAcc": score.accuracy, **dict(zip(names, iou, strict=True))}


def _as_csv(rows: Iterable[dict[str, Any]]) -> bytes:
    """A table with a header; NaN is an empty cell."""
    text, writer = io.StringIO(newline=""), None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: "" if value != value else value for name, value in row.items()})
    return text.getvalue().encode()


def _as_parquet(rows: list[dict[str, Any]]) -> bytes | None:
    """A table; None without pyarrow. NaN is null."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    cleaned = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds[type(value)]) for name, value in rows[0].items()]) if rows else None
    buffer = io.BytesIO()  # not a path, which pyarrow would read as a URL if it looks like one
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cleaned, schema), buffer)
    return buffer.getvalue()


def _write_or_remove(path: Path, data: bytes | None) -> bool:
    """Whether there was something to write; otherwise the file does not stay."""
    if data is None:
        path.unlink(missing_ok=True)
        return False
    write_atomically(path, data)
    return True
