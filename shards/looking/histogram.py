"""Draw how often each class occurs: its share of the labelled pixels and of the samples, on logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from shards.looking.sheet import CAPTION_TEXT, LINE, MARGIN, SWATCH, TEXT, Font, font, percent, shortened
from shards.manifest import Manifest
from shards.shown_text import shown

MOST_CLASSES = 500  # drawn one by one; the rest share a line, as viewers cannot open pictures of any height
_NAME, _BAR, _VALUE, _NUMBER = 200, 230, 84, 52  # widths
_HEAD = 5 * LINE
_GREY, _GRID, _ABSENT = (110, 110, 110), (228, 228, 228), (200, 30, 30)
_MOST_DECADES = 7


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One column of bars."""

    split: str
    title: str
    shares: Sequence[float]  # of each class, in the order of ids
    numbers: Sequence[int]  # what the shares are computed from


def class_histogram(manifest: Manifest) -> Image.Image:
    """One line per class, the most frequent first, with two bars per split: pixels, and samples that contain it.

    The order is that of the pixels of all splits together. Classes that a split lacks are marked.
    """
    columns = [bars for split in manifest.splits for bars in _bars_of(manifest, split)]
    total = [sum(split.class_pixels[number] for split in manifest.splits.values())
             for number in range(manifest.num_classes)]
    order = sorted(range(manifest.num_classes), key=lambda number: (-total[number], number))
    drawn, rest = order[:MOST_CLASSES], order[MOST_CLASSES:]
    lines = len(drawn) + bool(rest)
    left = MARGIN + SWATCH + _NUMBER + _NAME + MARGIN
    width = left + len(columns) * (_BAR + _VALUE + MARGIN)
    picture = Image.new("RGB", (width, _HEAD + lines * LINE + 2 * LINE + MARGIN), "white")
    draw, text = ImageDraw.Draw(picture), font(TEXT)
    head = f"{manifest.dataset}: {manifest.num_classes} classes, the most frequent first"
    draw.text((MARGIN, MARGIN), shortened(head, font(CAPTION_TEXT), left + _BAR), fill="black", font=font(CAPTION_TEXT))
    for number, class_id in enumerate(drawn):
        _draw_name(draw, manifest, class_id, _HEAD + number * LINE, text)
    if rest:
        draw.text((MARGIN, _HEAD + len(drawn) * LINE), f"and {len(rest)} less frequent classes", fill=_GREY, font=text)
    for column, bars in enumerate(columns):
        decades = max(scale_of(other.shares) for other in columns if other.title == bars.title)  # comparable splits
        _draw_bars(draw, bars, manifest, drawn, decades, left + column * (_BAR + _VALUE + MARGIN))
    return picture


def _bars_of(manifest: Manifest, name: str) -> list[Bars]:
    split = manifest.splits[name]
    return [Bars(split=f"{name}: {split.samples} {split.kind}", title=title, numbers=numbers,
                 shares=[number / max(1, whole) for number in numbers])
            for title, numbers, whole in (("share of labelled pixels", split.class_pixels, split.labelled_pixels),
                                          ("share of samples", split.class_samples, split.samples))]


def _draw_name(draw: ImageDraw.ImageDraw, manifest: Manifest, class_id: int, top: int, text: Font) -> None:
    info = manifest.classes[class_id]
    draw.rectangle([MARGIN, top + 1, MARGIN + SWATCH, top + 1 + SWATCH], fill=info.color, outline=_GREY)
    draw.text((MARGIN + SWATCH + _NUMBER - 6, top), str(class_id), fill=_GREY, font=text, anchor="ra")
    draw.text((MARGIN + SWATCH + _NUMBER, top), shortened(shown(info.name), text, _NAME), fill="black", font=text)


def _draw_bars(draw: ImageDraw.ImageDraw, bars: Bars, manifest: Manifest, drawn: Sequence[int], decades: int,
               left: int) -> None:
    """One column: title, scale above and below, and a bar of each class."""
    text, bottom = font(TEXT), _HEAD + len(drawn) * LINE
    draw.text((left, MARGIN + LINE), shortened(bars.split, text, _BAR + _VALUE), fill="black", font=text)
    draw.text((left, MARGIN + 2 * LINE), bars.title, fill=_GREY, font=text)
    for decade in range(decades + 1):
        x = left + round(_BAR * (1 - decade / decades))
        draw.line([(x, _HEAD - 3), (x, bottom)], fill=_GRID)
        for y in (bottom + 3, _HEAD - LINE + 2):
            draw.text((x, y), _tick(decade), fill=_GREY, font=font(TEXT - 2), anchor="ma")
    for number, class_id in enumerate(drawn):
        top, share = _HEAD + number * LINE, bars.shares[class_id]
        if not bars.numbers[class_id]:
            draw.text((left + 3, top), "none", fill=_ABSENT, font=text)
            continue
        length = bar_length(share, decades)
        color = manifest.classes[class_id].color
        draw.rectangle([left, top + 2, left + length, top + LINE - 3], fill=color, outline=_GREY)
        draw.text((left + length + 6, top), percent(share), fill="black", font=text)


def scale_of(shares: Sequence[float]) -> int:
    """Decades from 100 % down that hold the smallest share, with room for a bar of that share: 1 to 7."""
    least = min((share for share in shares if share > 0), default=1.0)
    return min(_MOST_DECADES, max(1, math.floor(-math.log10(least)) + 1))


def bar_length(share: float, decades: int) -> int:
    """Pixels of a bar on a scale from 10^-decades to 1; at least 1."""
    return max(1, round(_BAR * (1 + math.log10(share) / decades)))


def _tick(decade: int) -> str:
    return f"{100 / 10**decade:.{max(0, decade - 2)}f} %"
