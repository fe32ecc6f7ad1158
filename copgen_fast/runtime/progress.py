"""Progress of a long loop: a tqdm bar on a terminal, elsewhere a plain line every 30 seconds and one at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

LINE_EVERY = 30.0
"""Seconds between lines where the stream is no terminal."""


def progress(
    total: int,
    label: str,
    unit: str = "samples",
    initial: int = 0,
    disable: bool = False,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ProgressBar | ProgressLines:
    """A context manager whose `update(n, name=value, ...)` counts n more of `total` and shows the latest values.

    The environment variable TQDM_DISABLE silences it. Nothing is coloured, whatever NO_COLOR says.

    Args:
        initial: how many were done before, by a run that is resumed.
        stream: default stderr.
    """
    stream = sys.stderr if stream is None else stream
    silent = disable or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    if not silent and not stream.isatty():
        return ProgressLines(total, label, unit, initial, stream, clock)
    options = {"initial": initial, "disable": silent, "file": stream, "dynamic_ncols": True, "colour": None}
    return ProgressBar(total=total, desc=label, unit=f" {unit}", **options)


class ProgressBar(tqdm):
    """tqdm's bar; values are shown behind it."""

    def update(self, n: int = 1, **values: float | str) -> None:
        if values:
            self.set_postfix(values, refresh=False)
        super().update(n)


@dataclass
class ProgressLines:
    """A line such as "pretrain navigator: 4,096/12,288 samples, 33 %, 410 samples/s, 20 s left, loss 4.3"."""

    total: int
    label: str
    unit: str
    initial: int
    stream: TextIO
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.done = self.shown = self.initial
        self.values: dict[str, float | str] = {}
        self.started = self.written = self.clock()

    def update(self, n: int = 1, **values: float | str) -> None:
        self.done += n
        self.values |= values
        if self.clock() - self.written >= LINE_EVERY:
            self._write()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self.done > self.shown:
            self._write()

    def _write(self) -> None:
        self.shown, self.written = self.done, self.clock()
        seconds = max(self.written - self.started, 1e-9)
        rate = (self.done - self.initial) / seconds
        left = (self.total - self.done) / rate if rate else float("inf")
        parts = [f"{self.done:,}/{self.total:,} {self.unit}", f"{100 * self.done // max(self.total, 1)} %"]
        parts += [f"{_short(rate)} {self.unit}/s", f"{_duration(left)} left" if left else f"in {_duration(seconds)}"]
        parts += [f"{name} {value if isinstance(value, str) else _short(value)}" for name, value in self.values.items()]
        print(f"{self.label}: {', '.join(parts)}", file=self.stream, flush=True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}" if seconds >= 10 * size else f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
