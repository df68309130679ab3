"""A picture of the calibration: how often a prediction is right, against how confident it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from shards.looking.sheet import font

_BIN, _CHART, _STRIP = 32, 320, 70  # pixels: width of a bin; heights of the chart, and of the numbers of pixels below
_LEFT, _TOP, _GAP, _BOTTOM, _RIGHT = 46, 34, 34, 14, 14
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_GREY, _LIGHT, _BLUE, _RED = (110, 110, 110), (225, 225, 225), (70, 130, 200), (200, 60, 50)


def reliability_picture(calibration: Sequence[Sequence[float]], ece: float, pixels: int) -> Image.Image:
    """Per bin of confidence a bar of its accuracy and a mark at its mean confidence, the same where a model is
    calibrated; below, how many of the `pixels` are in it.

    `calibration` are share of pixels, accuracy and mean confidence of each bin, as in `Counts.summary`; the last two
    are NaN for empty bins.
    """
    bins = len(calibration)
    size = (_LEFT + bins * _BIN + _RIGHT, _TOP + _CHART + _GAP + _STRIP + _BOTTOM)
    picture = Image.new("RGB", size, "white")
    draw, small = ImageDraw.Draw(picture), font(11)
    base, end, right = _TOP + _CHART, size[1] - _BOTTOM, size[0] - _RIGHT
    draw.text((_LEFT, 8), f"accuracy (bars) and mean confidence (marks) against confidence; ECE {ece:.4f}",
              fill="black", font=font(12))
    for tick in _TICKS:
        height = base - tick * _CHART
        draw.line([(_LEFT, height), (right, height)], fill=_LIGHT)
        draw.text((_LEFT - 6, height), f"{tick:g}", fill=_GREY, font=small, anchor="rm")
        draw.text((_LEFT + tick * bins * _BIN, base + 4), f"{tick:g}", fill=_GREY, font=small, anchor="ma")
    most = max(share for share, _, _ in calibration)
    for number, (share, accuracy, confidence) in enumerate(calibration):
        left, last = _LEFT + number * _BIN + 2, _LEFT + (number + 1) * _BIN - 3
        if not share > 0 or math.isnan(accuracy):
            continue
        draw.rectangle([left, base - accuracy * _CHART, last, base], fill=_BLUE)
        mark = base - confidence * _CHART
        draw.rectangle([left, mark - 1, last, mark + 1], fill=_RED)
        top = end - share / most * (_STRIP - 16)
        draw.rectangle([left, top, last, end], fill=_GREY)
        draw.text(((left + last) / 2, top - 2), short_count(round(share * pixels)), fill="black", font=small,
                  anchor="mb")
    draw.line([(_LEFT, base), (_LEFT + bins * _BIN, _TOP)], fill=_GREY)
    draw.text((_LEFT - 6, end), "pixels", fill=_GREY, font=small, anchor="rb")
    return picture


def short_count(count: int) -> str:
    """At most four characters: 999, 1.2k, 35k, 4.1M, 2.0G."""
    if count < 1000:
        return str(count)
    exponent = min((len(str(count)) - 1) // 3, 4)
    value = count / 1000**exponent
    return f"{value:.1f}{' kMGT'[exponent]}" if value < 9.95 else f"{value:.0f}{' kMGT'[exponent]}"
