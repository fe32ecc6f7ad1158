"""Comparison of files of results, and of tests (JUnit's XML), with the targets."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bench.view import files
from bench.view.targets import SHOWN_BY_TESTS, TARGETS, Target
from copgen_fast.errors import UsageError

Verdict = Literal["pass", "FAIL", "undecided", "not measured", "other card"]


@dataclass(frozen=True)
class Finding:
    """A target beside its measurement, both as text, and whether it is met; `row` is the row that decides it."""

    area: str
    claim: str
    device: str
    target: str
    measured: str
    verdict: Verdict
    optional: bool = False
    row: dict | None = field(default=None, repr=False)


def findings(paths: tuple[Path, ...]) -> list[Finding]:
    """A finding for every target and every file of tests.

    Raises:
        UsageError: a file is missing or holds neither results nor tests.
    """
    rows = files.read_all(paths)
    outcomes: dict[str, str] = {}
    found = [_finding(target, rows) for target in TARGETS]
    for path in (path for path in paths if path.suffix == ".xml"):
        tests = _outcomes(path)
        outcomes |= tests
        failed = sum(outcome == "failed" for outcome in tests.values())
        passed = sum(outcome == "passed" for outcome in tests.values())
        verdict = "FAIL" if failed or not passed else "pass"
        found.append(Finding("tests", path.stem, "any", "all pass", f"{passed} pass, {failed} fail", verdict))
    for area, claim, device, name in SHOWN_BY_TESTS:
        outcome = next((value for test, value in outcomes.items() if test.partition("[")[0] == name), "")
        verdict = {"passed": "pass", "failed": "FAIL"}.get(outcome, "not measured")
        found.append(Finding(area, claim, device, "its test passes", outcome, verdict))
    return found


def lines(found: list[Finding]) -> list[str]:
    """The table, its rows sorted by device."""
    columns = ("device", "area", "claim", "target", "measured", "verdict")
    return aligned([columns, *([getattr(x, name) for name in columns] for x in sorted(found, key=lambda x: x.device))])


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of text, in columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def met(found: list[Finding], required: str) -> bool:
    """Whether no target is missed, and all those of the device `required` were measured and decided."""
    open_ = ("not measured", "undecided")
    return not any(
        x.verdict == "FAIL" or (x.verdict in open_ and x.device == required and not x.optional) for x in found
    )


def _finding(target: Target, rows: list[dict]) -> Finding:
    about = target.of(rows)
    measured, verdict, best = "", "not measured", None
    if about:
        best = target.best(about)
        measured, verdict = target.measured(best), target.verdict(best)
        if target.card is not None and not any(target.card in row["device"] for row in about):
            verdict = "other card"
    wanted = target.wanted if target.card is None else f"{target.wanted} on {target.card}"
    return Finding(target.area, target.claim, target.device, wanted, measured, verdict, target.optional, best)


def _outcomes(path: Path) -> dict[str, str]:
    """Outcome (passed, failed or skipped) by test name."""
    if not path.is_file():
        raise UsageError(f"{path} is missing: `python -m pytest --junitxml {path}` writes it")
    try:
        cases = ElementTree.parse(path).getroot().iter("testcase")
    except ElementTree.ParseError as error:
        raise UsageError(f"{path} is not JUnit's XML ({error})") from error
    found = {}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.get("name", "")] = outcome
    return found
