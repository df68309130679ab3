"""`<run>/report.html`: a run on one page, which opens anywhere, without network: all it shows is inside it."""

from __future__ import annotations

import base64
import html
import io
import math
import platform
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shards.config_file import config_to_yaml
from shards.files.atomic import write_atomically
from shards.manifest import Manifest
from shards.shown_text import masked_value, shown_lines
from trainer.config import RunConfig
from trainer.distributed import DistContext
from trainer.reporting.run_logger import PICTURES_NAME, read_evaluation, read_metrics
from trainer.reporting.state import RunState, format_duration, read_state
from trainer.reporting.svg_chart import Series, colors, html_text, line_chart
from trainer.reporting.versions import versions

REPORT_NAME = "report.html"
_SMOOTHING = 0.8  # of the loss curve drawn over the raw one
_LAYER = re.compile(r"loss_(.+?)(?:_(\d+))?")  # loss_dice_3: of layer 3; loss_dice: of the last one
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser then enforces what we promise
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: hsl(210 70% 52%); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .25rem; }
p, figcaption, nav { opacity: .8; margin: .25rem 0 .75rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: 1rem; } a { color: var(--accent); }
.status { font-size: .8rem; padding: .15rem .6rem; border-radius: 1rem; color: #fff; vertical-align: middle; }
.running, .finished { background: #2f855a; } .stopped { background: #b7791f; } .failed { background: #c53030; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600; } .tiles span { font-size: .8rem; opacity: .75; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.25rem 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font-size: 11px; opacity: .7; } svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
figcaption { font-size: .8rem; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .2rem 0 0; }
i { display: inline-block; width: .75rem; height: .75rem; margin-right: .35rem; border-radius: .2rem; }
td i { box-shadow: 0 0 0 1px var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: .8rem; font-weight: 600; opacity: .75; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; width: 1%; }
td.bar { width: 45%; } td.bar div { height: .7rem; border-radius: .2rem; background: var(--accent); min-width: 1px; }
.scroll { max-height: 40rem; overflow: auto; } .facts th { width: 13rem; } .facts + div { margin-top: 1rem; }
img { max-width: 100%; height: auto; border-radius: .4rem; display: block; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: .5rem; overflow: auto; font-size: .8rem; }
"""


def write_report(folder: Path, config: RunConfig, manifest: Manifest, context: DistContext) -> None:
    """Write the report of the run in `folder` from what lies there. A failure is a warning, never the end of a run."""
    try:
        page = _page(folder, config, manifest, context)
        write_atomically(folder / REPORT_NAME, page.encode())
    except Exception as error:  # noqa: BLE001  a page of so many parts, some of which others may have damaged
        warnings.warn(f"{folder / REPORT_NAME} could not be written: {error!r}", stacklevel=2)


def _page(folder: Path, config: RunConfig, manifest: Manifest, context: DistContext) -> str:
    records, state, evaluation = read_metrics(folder), read_state(folder), read_evaluation(folder)
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    sections = {
        "Curves": _curves(train, val),
        "Classes": _classes(evaluation, manifest, config.data.val_split),
        "Confused pairs": _confused_pairs(evaluation, manifest),
        "Pictures": _pictures(folder),
        "Events": _events(records),
        "Data": _data(config, manifest),
        "Code and machine": _facts(_machine(context, state)),
        "Configuration": f"<pre>{html.escape(shown_lines(config_to_yaml(config)))}</pre>",
    }
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    body = "".join(f'<h2 id="{_anchor(title)}">{title}</h2>{content}' for title, content in sections.items())
    name = html_text(folder.resolve().name)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head>\n<body>{_head(name, state, train, val)}<nav>{links}</nav>{body}"
            "</body></html>\n")


def _head(name: str, state: RunState | None, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> str:
    tiles: dict[str, str] = {}
    head = f"<h1>{name}</h1>"
    if state is not None:
        head = f'<h1>{name} <span class="status {state.status}">{state.status}</span></h1>'
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(state.updated))
        head += f"<p>As of {moment}. {html_text(state.message)}</p>"
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
        tiles["to go"] = format_duration(state.seconds_left)
    elif state is not None:
        tiles["since its start"] = format_duration(state.updated - state.started)
    return head + '<div class="tiles">' + "".join(f"<div><b>{value}</b><span>{label}</span></div>"
                                                  for label, value in tiles.items()) + "</div>"


def _curves(train: list[dict[str, Any]], val: list[dict[str, Any]]) -> str:
    blue, orange = colors(2)
    loss = _points(train, "loss")
    charts = [
        line_chart("training loss, raw and smoothed", [Series(name="raw", points=loss, color=blue, faint=True),
                                     Series(name="loss", points=_smooth(loss), color=blue)]),
        line_chart("validation mIoU", [
            Series(name="model", points=_points(val, "mIoU"), color=blue),
            Series(name="most frequent class everywhere", points=_points(val, "baseline_mIoU"), color=orange),
        ], top=1.0),
    ]
    for term, layers in _losses_by_term(train).items():
        lines = [Series(name=name, points=_smooth(_points(train, key)), color=color)
                 for (name, key), color in zip(layers, colors(len(layers)), strict=True)]
        layer = "by layer, " if len(lines) > 1 else ""
        charts.append(line_chart(f"{term.replace('_', ' ')} loss, {layer}smoothed", lines))
    norms = _points(train, "grad_norm")
    charts.append(line_chart("gradient norm before clipping, spikes cut", [
        Series(name="gradient norm", points=norms, color=blue)], top=_usual_top(norms)))
    for title, key in (("learning rate", "lr"), ("images per second", "images_per_second"),
                       ("share of time waiting for data", "data_wait_share"), ("memory, GB", "memory_gb")):
        charts.append(line_chart(title, [Series(name=title, points=_points(train, key), color=blue)]))
    return f'<div class="charts">{"".join(charts)}</div>' if train or val else "<p>Nothing was logged yet.</p>"


def _losses_by_term(train: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """term -> (layer, name in the record), in the order of layers; the one without a number is the last layer."""
    terms: dict[str, list[tuple[float, str]]] = {}
    for key in train[-1] if train else ():
        match = _LAYER.fullmatch(key)
        if match:
            terms.setdefault(match[1], []).append((float(match[2] or "inf"), key))
    return {term: [("last" if layer == float("inf") else f"layer {layer:.0f}", key) for layer, key in sorted(layers)]
            for term, layers in terms.items()}


def _points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if key in record]


def _usual_top(points: Sequence[tuple[float, float]]) -> float | None:
    """An axis that suits all but a hundredth of the values."""
    finite = sorted(value for _, value in points if math.isfinite(value))
    return 1.5 * finite[int(0.99 * (len(finite) - 1))] or None if finite else None


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean, with the bias of its start taken out (as Adam does)."""
    smooth, total, weight = [], 0.0, 0.0
    for step, value in points:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smooth.append((step, total / weight))
    return smooth


def _classes(evaluation: dict[str, Any] | None, manifest: Manifest, val_split: str) -> str:
    if evaluation is None:
        return "<p>Not evaluated yet.</p>"
    means = ", ".join(f"{name} {evaluation[name]:.4f}"
                      for name in ("mIoU", "aAcc", "mAcc", "mDice", "mPrecision", "mRecall"))
    found = [(iou, number) for number, iou in enumerate(evaluation["per_class_iou"]) if iou == iou]
    pixels = manifest.split(val_split).class_pixels
    rows = [[f'<td>{_class(manifest, number)}</td>', f'<td class="number">{iou:.4f}</td>',
             f'<td class="bar"><div style="width:{100 * iou:.1f}%"></div></td>',
             f'<td class="number">{pixels[number] / max(1, sum(pixels)):.2%}</td>']
            for iou, number in sorted(found, key=lambda pair: (-pair[0], pair[1]))]
    absent = len(evaluation["per_class_iou"]) - len(found)
    return (f"<p>Step {evaluation['step']}, split {html_text(val_split)}: {means}."
            + (f" {absent} classes were neither labelled nor predicted." if absent else "") + "</p>"
            + _table(["class", "#IoU", "", "#share of labelled pixels"], rows))


def _confused_pairs(evaluation: dict[str, Any] | None, manifest: Manifest) -> str:
    pairs = evaluation["confused_pairs"] if evaluation is not None else []
    if not pairs:
        return "<p>None are known: not evaluated yet, nothing confused, or more classes than pairs are kept for.</p>"
    rows = [[f"<td>{_class(manifest, pair['truth'])}</td>", f"<td>{_class(manifest, pair['prediction'])}</td>",
             f'<td class="number">{pair["pixels"]:,}</td>', f'<td class="number">{pair["share"]:.1%}</td>']
            for pair in pairs]
    return _table(["is", "was predicted as", "#pixels", "#share of its class"], rows)


def _class(manifest: Manifest, number: int) -> str:
    info = manifest.classes[number]
    red, green, blue = info.color
    return f'<i style="background:rgb({red} {green} {blue})"></i>{html_text(info.name)}'


def _pictures(folder: Path) -> str:
    """The last validation's panels and the first batch."""
    parts = []
    for prefix, what in (("val-panels", "Validation: image, truth, prediction"), ("first-batch", "The first batch")):
        found = sorted((folder / PICTURES_NAME).glob(f"{prefix}-*.png"))
        if found:
            step = int(found[-1].stem.rpartition("-")[2])
            try:
                shown = f'<img alt="{what}" src="{_data_uri(found[-1])}">'
            except (OSError, SyntaxError, ValueError) as error:  # pillow's, of a damaged PNG
                shown = html_text(f"{found[-1].name} cannot be read: {error}")
            parts.append(f"<h3>{what}, step {step}</h3><p>{shown}</p>")
    return "".join(parts) or "<p>There are none yet.</p>"


def _data_uri(path: Path) -> str:
    """A picture within the page; JPEG, a quarter of the PNG's size."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _events(records: list[dict[str, Any]]) -> str:
    rows = [[f'<td class="number">{record["step"]}</td>', f"<td>{html_text(str(record.get('what')))}</td>"]
            for record in records if record["kind"] == "event"]
    return _table(["#step", "what happened"], rows) if rows else "<p>None: one uninterrupted run.</p>"


def _data(config: RunConfig, manifest: Manifest) -> str:
    facts = {"dataset": manifest.dataset, "root": masked_value(str(config.data.root)),
             "manifest sha256": manifest.sha256,
             "classes": str(manifest.num_classes), "ignored label": str(manifest.ignore_index),
             "written by": ", ".join(f"{name} {version}" for name, version in manifest.producer.items())}
    rows = [[f"<td>{html_text(name)}</td>", f"<td>{html_text(split.kind)}</td>",
             *(f'<td class="number">{count:,}</td>' for count in (split.images, split.samples, len(split.shards)))]
            for name, split in manifest.splits.items()]
    return _facts(facts) + _table(["split", "holds", "#images", "#samples", "#shards"], rows)


def _machine(context: DistContext, state: RunState | None) -> dict[str, str]:
    cuda = context.device.type == "cuda"
    return {**versions(), "transformers": metadata.version("transformers"), "Python": platform.python_version(),
            "device": torch.cuda.get_device_name(context.device) if cuda else platform.machine() + " CPU",
            "ranks": str(context.world_size), "host of rank 0": state.host if state is not None else platform.node(),
            "system": platform.platform()}


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{html_text(name)}</th><td>{html_text(value)}</td></tr>"
                   for name, value in facts.items())
    return f'<table class="facts">{rows}</table>'


def _table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of ready cells; a title that begins with # is over numbers."""
    head = "".join(f'<th class="number">{title[1:]}</th>' if title.startswith("#") else f"<th>{title}</th>"
                   for title in titles)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
