"""Visualise samples: colour a label map, overlay it on its image, arrange many on a contact sheet."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from shards.files.atomic import naming

Pixels = npt.NDArray[np.uint8]
Colors = Sequence[tuple[int, int, int]]

_IGNORED = (0, 0, 0)
_MARGIN = 6  # pixels between tiles
_CAPTION = 16  # pixels of height
_BAND = 256  # rows


def default_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` distinct colours: hues by the golden angle, so that consecutive ones differ most."""
    colors = []
    for index in range(count):
        lightness, saturation = (0.50, 0.65, 0.38)[index % 3], (0.75, 0.55)[index // 3 % 2]
        red, green, blue = colorsys.hls_to_rgb(index * 0.61803398875 % 1.0, lightness, saturation)
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colors


def colorize(label_map: npt.NDArray[Any], colors: Colors) -> Pixels:
    """Class ids `[H,W]` to RGB `[H,W,3]`; ids without a colour (ignored pixels) are black."""
    table = np.array([*colors, _IGNORED], np.uint8)
    return table[np.where(label_map < len(colors), label_map, len(colors)).astype(np.int64)]


def overlay(image: Pixels, label_map: npt.NDArray[Any], colors: Colors, alpha: float = 0.5) -> Pixels:
    """Blend class colours into the image; ignored pixels show the image, region borders are white."""
    mixed = np.empty_like(image)
    for first in range(0, len(image), _BAND):  # the intermediate results of a whole image may not fit in memory
        rows = slice(first, first + _BAND)
        ids = label_map[rows]
        blended = image[rows] * (1 - alpha) + colorize(ids, colors) * alpha
        mixed[rows] = np.where((ids < len(colors))[..., None], blended, image[rows])
        border = np.zeros(ids.shape, bool)
        border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        above = label_map[max(first - 1, 0) : first + len(ids) - 1]
        border[len(ids) - len(above) :] |= ids[len(ids) - len(above) :] != above
        mixed[rows][border] = 255
    return mixed


def save_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a JPEG or PNG, according to the end of the name; `options` are Pillow's. Raises OSError naming the file.

    Pillow itself goes by the suffix, but finds none in names such as "...png".
    """
    is_jpeg = path.name.lower().endswith((".jpg", ".jpeg"))
    with naming(path):
        picture.save(path, "JPEG" if is_jpeg else "PNG", **options)


def encode_png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def contact_sheet(rows: Sequence[Sequence[Pixels]], captions: Sequence[str] = (), tile: int = 256) -> Image.Image:
    """Rows of pictures, each fitted into a `tile` x `tile` square (pixels), with a caption below each row."""
    fitted = [[ImageOps.contain(Image.fromarray(pixels), (tile, tile)) for pixels in row] for row in rows]
    heights = [max(picture.height for picture in row) + (_CAPTION if captions else 0) for row in fitted]
    columns = max(len(row) for row in rows)
    size = (columns * (tile + _MARGIN) + _MARGIN, sum(heights) + (len(rows) + 1) * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for number, (row, height) in enumerate(zip(fitted, heights, strict=True)):
        for column, picture in enumerate(row):
            sheet.paste(picture, (_MARGIN + column * (tile + _MARGIN), top))
        if captions:
            draw.text((_MARGIN, top + height - _CAPTION), captions[number], fill="black")
        top += height + _MARGIN
    return sheet
