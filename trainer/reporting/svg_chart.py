"""Line charts as SVG that stands inside an HTML page: text takes the page's colour, so light and dark both work."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shards.shown_text import shown

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 8, 24  # pixels around the plot
_MOST_POINTS = 600  # of a line; more than pixels cannot be seen, and the page should stay small
_MOST_MARKERS = 40
_SAME, _LEAST = 1e-9, 1e-300  # values that differ by less, relatively, are one; those below are zero
_HUES = (210, 28, 145, 280)  # blue, orange, green, violet: of middling lightness, for any background


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    color: str
    faint: bool = False


def colors(count: int) -> list[str]:
    """A few lines get colours that differ, many get a ramp, as layers are ordered."""
    if count <= len(_HUES):
        return [f"hsl({hue} 70% 52%)" for hue in _HUES[:count]]
    return [f"hsl({190 + 140 * index / (count - 1):.0f} 65% 55%)" for index in range(count)]


def html_text(value: object) -> str:
    """A text that others may have written, for a page that can be mailed."""
    return html.escape(shown(value))


def line_chart(title: str, series: Sequence[Series], top: float | None = None) -> str:
    """A `<figure>`: title, the lines over steps, and a legend when there are several. Numbers not finite are left out.

    `top`: the end of the vertical axis, which then begins at 0 and cuts off what is higher; None: as the numbers are.
    """
    drawn = [(line, _thinned([(x, y) for x, y in line.points if math.isfinite(y)])) for line in series]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    every = [point for _, points in drawn for point in points]
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = ticks(0, top) if top is not None else ticks(min(y for _, y in every), max(y for _, y in every))
    axes = _Axes(min(x for x, _ in every), max(x for x, _ in every), y_ticks[0], y_ticks[-1])
    body = [*_grid(axes, x_ticks, y_ticks), *(_line(axes, line, points) for line, points in drawn)]
    named = [line for line, _ in drawn if not line.faint]
    legend = "".join(f'<span><i style="background:{line.color}"></i>{html_text(line.name)}</span>' for line in named)
    return (f"<figure><h3>{html_text(title)}</h3>"
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html_text(title)}">{"".join(body)}</svg>'
            f'<figcaption>{legend if len(named) > 1 else ""}</figcaption></figure>')


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Two or more round numbers that enclose low to high, at steps of 1, 2, 2.5 or 5 times a power of ten."""
    spread, size = high - low, max(abs(low), abs(high))
    if spread <= _SAME * size:  # ticks so close would be the same number
        spread = size if size > _LEAST else 1.0
    rough = spread / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Axes:
    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left) if self.right > self.left else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = min(1.0, (value - self.bottom) / (self.top - self.bottom))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _grid(axes: _Axes, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        y = axes.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
                     f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value in x_ticks:
        if axes.left <= value <= axes.right:
            parts.append(f'<text x="{axes.x(value):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{_short(value)}</text>')
    return parts


def _line(axes: _Axes, line: Series, points: Points) -> str:
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    faint = ' opacity="0.35"' if line.faint else ""
    parts = [f'<polyline points="{path}" stroke="{line.color}"{faint}/>']
    if len(points) <= _MOST_MARKERS and not line.faint:
        parts += [f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.5" fill="{line.color}">'
                  f"<title>{html_text(line.name)}, step {x:g}: {y:.4g}</title></circle>" for x, y in points]
    return "".join(parts)


def _thinned(points: Points) -> Points:
    """At most twice _MOST_POINTS: of each stretch the lowest and the highest, so that no spike is lost."""
    stretch = math.ceil(len(points) / _MOST_POINTS)
    if stretch <= 2:
        return points
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        by_value = sorted(points[start : start + stretch], key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1]})
    return kept


def _short(value: float) -> str:
    if abs(value) >= 10000:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:.4g}".replace("e-0", "e-")  # 2.5e-5
