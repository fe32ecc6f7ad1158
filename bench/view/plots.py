"""Plots of results, as PNG bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which has global state
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.view import files

OURS = "copgen_fast"
WITHOUT = ", without "
_OURS_COLOUR, _LIMIT_COLOUR = "#1f6feb", "#24292f"
_PEER_COLOURS = ("#d1242f", "#e8871e", "#8250df", "#1a7f37", "#bf3989", "#9a6700", "#57606a", "#0e8a8a")
_BAR = 0.8


@dataclass(frozen=True)
class Group:
    """One of our measurements with its limit and its peers', in milliseconds."""

    name: str
    ours: float
    limit: float
    peers: dict[str, float]


def groups(rows: list[dict]) -> list[Group]:
    """Our measurements among rows of one area, device and direction."""
    return [
        Group(f"{case}, {precision}", some[0]["ours_ms"], some[0]["limit_ms"], {x["peer"]: x["peer_ms"] for x in some})
        for (_, case, _, precision, _), some in files.measurements(rows).items()
    ]


def bars(measured: list[Group], title: str) -> bytes:
    """Our times and the peers' as horizontal bars, with a black line across each group at its limit."""
    peers = list(dict.fromkeys(peer for group in measured for peer in group.peers))
    colours = dict(zip(peers, _cycle(len(peers)), strict=True))
    rows = sum(1 + len(group.peers) for group in measured)
    figure, axes = _figure(9.2, 0.2 * rows + 0.26 * len(measured) + 0.2 * (len(peers) + 2) + 1.1)
    ticks, y = [], 0.0
    for group in measured:
        top = y
        _bar(axes, y, group.ours, _OURS_COLOUR, _time(group.ours), bold=True)
        for peer, ms in group.peers.items():
            y += 1
            _bar(axes, y, ms, colours[peer], f"{_time(ms)}  ({ms / group.ours:.3g}x)")
        axes.plot([group.limit] * 2, [top - 0.55, y + 0.55], color=_LIMIT_COLOUR, linewidth=1.6, solid_capstyle="butt")
        ticks.append(((top + y) / 2, group.name))
        y += 2.1
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8.5)
    axes.set_ylim(y - 1.2, -1)
    axes.set_xscale("log")
    values = [ms for group in measured for ms in (group.ours, group.limit, *group.peers.values())]
    axes.set_xlim(min(values) / 2, max(values) * 6)
    _plain_logarithm(axes)
    axes.set_xlabel("milliseconds, logarithmic; in brackets: times ours", fontsize=9)
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=colour, label=name) for name, colour in ({OURS: _OURS_COLOUR} | colours).items()]
    handles.append(Line2D([], [], color=_LIMIT_COLOUR, linewidth=1.6, label="limit of ours"))
    figure.legend(handles=handles, loc="outside upper left", frameon=False, fontsize=8, title=title, alignment="left")
    return png(figure)


def over_n(rows: list[dict], title: str) -> bytes:
    """Time and peak memory over N, on logarithmic axes, of rows whose cases give N."""
    figure, (times, memory) = _figure(9.2, 4.4, columns=2)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    names = {"ours": OURS, "limit": "limit of ours"} | {peer: peer for peer in peers}
    colours = {"ours": _OURS_COLOUR, "limit": _LIMIT_COLOUR} | dict(zip(peers, _cycle(len(peers)), strict=True))
    for key, name in names.items():
        some = rows if key in ("ours", "limit") else [row for row in rows if row["peer"] == key]
        prefix = key if key in ("ours", "limit") else "peer"
        style = {"color": colours[key], "label": name, "linewidth": 2.2 if key == "ours" else 1.4}
        style |= {"linestyle": "--"} if key == "limit" else {"marker": "o", "markersize": 4}
        times.plot(*_points(some, f"{prefix}_ms"), **style)
        if key != "limit":
            memory.plot(*_points(some, "peak_mb" if key == "ours" else "peer_peak_mb"), **style)
    for axes, label in ((times, "milliseconds"), (memory, "peak memory, MB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        places = sorted({_n(row) for row in rows})
        axes.set_xticks(places, [str(n) for n in places])
        axes.minorticks_off()
        axes.set_xlabel("N, pairs", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
    handles, labels = times.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", frameon=False, fontsize=8, title=title, alignment="left", ncols=2
    )
    return png(figure)


def ablation(rows: list[dict], title: str) -> bytes:
    """Slowdown when one part is left out; rows whose cases end in `, without PART`."""
    ordered = sorted(rows, key=lambda row: row["ratio"], reverse=True)
    figure, axes = _figure(7.2, 0.32 * len(rows) + 1.2)
    for y, row in enumerate(ordered):
        slower = row["ours_ms"] / row["peer_ms"]
        axes.barh(y, slower, height=_BAR * 0.8, color=_OURS_COLOUR)
        axes.text(max(slower, 1) + 0.02, y, f"{slower:.2f}x  {_time(row['ours_ms'])}", va="center", fontsize=8)
    axes.axvline(1, color=_LIMIT_COLOUR, linewidth=1.6)
    axes.set_yticks(range(len(rows)), [f"without {row['case'].partition(WITHOUT)[2]}" for row in ordered], fontsize=8.5)
    axes.set_xlim(0, max(1, *(row["ours_ms"] / row["peer_ms"] for row in rows)) * 1.3)
    axes.set_xlabel(f"time over the whole's, {_time(rows[0]['peer_ms'])}", fontsize=9)
    axes.grid(axis="y", visible=False)
    axes.set_title(title, fontsize=9.5, loc="left")
    return png(figure)


def _points(rows: list[dict], column: str) -> tuple[list[int], list[float]]:
    found = sorted({_n(row): row[column] for row in rows if row[column]}.items())
    return [n for n, _ in found], [value for _, value in found]


def _n(row: dict) -> int:
    return int(re.search(r"N=(\d+)", row["case"])[1])


def _bar(axes: Axes, y: float, ms: float, colour: str, text: str, bold: bool = False) -> None:
    axes.barh(y, ms, height=_BAR, color=colour)
    axes.text(ms * 1.06, y, text, va="center", fontsize=7.5, fontweight="bold" if bold else "normal")


def _plain_logarithm(axes: Axes) -> None:
    """Plain numbers at powers of ten along x; also at twos and fives where those are few."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _time(ms: float) -> str:
    """Milliseconds as text, in s, ms or us."""
    scale, unit = (1e-3, "s") if ms >= 1000 else (1, "ms") if ms >= 0.1 else (1e3, "us")
    return f"{ms * scale:.3g} {unit}"


def _cycle(count: int) -> Iterator[str]:
    return (_PEER_COLOURS[i % len(_PEER_COLOURS)] for i in range(count))


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.3, linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(labelsize=8.5)
    return figure, axes


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
