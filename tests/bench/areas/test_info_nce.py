"""The area info_nce of `python -m bench`: its rows and its limit; no time is asserted."""

import pytest
import torch

from bench import limits
from bench.areas import info_nce as area
from bench.harness import Timing


def test_the_command_writes_its_rows(monkeypatch, measured, capsys):
    monkeypatch.setattr(area, "CASES", (area.Case(6, 4), area.Case(9, 4)))
    monkeypatch.setattr(area, "PEERS_UP_TO", {"cpu": 6})
    rows = measured("info_nce")
    assert {row["area"] for row in rows} == {"info_nce"}
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    small, large = ({row["peer"] for row in rows if row["case"] == case} for case in ("N=6 D=4", "N=9 D=4"))
    assert {"SupConLoss as published"} < small and large < small, "large cases leave out what keeps the matrix"
    assert "N=6 D=4" in capsys.readouterr().out


def test_the_limit_is_the_arithmetic_with_the_symmetry_used(monkeypatch):
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 10})
    for n, direction, gigaflop in (
        (4096, "forward", 8.59),
        (4096, "forward+backward", 34.4),
        (512, "forward+backward", 0.403),
    ):
        words, milliseconds = area.limit(area.Case(n), direction, torch.device("cpu")).read(Timing(1.0, 1, 5))
        assert words.startswith(f"{gigaflop} GFLOP")
        assert milliseconds == pytest.approx(gigaflop * 1e9 / 2000, rel=1e-2)
