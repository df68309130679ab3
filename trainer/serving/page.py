"""A local page to try a model: drop an image, switch classes on and off, read the confidence at a point, download.

Everything is kept in one folder, which `trainer/app.py` removes at the end; gradio serves files from it alone. Nothing
is loaded from elsewhere: no fonts, no analytics, no sharing link.
"""

from __future__ import annotations

import html
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from shards.errors import MaskStreamError
from shards.files.atomic import write_atomically
from shards.files.plain_file import read_plain
from shards.looking.sheet import fitted, percent
from shards.picture import overlay
from shards.picture_file import open_picture
from shards.sample import decode_upright
from shards.shown_text import shown
from trainer.evaluation.prediction import Prediction
from trainer.out_of_memory import OutOfMemory
from trainer.pretrained import Pretrained

SHOWN = 1280  # pixels of the longer side of what the page shows
_SUFFIXES = [".jpg", ".jpeg", ".png"]
_SESSION_SECONDS = 3600  # that a prediction stays in memory without being used


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an upload may be."""

    megabytes: float
    megapixels: float


class Shown(NamedTuple):
    """A prediction, and its parts at the size at which the page shows them."""

    prediction: Prediction
    image: Any  # uint8 [h, w, 3]
    label_map: Any  # [h, w]


class Refused(MaskStreamError):
    """An upload that is not predicted; the message is for whoever uploaded it."""


def predict_upload(pretrained: Pretrained, path: Path, limits: Limits) -> Shown:
    """Predict an uploaded file, with confidences. Raises Refused, without the path of this machine in its text."""
    name = shown(path.name)
    try:
        data = read_plain(path, int(limits.megabytes * 1e6))
        with open_picture(data, name, ("JPEG", "PNG")) as header:
            pixels = header.width * header.height
            size = f"{header.width} x {header.height}"
        if pixels > limits.megapixels * 1e6:
            raise Refused(f"{name} is {size} = {pixels / 1e6:.1f} megapixels, legal: at most {limits.megapixels:g}; "
                          "make it smaller, or use trainer/predict.py")
        prediction = pretrained.predict(decode_upright(data, name), "confidence")
    except Refused:
        raise
    except (MaskStreamError, OutOfMemory, OSError) as error:
        raise Refused(str(error).replace(str(path), name)) from error
    height, width = prediction.label_map.shape
    return Shown(prediction, *fitted(prediction.image, prediction.label_map, min(SHOWN, max(height, width))))


def draw(found: Shown, visible: Collection[int], opacity: float) -> Image.Image:
    """The image under the colours of the visible classes."""
    classes = found.prediction.classes
    hidden = ~np.isin(found.label_map, list(visible))
    ids = np.where(hidden, len(classes), found.label_map.astype(np.int64))  # an id without a colour
    return Image.fromarray(overlay(found.image, ids, [info.color for info in classes], opacity))


def legend(found: Shown) -> str:
    """HTML: colour, name and share of each class that was predicted."""
    rows = "".join(
        f'<tr><td><span style="display:inline-block;width:1em;height:1em;background:rgb{area.color}"></span></td>'
        f"<td>{area.id}</td><td>{html.escape(shown(area.name))}</td><td>{percent(area.share)}</td></tr>"
        for area in found.prediction.areas())
    return f'<table class="legend">{rows}</table>'


def describe_point(found: Shown, x: int, y: int) -> str:
    """Class and confidence at a pixel of the picture shown. Markdown without markup, as names may hold anything."""
    prediction = found.prediction
    (height, width), (rows, columns) = prediction.label_map.shape, found.label_map.shape
    column, row = (min(int((place + 0.5) * full / small), full - 1)
                   for place, full, small in ((x, width, columns), (y, height, rows)))
    number = int(prediction.label_map[row, column])
    assert prediction.confidence is not None
    return (f"x {column}, y {row}: {number} {shown(prediction.classes[number].name)}, confidence "
            f"{float(prediction.confidence[row, column]):.3f}")


def build_page(pretrained: Pretrained, folder: Path, limits: Limits, title: str) -> gr.Blocks:
    """The page. Files for download are written below `folder`, which must be gradio's own (GRADIO_TEMP_DIR)."""
    names = [f"{number} {shown(info.name)}" for number, info in enumerate(pretrained.classes)]
    ids = {name: number for number, name in enumerate(names)}

    def upload(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return None, None, gr.update(choices=[], value=[]), "", "", gr.update(value=None, interactive=False)
        try:
            found = predict_upload(pretrained, Path(path), limits)
        except Refused as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        present = [names[area.id] for area in found.prediction.areas()]
        result = Path(path).with_name(f"{Path(path).stem}-classes.png")
        if not result.resolve().is_relative_to(folder.resolve()):
            raise gr.Error("the upload is not where uploads are kept", print_exception=False)
        write_atomically(result, found.prediction.png())
        picture = draw(found, ids.values(), 0.5)
        return (found, picture, gr.update(choices=present, value=present), legend(found), "",
                gr.update(value=str(result), interactive=True))

    def redraw(found: Shown | None, visible: list[str], opacity: float) -> Image.Image | None:
        return None if found is None else draw(found, {ids[name] for name in visible if name in ids}, opacity)

    def point(found: Shown | None, event: gr.SelectData) -> str:
        return "" if found is None else describe_point(found, *event.index)

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"## {html.escape(title)}")
        state = gr.State(time_to_live=_SESSION_SECONDS)
        with gr.Row():
            with gr.Column(scale=3):
                picture = gr.Image(label="prediction", interactive=False, format="png", elem_id="picture",
                                   buttons=["fullscreen"])
                told = gr.Textbox(label="class and confidence where you click", interactive=False, elem_id="point")
            with gr.Column(scale=1):
                file = gr.File(label=f"image: JPEG or PNG, at most {limits.megabytes:g} MB and {limits.megapixels:g} "
                               "megapixels", file_types=_SUFFIXES, type="filepath", elem_id="upload")
                opacity = gr.Slider(0, 1, 0.5, label="opacity", elem_id="opacity")
                classes = gr.CheckboxGroup(label="classes", elem_id="classes")
                table = gr.HTML()
                download = gr.DownloadButton("class ids (PNG)", interactive=False, elem_id="download")
        outputs = [state, picture, classes, table, told, download]
        file.upload(upload, file, outputs, api_visibility="private", concurrency_limit=1)
        file.clear(lambda: upload(None), None, outputs, api_visibility="private")
        classes.input(redraw, [state, classes, opacity], picture, api_visibility="private", show_progress="hidden")
        opacity.release(redraw, [state, classes, opacity], picture, api_visibility="private", show_progress="hidden")
        picture.select(point, state, told, api_visibility="private", show_progress="hidden")
    return page


def free_port() -> int:
    """A port on loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve(page: gr.Blocks, port: int, limits: Limits) -> str:
    """Serve the page on loopback in a thread; returns its address. Raises OSError when the port is taken."""
    page.queue(max_size=16, api_open=False)
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port or free_port(), share=False, inbrowser=False, quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(limits.megabytes * 1e6), allowed_paths=[], footer_links=[], enable_monitoring=False,
        ssr_mode=False, pwa=False, mcp_server=False, strict_cors=True, state_session_capacity=16,
        theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=".legend, .legend td { border: none; padding: 0 0.4em }")
    return address
