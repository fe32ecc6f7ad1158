"""The area cond_norm of `python -m bench`: its rows, its limit and its peers; no time is asserted."""

import pytest
import torch

from bench.areas import cond_norm as area
from bench.baselines import cond_norm as baselines
from bench.harness import Timing
from copgen_fast.ops import cond_norm


@pytest.fixture(autouse=True)
def compiles_at_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (area.Case(2, 5, 4), area.Case(1, 3, 6, layout="NCHW", upsample=True)))
    rows = measured("cond_norm")
    cases = {"B=2 C=5 4px NHWC", "B=2 C=5 4px NHWC in place", "B=1 C=3 6px NCHW upsampled"}
    assert {row["case"] for row in rows} == cases
    for case in cases:
        directions = [row["direction"] for row in rows if row["case"] == case]
        assert directions == ["forward"] * 2 + ["forward+backward"] * 2 * ("in place" not in case)


@pytest.mark.parametrize("upsample", [False, True])
def test_the_peers_compute_ours(upsample):
    inputs, _ = area.drawn(area.Case(2, 5, 4, upsample=upsample), torch.device("cpu"))
    peers = baselines.peers(upsample)
    assert len(peers) == 2
    for peer in peers.values():
        torch.testing.assert_close(peer(*inputs), cond_norm(*inputs, upsample=upsample))


def test_the_limit_is_the_bytes_there_are_to_move():
    inputs, grad = area.drawn(area.Case(2, 5, 4, upsample=True), torch.device("cpu"))
    for direction, small, large in (("forward", 1, 1), ("forward+backward", 3, 2)):
        words, _ = area.limit(inputs[0], grad, direction).read(Timing(1.0, 1, 5))
        moved = (small * inputs[0].nbytes + large * grad.nbytes) / 1e6
        assert words.endswith(f"{moved / 2:.1f} MB read, {moved / 2:.1f} MB written")
