"""The area add_upsampled of `python -m bench`: its rows, its limit and its peers; no time is asserted."""

import torch

from bench.areas import add_upsampled as area
from bench.baselines import add_upsampled as baselines
from bench.harness import Timing
from copgen_fast.ops import add_upsampled

CASE, CPU = area.Case(2, 5, 4), torch.device("cpu")


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (CASE,))
    rows = measured("add_upsampled")
    assert [(row["case"], row["direction"]) for row in rows] == [
        *[("B=2 C=5 4px", "forward")] * 2,
        ("B=2 C=5 4px", "forward+backward"),
    ]


def test_the_peers_compute_ours():
    x, small, _, bias = area.drawn(CASE, CPU)
    bias = bias[0, :, 0, 0]
    for peer in baselines.peers("forward").values():
        torch.testing.assert_close(peer(x.clone(), small, bias), add_upsampled(x, small, bias))


def test_the_limit_is_the_bytes_there_are_to_move():
    x, small, *_ = area.drawn(CASE, CPU)
    for direction, moved in (("forward", 2 * 640 + 160), ("forward+backward", 3 * 640 + 2 * 160)):
        words, _ = area.limit(x, small, direction).read(Timing(1.0, 1, 5))
        assert words.endswith(f"{moved * 1e-6:.1f} MB read, {moved * 1e-6:.1f} MB written")
