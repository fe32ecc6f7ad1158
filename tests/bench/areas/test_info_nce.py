"""The area info_nce of `python -m bench`: its rows, its limit and its peers; no time is asserted."""

import pytest
import torch

from bench import limits
from bench.areas import info_nce as area
from bench.baselines import info_nce as baselines
from bench.harness import Timing
from copgen_fast.ops import info_nce


def test_the_command_writes_its_rows(monkeypatch, measured, capsys):
    monkeypatch.setattr(area, "CASES", (area.Case(6, 4), area.Case(9, 4)))
    monkeypatch.setattr(area, "PEERS_UP_TO", {"cpu": 6})
    rows = measured("info_nce")
    assert {row["area"] for row in rows} == {"info_nce"}
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    small, large = ({row["peer"] for row in rows if row["case"] == case} for case in ("N=6 D=4", "N=9 D=4"))
    assert {"SupConLoss as published"} < small and large < small, "large cases leave out what keeps the matrix"
    assert "N=6 D=4" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_peers_compute_our_loss(dtype):
    inputs = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    ours = info_nce(*inputs, temperature=0.2)
    for peer in (baselines.peers(0.2) | baselines.tiled(0.2)).values():
        theirs = peer(*inputs)
        torch.testing.assert_close(theirs, ours)
        torch.testing.assert_close(*(torch.autograd.grad(x, inputs, retain_graph=True) for x in (theirs, ours)))


def test_the_limit_is_the_arithmetic_with_the_symmetry_used(monkeypatch):
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 10})
    for direction, gigaflop in (("forward", 8.59), ("forward+backward", 34.4)):
        words, milliseconds = area.limit(area.Case(4096), direction, torch.device("cpu")).read(Timing(1.0, 1, 5))
        assert words.startswith(f"{gigaflop} GFLOP")
        assert milliseconds == pytest.approx(gigaflop * 1e9 / 2000, rel=1e-2)
