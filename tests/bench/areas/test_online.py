"""The area online of `python -m bench`: its rows; no time is asserted."""

import pytest
import torch

from bench.areas import online as area
from copgen_fast.config import EncoderConfig


def test_the_command_writes_its_rows(monkeypatch, measured):
    tiny = area.Case(area.digits, batch=4, steps=1, epoch=2, encoder=EncoderConfig("resnet18", "half", 8))
    monkeypatch.setattr(area, "CASES", (tiny,))
    rows = measured("online")
    assert {row["case"] for row in rows} == {"digits, resnet18/8 B=4, 1 steps"}
    peers = {row["peer"].removeprefix("same steps, ") for row in rows}
    alone = {"no steps, their pairs written as PNG shards", "generation of their pairs alone"}
    assert peers == {"PNG shards", "raw shards", "batch at hand", *alone}
    assert all(row["n"] >= 7 and row["direction"] == "step" for row in rows)


@pytest.mark.parametrize("make", [area.bigbigan, area.cifar10_dcgan])
def test_random_generators_make_images_that_differ(make):
    G = make()
    images = G(torch.randn(4, G.latent_dim, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (4, 3, 32, 32) and images.std(0).mean() > 0.1


def test_the_crossing_point_is_where_the_shards_have_paid_for_their_writing():
    assert area.crossing(460, 391, 112) == "online pairs cost less than PNG shards up to 1.6 epochs"
    assert "whatever the number of epochs" in area.crossing(300, 301, 112)
