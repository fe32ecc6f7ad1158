"""The area convolutions of `python -m bench`: its rows; its methods are tested with the generators'"""

import torch

from bench.areas import convolutions as area
from copgen_fast.ops import tiles


def test_the_command_writes_its_rows(monkeypatch, measured):
    cases = area.Case(2, 4, 3, 2), area.Case(2, 3, 3, 4, upsampled=False)
    monkeypatch.setattr(area, "CASES", cases)
    rows = measured("convolutions")
    for case, ours in zip(cases, ("one transposed 4 x 4 convolution", "3 x 3 convolution"), strict=True):
        peers = {row["peer"] for row in rows if row["case"] == str(case)}
        assert peers == set(case.methods(torch.device("cpu"))) - {ours}
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}


def test_many_channels_are_convolved_in_tiles_on_a_cpu_that_has_the_extension(monkeypatch, measured):
    cases = area.Case(1, 32, 32, 2), area.Case(1, 32, 32, 4, upsampled=False)
    monkeypatch.setattr(area, "CASES", cases)
    tiled = ("products of differences, in tiles", "Winograd, F(4 x 4, 3 x 3), in tiles")
    peers = {row["peer"] for row in measured("convolutions")}
    assert peers.isdisjoint(tiled)
    assert {"one transposed 4 x 4 convolution", "3 x 3 convolution"} <= peers or not tiles.built()
