"""The grid of linear probes: heads trained at once equal heads trained alone, and nothing is chosen on test images."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast import evals
from copgen_fast.config import DataConfig, ProbeConfig, RunConfig
from copgen_fast.errors import NonFiniteError, UsageError
from copgen_fast.evals import evaluate, linear_augmented, linear_grid
from copgen_fast.evals.linear_grid import Cache, Config, standardisation, train
from copgen_fast.runtime import interrupts, seeds
from copgen_fast.stages import Run

CPU = torch.device("cpu")
SMALL = ("linear-grid.passes=2", "linear-grid.epochs=4", "linear-grid.augmentation=none")


def run_on_digits(*options, size=8):
    probe = ProbeConfig(("linear-grid",), (*SMALL, *options))
    return Run(RunConfig(data=DataConfig("digits", image_size=size), probe=probe), Path(), CPU)


def test_heads_trained_at_once_equal_heads_trained_alone():
    torch.manual_seed(0)
    features, labels = torch.randn(3, 50, 6).half(), torch.arange(50) % 4
    grid, config = [(0.5, 0.0), (2.0, 0.01), (0.1, 0.1)], Config(epochs=4, batch=16)
    rows = torch.arange(0, 50, 2)
    heads = train(Cache(features, labels), rows, grid, config, run_on_digits())
    mean, inverse = standardisation(features[0], CPU)
    torch.testing.assert_close(inverse, 1 / features[0].float().std(0, correction=0), rtol=1e-4, atol=0)
    for number, (lr, decay) in enumerate(grid):
        head = nn.Linear(6, 4)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        sgd = torch.optim.SGD(head.parameters(), lr, 0.9, weight_decay=decay)
        step = 0
        for epoch in range(4):
            order = torch.randperm(25, generator=seeds.generator(0, "linear-grid", "heads", epoch))
            for chosen in order.split(16):
                at = rows[chosen]
                x = torch.stack([features[(int(i) + epoch) % 3, int(i)].float() for i in at])
                sgd.param_groups[0]["lr"] = lr * 16 / 256 * (1 + math.cos(math.pi * step / 8)) / 2
                sgd.zero_grad()
                F.cross_entropy(head((x - mean) * inverse), labels[at]).backward()
                sgd.step()
                step += 1
        torch.testing.assert_close(heads.weight[:, number].T, head.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[number], head.bias, rtol=1e-4, atol=1e-5)


def test_pixels_of_digits_are_read_and_the_memory_is_said(capsys):
    encoder = nn.Flatten()
    found = evaluate("linear-grid", encoder, run_on_digits())
    assert found["linear_grid_top1"] > 0.85 and found["linear_grid_held_out_top1"] > 0.85
    assert found["linear_grid_top5"] > found["linear_grid_top1"]
    assert found["grid_lr"] in Config().lrs and found["grid_weight_decay"] in Config().weight_decays
    assert "linear-grid: 2 x 1,437 features of 192 numbers in half precision, 0.0011 GB" in capsys.readouterr().out
    assert found == evaluate("linear-grid", nn.Flatten(), run_on_digits())


def test_the_first_view_is_the_centre_and_the_others_are_augmented():
    run = run_on_digits("linear-grid.augmentation=no-color")
    frozen, data = evals.freeze(nn.Flatten(), run), evals.real_images(run)
    first, second = linear_grid.encode(frozen, data, Config(passes=2), 0).features
    assert first.equal(frozen.split_features(data, "train", linear_augmented.centre(8)).features.half())
    assert not (second == first).all(1).any()


def test_test_images_choose_nothing(monkeypatch):
    """With the test labels turned round, the same head is chosen by the same number."""
    from copgen_fast.images import sets

    first = evaluate("linear-grid", nn.Flatten(), run_on_digits())
    open_set = sets.open_set

    def turned(*arguments, **options):
        data = open_set(*arguments, **options)
        data.splits["test"].labels.copy_(9 - data.splits["test"].labels)
        return data

    monkeypatch.setattr(sets, "open_set", turned)
    second = evaluate("linear-grid", nn.Flatten(), run_on_digits())
    assert second["linear_grid_top1"] < 0.2
    for name in ("linear_grid_held_out_top1", "grid_lr", "grid_weight_decay"):
        assert first[name] == second[name]


def test_heads_that_diverge_are_not_chosen():
    found = evaluate(
        "linear-grid", nn.Flatten(), run_on_digits("linear-grid.lrs=0.03,1000", "linear-grid.weight_decays=1")
    )
    assert found["grid_lr"] == 0.03 and found["linear_grid_top1"] > 0.5


def test_constant_features_are_left_out():
    features = torch.randn(100, 3).half()
    features[:, 1] = 900 + features[:, 1] / 100
    _, inverse = standardisation(features, CPU)
    assert inverse[1] == 0 and (inverse[[0, 2]] > 0.5).all()


def test_features_that_do_not_fit_are_refused_before_any_pass(monkeypatch):
    calls = []
    encoder = lambda images: calls.append(len(images)) or images.flatten(1)  # noqa: E731
    monkeypatch.setattr(linear_grid, "available_memory", lambda device: 0.8)
    with pytest.raises(UsageError, match=r"keeps 2 x 1,437 features of 192 .*: linear-grid.passes=1 would fit"):
        evaluate("linear-grid", encoder, run_on_digits())
    assert calls == [2]
    monkeypatch.setattr(linear_grid, "available_memory", lambda device: 0.1)
    with pytest.raises(UsageError, match="take linear-augmented"):
        evaluate("linear-grid", nn.Flatten(), run_on_digits())


def test_features_beyond_half_precision_are_named():
    with pytest.raises(NonFiniteError, match="beyond half precision"):
        evaluate("linear-grid", lambda images: 1e5 * images.flatten(1), run_on_digits())


@pytest.mark.parametrize(("word", "message"), [("passes=0", "passes: expected"), ("lrs=", "lrs, weight_decays")])
def test_options_out_of_range(word, message):
    with pytest.raises(UsageError, match=message):
        evaluate("linear-grid", nn.Flatten(), run_on_digits(f"linear-grid.{word}"))


def test_a_requested_stop_ends_it(monkeypatch):
    monkeypatch.setattr(linear_grid, "stop_requested", lambda: True)
    with pytest.raises(interrupts.Interrupted, match="stopped in linear-grid"):
        evaluate("linear-grid", nn.Flatten(), run_on_digits())
