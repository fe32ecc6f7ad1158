"""Targets that measurements are to reach, as data; `python -m bench check` compares files of results with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

Measure = Literal["ratio", "of_limit", "peak_mb", "samples_per_s", "views_per_s", "waiting"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A claim about an area's rows, held against the best of those that match.

    Attributes:
        claim: what is claimed, in words.
        device: where it is measured, cpu or cuda.
        area, direction: of the rows; `case`, `precision` and `peer` are patterns for the whole text of theirs.
        measure: the number compared with `at_least` or `at_most`.
        card: the card that an absolute number is stated for; on others it is shown only.
        optional: may be missing, as not every machine can measure it.
        cheap: a peer; cases where it takes over a third of the row's peer's time don't count.
    """

    area: str
    claim: str
    device: Literal["cpu", "cuda"]
    case: str
    precision: str = ".*"
    direction: str
    peer: str = ".*"
    measure: Measure = "ratio"
    at_least: float | None = None
    at_most: float | None = None
    card: str | None = None
    optional: bool = False
    cheap: str = ""

    def of(self, rows: list[dict]) -> list[dict]:
        """The benchmark rows that this target is for, less those whose `cheap` peer takes over a third of the time."""
        dear = {(r["case"], r["precision"], r["ours_ms"]): r["peer_ms"] for r in rows if r["peer"] == self.cheap}
        cost = [dear.get((r["case"], r["precision"], r["ours_ms"]), 0.0) for r in rows]
        return [row for row, ms in zip(rows, cost, strict=True) if self.about(row) and 3 * ms <= row["peer_ms"]]

    def about(self, row: dict) -> bool:
        """Whether this target is for a benchmark row, by its area, device, case and direction."""
        return (
            (row["device"] == "cpu") == (self.device == "cpu")
            and (row["area"], row["direction"]) == (self.area, self.direction)
            and all(re.fullmatch(getattr(self, name), row[name]) for name in ("case", "precision", "peer"))
            and MEASURES[self.measure](row) is not None
        )

    def best(self, rows: list[dict]) -> dict:
        return (max if self.at_least is not None else min)(rows, key=MEASURES[self.measure])

    def verdict(self, row: dict) -> Literal["pass", "FAIL", "undecided"]:
        """Undecided: the 95 % interval has values on both sides of the target."""
        ends = self._interval(row) or (MEASURES[self.measure](row),)
        met = {x >= self.at_least if self.at_least is not None else x <= self.at_most for x in ends}
        return "undecided" if len(met) == 2 else "pass" if met.pop() else "FAIL"

    def measured(self, row: dict) -> str:
        """The row's number, and its 95 % interval where it has one."""
        ends = self._interval(row)
        interval = f" ({' to '.join(map(self.text, ends))})" if ends else ""
        return self.text(MEASURES[self.measure](row)) + interval

    def _interval(self, row: dict) -> tuple[float, float] | None:
        """Of a ratio, or what follows from it; older files have none."""
        if self.measure not in ("ratio", "waiting") or "ratio_low" not in row:
            return None
        low, high = (MEASURES[self.measure](row | {"ratio": row[end]}) for end in ("ratio_low", "ratio_high"))
        return min(low, high), max(low, high)

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
    # The peer takes the same steps without reading data.
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


_AUGMENT_CPU = partial(Target, area="augment", device="cpu", case="simclr B=64 128px", precision="fp32")
_AUGMENT_GPU = partial(Target, area="augment", device="cuda", case="simclr B=352 128px", precision="fp16")
_AUGMENT_GRAPH = partial(_AUGMENT_GPU, case="simclr B=352 128px, CUDA graph", measure="of_limit")
_INFO_NCE_CPU = partial(Target, area="info_nce", device="cpu", precision="fp32", direction=_BOTH)
_INFO_NCE_SMALL = partial(_INFO_NCE_CPU, case="N=224 D=128", peer=_PLAIN, at_least=1.3)
_INFO_NCE_GPU = partial(Target, area="info_nce", device="cuda", case="N=16384 D=128", precision="fp16")
_INFO_NCE_GRAPH = partial(_INFO_NCE_GPU, case="N=16384 D=128, CUDA graph", measure="of_limit")
_GENERATOR = partial(Target, area="generator")
_STEP = partial(Target, direction="step")
_LINEAR_AUGMENTED = partial(Target, area="probes", device="cpu", case="linear-augmented resnet18 .*", direction="epoch")
_N4096, _N16384 = (f"N={n} D=128" for n in (4096, 16384))
_BIGBIGAN, _NAVIGATOR, _RESNET50 = "bigbigan B={} 128px {}", "bigbigan B=8 128px", "resnet50 B=224 128px"

TARGETS = (
    _AUGMENT_CPU(claim="forward, beside kornia", direction=_FORWARD, peer=_KORNIA, at_least=10),
    _AUGMENT_CPU(claim="forward, beside the per-sample loop", direction=_FORWARD, peer=_LOOP, at_least=40),
    _AUGMENT_CPU(claim="forward+backward, beside kornia", direction=_BOTH, peer=_KORNIA, at_least=12),
    _AUGMENT_CPU(claim="forward+backward, beside the per-sample loop", direction=_BOTH, peer=_LOOP, at_least=30),
    # By bytes and instructions (docs/speed.md). Backward the kernels also move sums that the limit doesn't count.
    _AUGMENT_GRAPH(claim="forward, of the roofline", direction=_FORWARD, at_least=0.5),
    _AUGMENT_GRAPH(claim="forward+backward, of the roofline", direction=_BOTH, at_least=0.3),
    _AUGMENT_GPU(claim="forward, beside kornia", direction=_FORWARD, peer=_KORNIA, at_least=20),
    _AUGMENT_GPU(claim="forward+backward, beside kornia", direction=_BOTH, peer=_KORNIA, at_least=20),
    _AUGMENT_GPU(claim="forward, beside the per-sample loop", direction=_FORWARD, peer=_LOOP, at_least=100),
    _AUGMENT_GPU(claim="forward+backward, beside the per-sample loop", direction=_BOTH, peer=_LOOP, at_least=100),
    _INFO_NCE_CPU(claim="N=4096, beside PyTorch", case=_N4096, peer=_PLAIN, at_least=3),
    _INFO_NCE_CPU(claim="N=4096, beside lightly", case=_N4096, peer=_LIGHTLY, at_least=6),
    _INFO_NCE_CPU(claim="N=4096, peak memory", case=_N4096, measure="peak_mb", at_most=40),
    _INFO_NCE_SMALL(claim="N=224 forward, beside PyTorch", direction=_FORWARD),
    _INFO_NCE_SMALL(claim="N=224, beside PyTorch"),
    _INFO_NCE_CPU(claim="N=16384, peak memory", case=_N16384, measure="peak_mb", at_most=100),
    _INFO_NCE_GRAPH(claim="forward, of the product rate", direction=_FORWARD, at_least=0.5),
    _INFO_NCE_GRAPH(claim="forward+backward, of the product rate", direction=_BOTH, at_least=0.5),
    _INFO_NCE_GPU(claim="forward+backward, beside lightly", direction=_BOTH, peer=_LIGHTLY, at_least=5),
    _INFO_NCE_GPU(claim="forward+backward, beside tiling", direction=_BOTH, peer=_TILING, at_least=2),
    _GENERATOR(claim="sampling", device="cpu", case=_BIGBIGAN.format("8", "exact"), direction=_FORWARD, at_least=2),
    _GENERATOR(claim="gradient of z", device="cpu", case=_BIGBIGAN.format("8", "exact"), direction=_BOTH, at_least=2),
    _GENERATOR(
        claim="B=256, of the product rate",
        device="cuda",
        case=_BIGBIGAN.format("256", "(half|graph)"),
        direction=_FORWARD,
        measure="of_limit",
        at_least=0.35,  # by arithmetic 0.48 at best: the rest is bytes (docs/speed.md)
    ),
    _STEP(area="navigator", claim="fp32", device="cpu", case=_NAVIGATOR, precision="fp32", at_least=2),
    _STEP(area="navigator", claim="bf16", device="cpu", case=_NAVIGATOR, precision="bf16", at_least=3, optional=True),
    _STEP(area="loader", claim="beside PIL and files", device="cpu", case="png 128px", at_least=3),
    _STEP(area="images", claim="packed JPEG, beside ImageFolder", device="cpu", case="jpeg 128px read.*", at_least=5),
    _STEP(area="images", claim="packed raw, beside ImageFolder", device="cpu", case="raw 128px read.*", at_least=10),
    _STEP(area="images", claim="packing, beside Pillow", device="cpu", case="jpeg 128px packed", at_least=1.5),
    _LINEAR_AUGMENTED(claim="linear-augmented, fp32", precision="fp32", at_least=2),
    _LINEAR_AUGMENTED(claim="linear-augmented, bf16", precision="bf16", at_least=3.5, optional=True),
    Target(
        area="probes",
        claim="linear-grid to its answer",
        device="cpu",
        case="linear-grid .*",
        precision="fp32",
        direction="answer",
        at_least=20,
    ),
    _STEP(
        area="navigator",
        claim="throughput",
        device="cuda",
        case="bigbigan B=.* 128px",
        measure="samples_per_s",
        at_least=2200,
        card="H200",
    ),
    _STEP(
        area="pretrain",
        claim="ResNet-50, throughput",
        device="cuda",
        case=_RESNET50,
        measure="views_per_s",
        at_least=10_000,
        card="H200",
    ),
    _STEP(
        area="pretrain",
        claim="ResNet-50, waiting for data",
        device="cuda",
        case=f"{_RESNET50}, .*pairs read",
        measure="waiting",
        at_most=0.03,
    ),
    _STEP(
        area="online",
        claim="waiting for a generator that costs under a third of the step",
        device="cuda",
        case=".*",
        peer="same steps, batch at hand",
        measure="waiting",
        at_most=0.05,
        cheap="generation of their pairs alone",
        optional=True,
    ),
)

SHOWN_BY_TESTS = (
    ("info_nce", "N=224, <= 4 launches each way", "cuda", "test_four_launches_each_way_at_the_papers_batch"),
)
"""Claims that a test shows: area, claim, device, the test's name."""
