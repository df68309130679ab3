"""Line charts of a run's metrics, drawn with matplotlib for curves.png and the report."""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]

_SMOOTHING = 0.8
_MOST_MARKERS = 40
_GREY = "#808080"  # text and grid: legible on light and dark pages
_FEW_COLORS = ("#3388dd", "#dd8833", "#33bb66", "#9955cc")  # of medium lightness, for any background
_CHART_INCHES = (5.0, 2.4)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: points are (step, value)."""

    name: str
    points: Points
    color: str
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over steps. `top`: upper end of the vertical axis, which then starts at 0; None: automatic."""

    title: str
    series: Sequence[Series]
    top: float | None = None


def colors(count: int) -> list[str]:
    """Colours for `count` lines: distinct ones for a few, a ramp for many, as those are ordered layers."""
    if count <= len(_FEW_COLORS):
        return list(_FEW_COLORS[:count])
    ramp = (colorsys.hsv_to_rgb((190 + 140 * index / (count - 1)) / 360, 0.65, 0.85) for index in range(count))
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in color) for color in ramp]


def smooth(points: Points) -> Points:
    """Exponential moving average, with bias correction at the start as in Adam."""
    smoothed, total, weight = [], 0.0, 0.0
    for step, value in points:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append((step, total / weight))
    return smoothed


def usual_top(points: Points) -> float | None:
    """An upper end of the axis that fits all but the highest 1 % of the values."""
    finite = sorted(value for _, value in points if math.isfinite(value))
    return 1.5 * finite[int(0.99 * (len(finite) - 1))] or None if finite else None


def draw(axes: Axes, chart: Chart) -> None:
    """Draw a chart, without non-finite values."""
    for line in chart.series:
        points = finite_points(line)
        marker = "." if len(points) <= _MOST_MARKERS and not line.faint else None
        axes.plot([x for x, _ in points], [y for _, y in points], color=line.color, alpha=0.35 if line.faint else 1,
                  linewidth=1.4, marker=marker, label=line.name)
    axes.set_title(chart.title, fontsize=10, color=_GREY)
    axes.tick_params(colors=_GREY, labelsize=8)
    axes.grid(color=_GREY, alpha=0.25)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if chart.top is not None:
        axes.set_ylim(0, chart.top)
    named = [handle for handle, line in zip(axes.get_lines(), chart.series, strict=True) if not line.faint]
    if len(named) > 1:
        axes.legend(handles=named, fontsize=8, labelcolor=_GREY, frameon=False, ncols=2)


def finite_points(line: Series) -> Points:
    """The points of a line with finite values."""
    return [(x, y) for x, y in line.points if math.isfinite(y)]


def svg_uri(chart: Chart) -> str | None:
    """A chart as a `data:` URI of an SVG picture on a transparent background; None when no value is finite."""
    if not any(finite_points(line) for line in chart.series):
        return None
    figure = new_figure(_CHART_INCHES)
    draw(figure.subplots(), chart)
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):  # keep text as text: smaller
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure, without pyplot's global state."""
    import matplotlib.figure  # takes a second to import, so only when something is drawn

    return matplotlib.figure.Figure(figsize=inches, layout="constrained")
