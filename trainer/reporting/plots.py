"""Pictures of a run: training curves, and the first batch as the model sees it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from shards.manifest import Manifest
from shards.picture import contact_sheet, overlay
from trainer.data.batch import Batch
from trainer.data.targets import label_map_from_segments, segment_map_from_masks
from trainer.reporting.charts import Chart, Series, colors, draw, new_figure, smooth, usual_top
from trainer.reporting.run_logger import read_metrics


def batch_panel(images: Tensor, batch: Batch, manifest: Manifest, limit: int = 8) -> Image.Image:
    """Augmented images uint8 [B,3,H,W] next to the batch's targets, as a quick visual check of the data."""
    colors = [info.color for info in manifest.classes]
    rows = []
    for image, target in list(zip(images, batch.targets(), strict=True))[:limit]:
        segments = target["segment_map"] if "segment_map" in target else segment_map_from_masks(target["masks"])
        label_map = label_map_from_segments(segments, target["labels"], manifest.ignore_index)
        pixels = image.permute(1, 2, 0).cpu().numpy()
        rows.append([pixels, overlay(pixels, label_map.cpu().numpy(), colors)])
    return contact_sheet(rows, [key[:40] for key in batch.keys[:limit]])


def draw_curves(run: Path) -> Path | None:
    """`<run>/curves.png`: loss, learning rate and validation mIoU over steps.

    None when nothing was logged, or, with a warning, when it cannot be drawn or written: a missing picture must not
    end a run.
    """
    path = run / "curves.png"
    try:
        return path if _draw(read_metrics(run), path) else None
    except Exception as error:  # noqa: BLE001
        warnings.warn(f"{path} could not be written: {error!r}", stacklevel=2)
        return None


def _draw(records: list[dict[str, Any]], path: Path) -> bool:
    train = [record for record in records if record["kind"] == "train"]
    if not any(record["kind"] in ("train", "val") for record in records):
        return False
    blue = colors(1)[0]
    loss = series_points(train, "loss")
    figure = new_figure((12, 3.5))
    charts = (
        Chart(title="training loss", top=usual_top(loss), series=[
            Series(name="raw", points=loss, color=blue, faint=True),
            Series(name="smoothed", points=smooth(loss), color=blue)]),
        Chart(title="learning rate", series=[Series(name="lr", points=series_points(train, "lr"), color=blue)]),
        Chart(title="validation mIoU", top=1.0, series=miou_lines(records, "most frequent class")),
    )
    for axes, chart in zip(figure.subplots(1, 3), charts, strict=True):
        draw(axes, chart)
        axes.set_xlabel("step")
    figure.savefig(path, dpi=120)
    return True


def miou_lines(records: list[dict[str, Any]], baseline: str) -> list[Series]:
    """Lines of the validation mIoU: of the model (of averaged and raw weights, if there are both), and the baseline."""
    found: dict[str, list[dict[str, Any]]] = {"averaged": [], "raw": []}
    for record in records:  # which weights "val" is of may change when a run is resumed
        kind = f"val_{record.get('weights', 'raw')}" if record["kind"] == "val" else record["kind"]
        for weights, of_them in found.items():
            if kind == f"val_{weights}":
                of_them.append(record)
    blue, orange, green = colors(3)
    names = {"averaged": ("averaged weights", blue), "raw": ("raw weights", green)}
    if not found["averaged"]:
        names = {"raw": ("model", blue)}
    val = [record for record in records if record["kind"] == "val"]
    return [*(Series(name=name, points=series_points(found[kind], "mIoU"), color=color)
              for kind, (name, color) in names.items()),
            Series(name=baseline, points=series_points(val, "baseline_mIoU"), color=orange)]


def series_points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have the key."""
    return [(record["step"], record[key]) for record in records if key in record]
