"""The numbers that the issues ask of measurements, as data; `python -m bench check` compares files with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Measure = Literal["ratio", "of_limit", "peak_mb", "samples_per_s", "views_per_s", "waiting"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One number of one issue. Of the rows that it is about, the best counts.

    Attributes:
        device: where it is measured, cpu or cuda.
        area, direction: of the rows; `case`, `precision` and `peer` are patterns that match theirs whole.
        measure: what of a row; `at_least` or `at_most` is what is asked.
        card: the card that an absolute number is stated for: on others it is shown and not judged.
        optional: need not have been measured, as not every machine can.
    """

    issue: int
    what: str
    device: Literal["cpu", "cuda"]
    area: str
    case: str
    precision: str = ".*"
    direction: str
    peer: str = ".*"
    measure: Measure = "ratio"
    at_least: float | None = None
    at_most: float | None = None
    card: str | None = None
    optional: bool = False

    def about(self, row: dict) -> bool:
        """Whether a row of results is one of those that this is about."""
        return (
            (row["device"] == "cpu") == (self.device == "cpu")
            and (row["area"], row["direction"]) == (self.area, self.direction)
            and all(re.fullmatch(getattr(self, name), row[name]) for name in ("case", "precision", "peer"))
            and MEASURES[self.measure](row) is not None
        )

    def best(self, rows: list[dict]) -> float:
        values = [MEASURES[self.measure](row) for row in rows]
        return max(values) if self.at_least is not None else min(values)

    def met(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most

    @property
    def wanted(self) -> str:
        least = self.at_least is not None
        return f"{'>=' if least else '<='} {self.text(self.at_least if least else self.at_most)}"

    def text(self, value: float) -> str:
        return _TEXTS[self.measure].format(value)


def _batch(row: dict) -> int:
    return int(re.search(r"B=(\d+)", row["case"])[1])


MEASURES: dict[Measure, Callable[[dict], float | None]] = {
    "ratio": lambda row: row["ratio"],
    "of_limit": lambda row: row["of_limit"],
    "peak_mb": lambda row: row["peak_mb"],
    "samples_per_s": lambda row: _batch(row) / row["ours_ms"] * 1e3,
    "views_per_s": lambda row: 2 * _batch(row) / row["ours_ms"] * 1e3,
    # The peer has its batch at hand.
    "waiting": lambda row: max(0.0, 1 - row["ratio"]),
}
_TEXTS: dict[Measure, str] = {
    "ratio": "{:.2f}x",
    "of_limit": "{:.0%} of the limit",
    "peak_mb": "{:.1f} MB",
    "samples_per_s": "{:.0f} samples/s",
    "views_per_s": "{:.0f} views/s",
    "waiting": "{:.1%} of the time",
}

_FORWARD, _BOTH = "forward", "forward+backward"
_KORNIA, _LOOP = "kornia .*, same parameters.*", "torchvision .* per-sample loop, same parameters"
_PLAIN, _LIGHTLY, _TILING = "PyTorch .*", "lightly .*", ".*chunked backend.*"


def _augment_cpu(direction: str, peer: str, name: str, at_least: float) -> Target:
    return Target(
        issue=3,
        what=f"{direction}, beside {name}",
        device="cpu",
        area="augment",
        case="simclr B=64 128px",
        precision="fp32",
        direction=direction,
        peer=peer,
        at_least=at_least,
    )


def _augment_gpu(what: str, direction: str, at_least: float, measure: Measure = "ratio", peer: str = ".*") -> Target:
    return Target(
        issue=3,
        what=f"{direction}, {what}",
        device="cuda",
        area="augment",
        case="simclr B=352 128px",
        precision="fp16",
        direction=direction,
        peer=peer,
        measure=measure,
        at_least=at_least,
    )


def _info_nce_cpu(n: int, what: str, peer: str = ".*", **asked: float | Measure) -> Target:
    return Target(
        issue=4,
        what=f"N={n}, {what}",
        device="cpu",
        area="info_nce",
        case=f"N={n} D=128",
        precision="fp32",
        direction=_BOTH,
        peer=peer,
        **asked,
    )


def _info_nce_gpu(what: str, direction: str, at_least: float, measure: Measure = "ratio", peer: str = ".*") -> Target:
    return Target(
        issue=4,
        what=f"N=16384 {direction}, {what}",
        device="cuda",
        area="info_nce",
        case="N=16384 D=128",
        precision="fp16",
        direction=direction,
        peer=peer,
        measure=measure,
        at_least=at_least,
    )


def _generator(what: str, device: str, case: str, direction: str, at_least: float, measure: Measure) -> Target:
    return Target(
        issue=5,
        what=what,
        device=device,
        area="generator",
        case=case,
        direction=direction,
        measure=measure,
        at_least=at_least,
    )


def _step(what: str, device: str, area: str, case: str, **asked: str | float | bool | None) -> Target:
    return Target(issue=6, what=what, device=device, area=area, case=case, direction="step", **asked)


TARGETS = (
    _augment_cpu(_FORWARD, _KORNIA, "kornia", 10),
    _augment_cpu(_FORWARD, _LOOP, "the per-sample loop", 40),
    _augment_cpu(_BOTH, _KORNIA, "kornia", 12),
    _augment_cpu(_BOTH, _LOOP, "the per-sample loop", 30),
    _augment_gpu("of the copy bandwidth", _FORWARD, 0.8, "of_limit"),
    _augment_gpu("of the copy bandwidth", _BOTH, 0.6, "of_limit"),
    *(_augment_gpu("beside kornia", direction, 20, peer=_KORNIA) for direction in (_FORWARD, _BOTH)),
    *(_augment_gpu("beside the per-sample loop", direction, 100, peer=_LOOP) for direction in (_FORWARD, _BOTH)),
    _info_nce_cpu(4096, "beside PyTorch", _PLAIN, at_least=3),
    _info_nce_cpu(4096, "beside lightly", _LIGHTLY, at_least=6),
    _info_nce_cpu(4096, "peak memory", measure="peak_mb", at_most=40),
    _info_nce_cpu(224, "beside PyTorch", _PLAIN, at_least=1),
    _info_nce_cpu(16384, "peak memory", measure="peak_mb", at_most=100),
    *(_info_nce_gpu("of the product rate", direction, 0.5, "of_limit") for direction in (_FORWARD, _BOTH)),
    _info_nce_gpu("beside lightly", _BOTH, 5, peer=_LIGHTLY),
    _info_nce_gpu("beside tiling", _BOTH, 2, peer=_TILING),
    _generator("exact, sampling", "cpu", "bigbigan B=8 128px exact", _FORWARD, 2, "ratio"),
    _generator("exact, gradient of z", "cpu", "bigbigan B=8 128px exact", _BOTH, 2, "ratio"),
    _generator("B=256, of the product rate", "cuda", "bigbigan B=256 128px (half|graph)", _FORWARD, 0.45, "of_limit"),
    _step("the step, fp32", "cpu", "navigator", "bigbigan B=8 128px", precision="fp32", at_least=2),
    _step("the step, bf16", "cpu", "navigator", "bigbigan B=8 128px", precision="bf16", at_least=3, optional=True),
    _step("beside PIL and files", "cpu", "loader", "png 128px", at_least=3),
    _step(
        "the step",
        "cuda",
        "navigator",
        "bigbigan B=.* 128px",
        measure="samples_per_s",
        at_least=2200,
        card="H200",
    ),
    _step(
        "the step, ResNet-50",
        "cuda",
        "pretrain",
        "resnet50 B=224 128px",
        measure="views_per_s",
        at_least=10_000,
        card="H200",
    ),
    _step(
        "waiting for data",
        "cuda",
        "pretrain",
        "resnet50 B=224 128px, .*pairs read",
        measure="waiting",
        at_most=0.03,
    ),
)

# Tests that show a number: issue, what is asked, where, the test's name.
SHOWN_BY_TESTS = ((4, "N=224, launches each way: <= 4", "cuda", "test_four_launches_each_way_at_the_papers_batch"),)
