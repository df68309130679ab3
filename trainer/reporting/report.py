"""`<run>/report.html`: a run on one self-contained page, which can be viewed anywhere without network access."""

from __future__ import annotations

import base64
import io
import platform
import re
import time
import warnings
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shards.cli.config_file import config_to_yaml
from shards.files.atomic import write_atomically
from shards.manifest import Manifest
from shards.shown_text import masked_value, shown, shown_lines
from trainer.config import RunConfig
from trainer.data.sources import configured_shares
from trainer.data_config import DataConfig
from trainer.distributed import DistContext
from trainer.reporting.charts import Chart, Series, colors, smooth, svg_uri, usual_top
from trainer.reporting.plots import miou_lines, series_points
from trainer.reporting.run_logger import PICTURES_NAME, read_evaluation, read_metrics
from trainer.reporting.state import RunState, format_duration, read_state
from trainer.reporting.versions import versions

REPORT_NAME = "report.html"
_SECTIONS = ("Curves", "Classes", "Confused pairs", "Pictures", "Events", "Data", "Code and machine", "Configuration")
_LAYER = re.compile(r"loss_(.+?)(?:_(\d+))?")  # loss_dice_3: of layer 3; loss_dice: of the last one


def write_report(folder: Path, config: RunConfig, manifest: Manifest, context: DistContext) -> None:
    """Write the report of the run in `folder` from the files there. A failure is a warning and never ends a run."""
    try:
        page = _page(folder, config, manifest, context)
        write_atomically(folder / REPORT_NAME, page.encode())
    except Exception as error:  # noqa: BLE001  the page has many inputs, any of which may have been damaged
        warnings.warn(f"{folder / REPORT_NAME} could not be written: {error!r}", stacklevel=2)


def _page(folder: Path, config: RunConfig, manifest: Manifest, context: DistContext) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("trainer", "reporting"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"shown": shown, "anchor": lambda title: title.lower().replace(" ", "-")}
    records, state, evaluation = read_metrics(folder), read_state(folder), read_evaluation(folder)
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    return environment.get_template("report.html.j2").render(
        name=folder.resolve().name, style=_style(), sections=_SECTIONS, state=state,
        moment=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(state.updated)) if state is not None else None,
        tiles=_tiles(state, train, val),
        charts=[(chart.title, uri) for chart in _charts(train, miou_lines(records, "most frequent class everywhere"))
                if (uri := svg_uri(chart)) is not None],
        classes=manifest.classes, val_split=config.data.val_split, **_evaluation(evaluation, manifest, config),
        pictures=_pictures(folder), events=[record for record in records if record["kind"] == "event"],
        data=_data(config, manifest), splits=manifest.splits, machine=_machine(context, state),
        configuration=shown_lines(config_to_yaml(config)),
    )


def _style() -> str:
    return resources.files("trainer").joinpath("reporting/report.css").read_text(encoding="utf-8")


def _tiles(state: RunState | None, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> dict[str, str]:
    """Label -> value of the key figures at the top of the page."""
    tiles: dict[str, str] = {}
    if state is not None:
        tiles[f"of {state.total_steps} steps"] = f"{state.step}"
    if val:
        best = max(val, key=lambda record: record["mIoU"] if record["mIoU"] == record["mIoU"] else -1)
        tiles[f"best mIoU, step {best['step']}"] = f"{best['mIoU']:.4f}"
        tiles[f"mIoU, step {val[-1]['step']}"] = f"{val[-1]['mIoU']:.4f}"
    for label, key in (("training loss", "loss"), ("images per second", "images_per_second"),
                       ("GB of memory", "memory_gb")):
        if train and key in train[-1]:
            tiles[label] = f"{train[-1][key]:.3g}"
    if state is not None and state.status == "running" and state.seconds_left is not None:
        tiles["remaining"] = format_duration(state.seconds_left)
    elif state is not None:
        tiles["elapsed"] = format_duration(state.updated - state.started)
    return tiles


def _charts(train: list[dict[str, Any]], miou: list[Series]) -> list[Chart]:
    blue = colors(1)[0]
    loss, norms = series_points(train, "loss"), series_points(train, "grad_norm")
    charts = [
        Chart(title="training loss, raw and smoothed", series=[
            Series(name="raw", points=loss, color=blue, faint=True),
            Series(name="loss", points=smooth(loss), color=blue)]),
        Chart(title="validation mIoU", top=1.0, series=miou),
    ]
    for term, layers in _losses_by_term(train).items():
        lines = [Series(name=name, points=smooth(series_points(train, key)), color=color)
                 for (name, key), color in zip(layers, colors(len(layers)), strict=True)]
        layer = "by layer, " if len(lines) > 1 else ""
        charts.append(Chart(title=f"{term.replace('_', ' ')} loss, {layer}smoothed", series=lines))
    charts.append(Chart(title="gradient norm before clipping, spikes cut", top=usual_top(norms),
                        series=[Series(name="gradient norm", points=norms, color=blue)]))
    for title, key in (("learning rate", "lr"), ("images per second", "images_per_second"),
                       ("share of time waiting for data", "data_wait_share"), ("memory, GB", "memory_gb"),
                       ("loss scale (fp16)", "loss_scale")):
        charts.append(Chart(title=title, series=[Series(name=title, points=series_points(train, key), color=blue)]))
    return charts


def _losses_by_term(train: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Loss term -> (layer, key in the record), in layer order; the key without a number is the last layer's."""
    terms: dict[str, list[tuple[float, str]]] = {}
    for key in train[-1] if train else ():
        match = _LAYER.fullmatch(key)
        if match:
            terms.setdefault(match[1], []).append((float(match[2] or "inf"), key))
    return {term: [("last" if layer == float("inf") else f"layer {layer:.0f}", key) for layer, key in sorted(layers)]
            for term, layers in terms.items()}


def _evaluation(evaluation: dict[str, Any] | None, manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    """Template values for classes and confused pairs."""
    if evaluation is None:
        return {"evaluation": None, "means": "", "absent": 0, "class_rows": [], "confused_pairs": []}
    occurring = [(iou, number) for number, iou in enumerate(evaluation["per_class_iou"]) if iou == iou]  # not NaN
    pixels = manifest.split(config.data.val_split).class_pixels
    return {
        "evaluation": evaluation,
        "means": ", ".join(f"{name} {evaluation[name]:.4f}"
                           for name in ("mIoU", "aAcc", "mAcc", "mDice", "mPrecision", "mRecall")),
        "absent": len(evaluation["per_class_iou"]) - len(occurring),
        "class_rows": [{"number": number, "iou": iou, "share": pixels[number] / max(1, sum(pixels))}
                       for iou, number in sorted(occurring, key=lambda pair: (-pair[0], pair[1]))],
        "confused_pairs": evaluation["confused_pairs"],
    }


def _pictures(folder: Path) -> list[dict[str, Any]]:
    """The last validation's panels and the first batch."""
    pictures = []
    for prefix, title in (("val-panels", "Validation: image, truth, prediction"), ("first-batch", "The first batch")):
        paths = sorted((folder / PICTURES_NAME).glob(f"{prefix}-*.png"))
        if paths:
            picture: dict[str, Any] = {"title": title, "step": int(paths[-1].stem.rpartition("-")[2]), "uri": None}
            try:
                picture["uri"] = _data_uri(paths[-1])
            except (OSError, SyntaxError, ValueError) as error:  # raised by Pillow for a damaged PNG
                picture["problem"] = f"{paths[-1].name} cannot be read: {error}"
            pictures.append(picture)
    return pictures


def _data_uri(path: Path) -> str:
    """A picture as an inline JPEG, a quarter of the PNG's size."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data(config: RunConfig, manifest: Manifest) -> dict[str, str]:
    return {"dataset": manifest.dataset, "root": masked_value(str(config.data.root)),
            "manifest sha256": manifest.sha256,
            "classes": str(manifest.num_classes), "ignored label": str(manifest.ignore_index),
            "written by": ", ".join(f"{name} {version}" for name, version in manifest.producer.items()),
            **_trained_on(config.data)}


def _trained_on(config: DataConfig) -> dict[str, str]:
    """Each entry of `data.sources`, with its share of the training samples."""
    return {f"data.sources[{number}]": f"{masked_value(str(source.root))}, split {source.split}: {share:.2%} of the "
                                       "training samples"
            for number, (source, share) in enumerate(configured_shares(config))}


def _machine(context: DistContext, state: RunState | None) -> dict[str, str]:
    cuda = context.device.type == "cuda"
    return {**versions(), "transformers": metadata.version("transformers"), "Python": platform.python_version(),
            "device": torch.cuda.get_device_name(context.device) if cuda else platform.machine() + " CPU",
            "ranks": str(context.world_size), "host of rank 0": state.host if state is not None else platform.node(),
            "system": platform.platform()}
