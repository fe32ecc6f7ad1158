"""Charts of a run as PNG bytes, one function a chart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Lines of a chart: name -> (x, y)."""

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989")


def lines(series: Series, x_label: str, y_label: str, level: float | None = None, level_name: str = "") -> bytes:
    """Lines over one x axis, with an optional dashed level for reference."""
    (axes,) = panels(7.2, 3.0)
    for colour, (name, (x, y)) in zip(_cycle(len(series)), series.items(), strict=True):
        axes.plot(x, y, label=name, color=colour, linewidth=1.4)
    if level is not None:
        axes.axhline(level, color="#8c959f", linestyle="--", linewidth=1, label=level_name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(axes)


def bars(values: Mapping[str, float], spreads: Mapping[str, float], x_label: str) -> bytes:
    """Horizontal bars with error bars, fractions shown as per cent."""
    (axes,) = panels(7.2, 0.4 * len(values) + 0.9)
    names = list(values)[::-1]
    heights = [100 * values[name] for name in names]
    axes.barh(names, heights, xerr=[100 * spreads[name] for name in names], color=COLOURS[0], alpha=0.85, height=0.6)
    for row, (name, height) in enumerate(zip(names, heights, strict=True)):
        axes.text(height + 100 * spreads[name] + 0.3, row, f"{height:.1f}", va="center", fontsize=8)
    low = min(height - 100 * spreads[name] for name, height in zip(names, heights, strict=True))
    axes.set_xlim(max(0.0, low - 8), min(104.0, max(heights) + 8))
    axes.set_xlabel(x_label)
    return png(axes)


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def panels(width: float, height: float, count: int = 1) -> list[Axes]:
    """Charts side by side that share their y axis, in inches."""
    # The object interface, not pyplot: no global state and no display are needed.
    from matplotlib.figure import Figure

    found = Figure(figsize=(width, height), layout="constrained").subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return list(found)


def png(axes: Axes) -> bytes:
    """The file of the figure that the axes are in."""
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
