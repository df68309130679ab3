"""Pictures of a run: curves of its record, the first batch as the model sees it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from shards.manifest import Manifest
from shards.picture import contact_sheet, overlay
from trainer.data.crops import Batch
from trainer.data.targets import label_map_from_segments, segment_map_from_masks
from trainer.reporting.run_logger import read_metrics

_SMOOTHING = 0.6  # of the loss curve drawn over the raw one


def batch_panel(images: Tensor, batch: Batch, manifest: Manifest, limit: int = 8) -> Image.Image:
    """Augmented images uint8 [B,3,H,W] beside the batch's targets, to see at a glance that the data is right."""
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

    None when nothing was logged, or, with a warning, when it cannot be drawn or written: a run that has all it needs
    does not end over a picture.
    """
    path = run / "curves.png"
    try:
        return path if _draw(read_metrics(run), path) else None
    except Exception as error:  # noqa: BLE001
        warnings.warn(f"{path} could not be written: {error!r}", stacklevel=2)
        return None


def _draw(records: list[dict[str, Any]], path: Path) -> bool:
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    if not train and not val:
        return False
    import matplotlib.figure  # costs a second to import, and only the end of a run draws

    figure = matplotlib.figure.Figure(figsize=(12, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    if train:
        steps = [record["step"] for record in train]
        _plot_loss(panels[0], steps, [record["loss"] for record in train])
        panels[1].plot(steps, [record["lr"] for record in train])
    if val:
        steps = [record["step"] for record in val]
        panels[2].plot(steps, [record["mIoU"] for record in val], marker="o", label="model")
        panels[2].plot(steps, [record["baseline_mIoU"] for record in val], linestyle=":", label="most frequent class")
        panels[2].set_ylim(0, 1)
        panels[2].legend()
    for panel, title in zip(panels, ("training loss", "learning rate", "validation mIoU"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def _plot_loss(panel: Any, steps: list[int], losses: list[float]) -> None:
    smooth, value = [], losses[0]
    for loss in losses:
        value = _SMOOTHING * value + (1 - _SMOOTHING) * loss
        smooth.append(value)
    panel.plot(steps, losses, alpha=0.3)
    panel.plot(steps, smooth)
    panel.set_ylim(0, float(np.percentile(losses, 99)) * 1.1)
