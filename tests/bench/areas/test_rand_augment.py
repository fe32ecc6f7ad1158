"""The area rand_augment of `python -m bench`: its rows and its peers; no time is asserted."""

import torch

from bench.areas import rand_augment as area
from bench.baselines import rand_augment as baselines
from copgen_fast.ops import RandAugmentParams, RandAugmentPolicy, rand_augment
from copgen_fast.ops.rand_augment.params import AFFINE, OPERATIONS


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (area.Case(3, 12),))
    rows = measured("rand_augment")
    cases = ["infomin B=3 12px"] * 2 + ["infomin B=3 12px, all drawn and applied"] * 2
    assert [row["case"] for row in rows] == cases and all(row["n"] >= 7 for row in rows)
    assert all(0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)


def test_the_peers_with_the_same_parameters_do_the_same():
    names = tuple(name for name in OPERATIONS if name not in (*AFFINE, "SolarizeAdd"))
    policy = RandAugmentPolicy(steps=1, probability=1, operations=names)
    uniform = torch.rand(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = RandAugmentParams.from_uniform(uniform, policy)
    images = torch.rand(20, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    ours = rand_augment(images, params)
    for name, peer in baselines.peers(params).items():
        assert (peer(images) - ours).abs().max() < (1e-6 if "PIL" in name else 2.1 / 255)
