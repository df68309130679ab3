"""Contact sheets with legends: per sample a caption, the image, its overlay, and the classes that occur in it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from shards.looking.selection import check_labels
from shards.manifest import ClassInfo
from shards.picture import Pixels, overlay
from shards.sample import CropSample
from shards.shown_text import shown

TILE = 320  # pixels; longest side of a picture
MARGIN, LINE, TEXT, CAPTION_TEXT = 10, 18, 13, 14
SWATCH, NUMBER, SHARE = 14, 44, 56  # widths in the legend: colour, class id, share
_WIDEST_NAME, _NARROWEST_NAME = 220, 60
_FEWEST_LINES = 8  # of a legend column, even beside a low picture
_GREY, _LINE_COLOUR, _MARKED = (110, 110, 110), (215, 215, 215), (255, 236, 150)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, kw_only=True)
class LegendLine:
    """A class in a sample; `color` is None for ignored pixels."""

    color: tuple[int, int, int] | None
    number: str
    name: str
    share: float  # of the sample's pixels
    is_marked: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample on the sheet, at the size at which it is shown."""

    caption: str
    pictures: Sequence[Pixels]
    legend: Sequence[LegendLine]


def sample_row(sample: CropSample, classes: Sequence[ClassInfo], caption: str, marked: Set[int] = frozenset(),
               tile: int = TILE) -> Row:
    """The image, the image under its class colours, and the shares of its classes, the largest first.

    Classes in `marked` are highlighted in the legend. Both pictures are scaled before they are blended, so that borders
    between classes stay visible in large images.
    """
    check_labels(sample, classes)
    label_map = sample.label_map()
    image, small_map = fitted(sample.image, label_map, tile)
    pictures = [image, overlay(image, small_map, [info.color for info in classes])]
    return Row(caption=caption, pictures=pictures, legend=legend_of(label_map, classes, marked))


def legend_of(label_map: npt.NDArray[Any], classes: Sequence[ClassInfo], marked: Set[int] = frozenset(),
              also: Set[int] = frozenset()) -> list[LegendLine]:
    """The classes of a label map `[H,W]`, and those of `also`, by descending share, then the ignored pixels, if any."""
    pixels = np.bincount(label_map.reshape(-1), minlength=len(classes))[: len(classes)]
    listed = sorted((-int(count), label) for label, count in enumerate(pixels.tolist()) if count or label in also)
    lines = [LegendLine(color=classes[label].color, number=str(label), name=shown(classes[label].name),
                        share=-count / label_map.size, is_marked=label in marked) for count, label in listed]
    if ignored := label_map.size - int(pixels.sum()):
        lines.append(LegendLine(color=None, number="", name="ignored", share=ignored / label_map.size))
    return lines


def fitted(image: Pixels, label_map: npt.NDArray[Any], tile: int) -> tuple[Pixels, npt.NDArray[Any]]:
    """Image `[H,W,3]` and label map `[H,W]`, both scaled such that the longer side has `tile` pixels."""
    height, width = label_map.shape
    scale = tile / max(height, width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC, reducing_gap=3.0)
    nearest = [((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in ((rows, height), (columns, width))]
    return np.asarray(resized), label_map[np.ix_(*nearest)]


def legend_sheet(rows: Sequence[Row], tile: int = TILE) -> Image.Image:
    """The rows below one another; the sheet is as wide as its widest row, and leaves room for captions."""
    text, bold = font(TEXT), font(CAPTION_TEXT)
    plans = [_Plan(row, tile, text) for row in rows]
    width = max([plan.width for plan in plans] + [2 * TILE for row in rows if row.caption])
    sheet = Image.new("RGB", (width, sum(plan.height for plan in plans) + MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for plan in plans:
        caption = shortened(plan.row.caption, bold, width - 2 * MARGIN, tail=0.6)
        draw.text((MARGIN, top), caption, fill="black", font=bold)
        below = top + LINE + 4
        for column, picture in enumerate(plan.row.pictures):
            sheet.paste(Image.fromarray(picture), (MARGIN + column * (tile + MARGIN), below))
        plan.draw_legend(draw, plan.legend_left, below, text)
        top += plan.height
        draw.line([(MARGIN, top - MARGIN), (width - MARGIN, top - MARGIN)], fill=_LINE_COLOUR)
    return sheet


class _Plan:
    """Where the parts of a row go."""

    def __init__(self, row: Row, tile: int, text: Font) -> None:
        self.row = row
        pictures = max(picture.shape[0] for picture in row.pictures)
        lines = max(_FEWEST_LINES, pictures // LINE + 2)  # two more lines are better than another column
        self.columns = [row.legend[first : first + lines] for first in range(0, len(row.legend), lines)]
        self.names = [min(_WIDEST_NAME, max([_NARROWEST_NAME] + [_length(text, line.name) for line in column]))
                      for column in self.columns]
        self.legend_left = MARGIN + len(row.pictures) * (tile + MARGIN)
        self.width = self.legend_left + sum(self._column_width(name) + MARGIN for name in self.names)
        legend = max([len(column) for column in self.columns] or [0]) * LINE
        self.height = LINE + 4 + max(pictures, legend) + 2 * MARGIN

    def draw_legend(self, draw: ImageDraw.ImageDraw, left: int, top: int, text: Font) -> None:
        for column, width in zip(self.columns, self.names, strict=True):
            for number, line in enumerate(column):
                _draw_line(draw, line, left, top + number * LINE, width, text)
            left += self._column_width(width) + MARGIN

    @staticmethod
    def _column_width(name: int) -> int:
        return SWATCH + NUMBER + name + SHARE + 8


def _draw_line(draw: ImageDraw.ImageDraw, line: LegendLine, left: int, top: int, name_width: int, text: Font) -> None:
    right = left + SWATCH + NUMBER + name_width + SHARE + 8
    if line.is_marked:
        draw.rectangle([left - 2, top, right, top + LINE - 2], fill=_MARKED)
    box = [left, top + 1, left + SWATCH, top + 1 + SWATCH]
    draw.rectangle(box, fill=line.color or "white", outline=_GREY)
    if line.color is None:
        draw.line([(box[0], box[3]), (box[2], box[1])], fill=_GREY)
    draw.text((left + SWATCH + NUMBER - 4, top), line.number, fill=_GREY, font=text, anchor="ra")
    draw.text((left + SWATCH + NUMBER + 4, top), shortened(line.name, text, name_width), fill="black", font=text)
    draw.text((right - 2, top), percent(line.share), fill="black", font=text, anchor="ra")


def percent(share: float) -> str:
    """A share with as many digits as are useful: 12.3 %, 0.05 %, < 0.001 %; 0 only if it is 0."""
    if share == 0:
        return "0 %"
    if share < 1e-5:
        return "< 0.001 %"
    digits = next(digits for digits, least in ((1, 0.01), (2, 0.0005), (3, 0.0)) if share >= least)
    return f"{share * 100:.{digits}f} %"


def shortened(text: str, using: Font, width: float, tail: float = 0.0) -> str:
    """The text, cut with an ellipsis if it would be wider than `width` pixels; `tail`: the share kept from its end."""
    text = shown(text)[:2000]
    if _length(using, text) <= width:
        return text
    kept, most = 0, len(text) - 1
    while kept < most:  # the longest that fits
        middle = (kept + most + 1) // 2
        if _length(using, _cut(text, middle, tail)) <= width:
            kept = middle
        else:
            most = middle - 1
    return _cut(text, kept, tail)


def font(size: int) -> Font:
    """Pillow's own font, so that pictures do not depend on what is installed."""
    return ImageFont.load_default(size)


def _cut(text: str, kept: int, tail: float) -> str:
    end = int(kept * tail)
    return f"{text[: kept - end]}…{text[len(text) - end :]}"


def _length(using: Font, text: str) -> int:
    return int(np.ceil(using.getlength(text)))
