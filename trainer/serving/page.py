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
from trainer.pretrained import Pretrained

SHOWN = 1280  # pixels of the longer side of what the page shows
_SUFFIXES = [".jpg", ".jpeg", ".png"]
_SESSION_SECONDS = 3600  # that a prediction stays in memory without being used
_SESSIONS = 16  # pages whose predictions stay in memory


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
    except (MaskStreamError, OSError) as error:
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
    """Class and confidence at a pixel of the picture shown, or at the nearest one: plain text."""
    prediction = found.prediction
    (height, width), (rows, columns) = prediction.label_map.shape, found.label_map.shape
    column, row = (min(max(int((place + 0.5) * full / small), 0), full - 1)
                   for place, full, small in ((x, width, columns), (y, height, rows)))
    number = int(prediction.label_map[row, column])
    assert prediction.confidence is not None
    return (f"x {column}, y {row}: {number} {shown(prediction.classes[number].name)}, confidence "
            f"{float(prediction.confidence[row, column]):.3f}")


class Actions:
    """What the page's controls do: each takes and returns values of components.

    Files for download are written beside the uploads, which are below `folder`. Raises gr.Error, which the page shows.
    """

    def __init__(self, pretrained: Pretrained, folder: Path, limits: Limits) -> None:
        self.pretrained, self.folder, self.limits = pretrained, folder, limits
        self.names = [f"{number} {shown(info.name)}" for number, info in enumerate(pretrained.classes)]
        self._ids = {name: number for number, name in enumerate(self.names)}

    def upload(self, path: str | None, opacity: float = 0.5) -> tuple[Any, ...]:
        """The upload, None if it was removed -> state, picture, classes, legend, text about a point, download."""
        if path is None:
            return None, None, gr.update(choices=[], value=[]), "", "", gr.update(value=None, interactive=False)
        try:
            found = predict_upload(self.pretrained, Path(path), self.limits)
        except Refused as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        present = [self.names[area.id] for area in found.prediction.areas()]
        result = self._write_ids(Path(path), found.prediction)
        return (found, draw(found, self._ids.values(), opacity), gr.update(choices=present, value=present),
                legend(found), "", gr.update(value=str(result), interactive=True))

    def redraw(self, found: Shown | None, visible: list[str], opacity: float) -> Image.Image:
        """The picture with some classes switched off."""
        return draw(_kept(found), {self._ids[name] for name in visible if name in self._ids}, opacity)

    def point(self, found: Shown | None, event: gr.SelectData) -> str:
        """Class and confidence where the picture was clicked."""
        return describe_point(_kept(found), *event.index)

    def _write_ids(self, upload: Path, prediction: Prediction) -> Path:
        result = upload.with_name(f"{upload.stem}-classes.png")
        if not result.resolve().is_relative_to(self.folder.resolve()):
            raise gr.Error("the upload is not where uploads are kept", print_exception=False)
        try:
            write_atomically(result, prediction.png())
        except OSError as error:
            raise gr.Error(f"the class ids cannot be kept for download: {error.strerror}",
                           print_exception=False) from error
        return result


def _kept(found: Shown | None) -> Shown:
    if found is None:
        raise gr.Error(f"there is no prediction here: drop an image. (One that was here is no longer kept, as it was "
                       f"not used for an hour, or {_SESSIONS} other pages are in use.)", print_exception=False)
    return found


def build_page(pretrained: Pretrained, folder: Path, limits: Limits, title: str) -> gr.Blocks:
    """The page. Files for download are written below `folder`, which must be gradio's own (GRADIO_TEMP_DIR)."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"## {html.escape(title)}")
        _connect(_lay_out(limits), Actions(pretrained, folder, limits))
    return page


class _Parts(NamedTuple):
    """The page's components."""

    state: gr.State
    picture: gr.Image
    told: gr.Textbox
    file: gr.File
    opacity: gr.Slider
    classes: gr.CheckboxGroup
    table: gr.HTML
    download: gr.DownloadButton


def _lay_out(limits: Limits) -> _Parts:
    """Make the components, in the Blocks that is open."""
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
    return _Parts(state, picture, told, file, opacity, classes, table, download)


def _connect(parts: _Parts, actions: Actions) -> None:
    """Say what happens when the components are used, one upload at a time."""
    results = [parts.state, parts.picture, parts.classes, parts.table, parts.told, parts.download]
    parts.file.upload(actions.upload, [parts.file, parts.opacity], results, api_visibility="private",
                      concurrency_limit=1)
    parts.file.clear(lambda: actions.upload(None), None, results, api_visibility="private")
    for changed in (parts.classes.input, parts.opacity.release):
        changed(actions.redraw, [parts.state, parts.classes, parts.opacity], parts.picture, api_visibility="private",
                show_progress="hidden")
    parts.picture.select(actions.point, parts.state, parts.told, api_visibility="private", show_progress="hidden")


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
        ssr_mode=False, pwa=False, mcp_server=False, strict_cors=True, state_session_capacity=_SESSIONS,
        theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=".legend, .legend td { border: none; padding: 0 0.4em }")
    return address
