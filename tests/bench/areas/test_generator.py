"""The area generator of `python -m bench`: its rows, its ablation and its limit; no time is asserted."""

from dataclasses import fields

import pytest
import torch

from bench import limits
from bench.areas import generator as area
from bench.harness import Timing
from bench.rows import Options
from copgen_fast.generators import Rewrites


def test_the_command_writes_its_rows(monkeypatch, measured):
    cases = (area.Case(2, width=2, resolution=16), area.Case(2, width=2, resolution=16, checkpointed=True))
    monkeypatch.setattr(area, "CASES", cases)
    rows = measured("generator", "--ablate")
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    left_out = {row["case"].partition("without ")[2] for row in rows if "without" in row["case"]}
    assert left_out == {field.name for field in fields(Rewrites)}
    kept = "activations kept, same level"
    assert {row["peer"] for row in rows} == {"published form, same weights", kept, "all rewrites"}
    again = [row for row in rows if row["case"] == "bigbigan B=2 16px exact checkpointed"]
    assert [row["direction"] for row in again] == ["forward+backward"] * 2 and again[1]["peer"] == kept


def test_biggan_deep_has_its_case(monkeypatch, capsys):
    pytest.importorskip("pytorch_pretrained_biggan")
    monkeypatch.setattr(area, "CASES", (area.Case(1, width=4, network="biggan-deep"),))
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 16})
    options = Options(device="cpu", repeats=5, min_seconds=0.0)
    found = list(area.rows(options))
    assert {(row.case, row.direction, row.peer) for row in found} == {
        ("biggan-deep B=1 128px exact", direction, "published form, same weights")
        for direction in ("forward", "forward+backward")
    }
    generator = area.random_biggan(area.CASES[0])
    images = generator(torch.randn(2, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2]))
    assert 0.01 < images.std() < 0.9 and images.abs().max() < 1, "neither flat nor saturated"
    monkeypatch.setattr(area, "version", lambda package: None)
    assert list(area.rows(options)) == []
    assert "left out: biggan-deep B=1 128px exact (pip install 'copgen_fast[biggan]')" in capsys.readouterr().out


def test_stylegan2_has_its_case(monkeypatch):
    case = area.Case(1, width=2, resolution=16, network="stylegan2")
    monkeypatch.setattr(area, "CASES", (case,))
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 16})
    found = list(area.rows(Options(device="cpu", repeats=1, min_seconds=0.0)))
    assert {row.case for row in found} == {"stylegan2 B=1 16px exact"} and [row.n for row in found] == [7, 7]
    images = area.random_generator(case)(torch.randn(2, 512, generator=torch.Generator().manual_seed(0)))
    assert 0.01 < images.std() < 0.9 and 0.9 < images.abs().lt(1).double().mean(), "neither flat nor saturated"
    assert area.random_stylegan2(area.Case(1, width=64, resolution=64)).shape.channels == (512, 512, 256, 128, 64)


def test_checkpoints_keep_less(monkeypatch):
    case = area.Case(4, width=8, resolution=32)
    published, kept = area.random_bigbigan(case), []
    for checkpoint in (False, True):
        generator = area.optimize(published, checkpoint=checkpoint)
        large = {}

        def pack(x, large=large):
            large[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            generator(torch.zeros(4, generator.latent_dim, requires_grad=True))
        kept.append(sum(large.values()))
    assert kept[1] < 0.7 * kept[0]


def test_the_published_size_takes_the_published_work():
    with torch.device("meta"):
        case = area.Case(2)
        published = area.random_bigbigan(case)
        z = torch.empty(2, 120)
    # 42.24 GFLOP an image, and 0.42 a forward for the power iterations.
    found = limits.count_products(torch.no_grad()(lambda: published(z)))
    assert found / 1e9 == pytest.approx(2 * 42.24 + 0.42, rel=0.01)


def test_attentions_products_are_counted_both_ways():
    q, k, v = (torch.zeros(2, 1, rows, 8, requires_grad=True) for rows in (64, 16, 16))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    # Queries by keys and weights by values; backward both again by either side, and the weights computed once more.
    one = 2 * 2 * 64 * 16 * 8
    assert limits.count_products(torch.no_grad()(attend)) == 2 * one
    assert limits.count_products(lambda: torch.autograd.grad(attend().sum(), (q, k, v))) == 7 * one


def test_the_limit_counts_what_is_computed(monkeypatch):
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 10})
    a = torch.ones(4, 5)
    for direction, times in (("forward", 1), ("forward+backward", 2)):
        bound = area.limit(area.Case(2), direction, lambda: a @ a.T, torch.device("cpu"))
        words, milliseconds = bound.read(Timing(1.0, 1, 5))
        assert milliseconds == pytest.approx(times * 2 * 4 * 5 * 4 / 2000) and "GFLOP" in words
