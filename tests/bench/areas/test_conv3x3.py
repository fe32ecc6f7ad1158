"""The area conv3x3 of `python -m bench`: its rows, its limit and its peer; no time is asserted."""

import torch
from torch import nn

from bench.areas import conv3x3 as area
from bench.baselines import conv3x3 as baselines
from bench.limits import count_products
from bench.rows import in_direction
from copgen_fast.ops import Conv3x3, conv3x3, tiles

CASE = area.Case(4, 32, 12)


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (CASE,))
    rows = measured("conv3x3")
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    assert {row["case"] for row in rows} == {"B=4 C=32 12px"}


def test_the_peer_computes_ours():
    x, weight, _ = area.drawn(CASE)
    (peer,) = baselines.peers().values()
    torch.testing.assert_close(peer(x, weight), conv3x3(x, weight), rtol=1e-4, atol=1e-4)


def test_what_a_step_is_compared_with_convolves_by_pytorch():
    network = nn.Sequential(Conv3x3(32, 32), nn.ReLU(), Conv3x3(32, 32))
    copied, x = baselines.by_pytorch(network), area.drawn(CASE)[0]
    by_pytorch = [nn.Conv2d(32, 32, 3, padding=1) for _ in range(2)]
    for conv, layer in zip(by_pytorch, (network[0], network[2]), strict=True):
        conv.load_state_dict(layer.state_dict())
    assert torch.equal(copied(x), nn.Sequential(by_pytorch[0], nn.ReLU(), by_pytorch[1])(x))
    assert {layer.backend for layer in network if isinstance(layer, Conv3x3)} == {None}, "a copy"


def test_the_limit_is_the_products_that_are_counted():
    x, weight, grad = area.drawn(CASE)
    for direction, passes in (("forward", 1), ("forward+backward", 3)):
        counted = count_products(in_direction(direction, conv3x3, [x, weight], grad))
        assert counted == passes * 2 * 4 * 32**2 * (9 * 36 if tiles.built() else 9 * 144)
        assert area.limit(CASE, direction, x.device).read is not None
