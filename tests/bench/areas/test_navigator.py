"""The area navigator of `python -m bench`: its rows, and that the reference form takes our step; no time asserted."""

import json
from dataclasses import replace

import pytest
import torch

from bench import limits
from bench.__main__ import main
from bench.areas import _steps
from bench.areas import navigator as area
from bench.baselines import navigator as baselines
from copgen_fast import augmentations
from copgen_fast.config import EncoderConfig, NavigatorConfig
from copgen_fast.errors import CopgenError
from copgen_fast.positives.navigator import untrained
from copgen_fast.stages.navigator import alternating_step, draw_batch, make_players

OPTIONS = NavigatorConfig(estimator=EncoderConfig("resnet18", "half", 8), lr=1e-2, estimator_lr=1e-3)
TINY = area.Case("bigbigan", 3, 16, OPTIONS, width=2)
CPU = torch.device("cpu")


def test_the_command_writes_its_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(area, "CASES", (TINY, area.Case("digits", 2, 32, OPTIONS, stacked=True)))
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 16})
    monkeypatch.setattr(_steps, "precisions", lambda device, of_gpus: ("fp32", "bf16"))
    file = tmp_path / "results.json"
    assert main(["navigator", "--device", "cpu", "--repeats", "3", "--min-seconds", "0", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    found = {(row["case"], row["precision"], row["peer"]) for row in rows}
    assert found == {
        ("bigbigan B=3 16px", "fp32", "reference form, fp32"),
        ("bigbigan B=3 16px", "bf16", "reference form, fp32"),
        ("digits B=2 32px", "fp32", "reference form, fp32, views stacked"),
        ("digits B=2 32px", "bf16", "reference form, fp32, views stacked"),
    }
    for row in rows:
        assert (row["area"], row["direction"], row["n"]) == ("navigator", "step", 3)
        assert row["limit"].split()[0] != "0" and "generator three times" in row["limit"]


@pytest.mark.parametrize("can", [True, False])
def test_on_a_gpu_one_precision_is_replayed_as_a_graph_too(monkeypatch, can, capsys):
    """Seen here by a GPU that does not exist: everything but the device."""

    class Pretended:
        type = "cuda"

    def our_step(case, published, precision, device, graph=False):
        if graph and not can:
            raise CopgenError("refused")
        return lambda: None

    published = TINY.published()
    monkeypatch.setattr(area.Case, "published", lambda case: published)
    monkeypatch.setattr(published, "to", lambda device: published)
    monkeypatch.setattr(area, "_our_step", our_step)
    monkeypatch.setattr(area.devices, "resolve_precision", lambda wanted, device: "bf16")
    monkeypatch.setattr(_steps, "multiplies_bf16", lambda device: True)
    found = [(step.precision, step.backend) for step in area.our_steps(TINY, Pretended())]
    assert found == [("fp16", "pytorch"), ("bf16", "pytorch"), ("bf16", "CUDA graph")][: 3 if can else 2]
    assert ("left out" in capsys.readouterr().out) != can


def test_precisions_are_those_the_device_computes_in(monkeypatch, capsys):
    gpu = torch.device("cuda")
    for able in (True, False):
        monkeypatch.setattr(_steps, "multiplies_bf16", lambda device, able=able: able)
        assert _steps.precisions(CPU, ("fp16", "bf16")) == ("fp32", "bf16")[: 1 + able]
        assert _steps.precisions(gpu, ("fp16", "bf16")) == ("fp16", "bf16")[: 1 + able]
        assert ("left out: bf16" in capsys.readouterr().out) != able


def test_a_step_that_does_not_fit_is_left_out_with_a_line(monkeypatch, capsys):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")

    monkeypatch.setattr(limits, "SQUARE", {"cpu": 16})
    ours = [_steps.Step("fp32", fails), _steps.Step("bf16", lambda: torch.ones(3, 3) @ torch.ones(3, 3))]
    tried = _steps.Area(
        "navigator", "work", lambda case, device: iter(ours), lambda case, device: {"peer": ours[1].call}
    )
    found = list(_steps.rows(tried, (TINY,), area.Options(device="cpu", repeats=3, min_seconds=0)))
    assert [row.precision for row in found] == ["bf16"]
    assert "left out: bigbigan B=3 16px, fp32" in capsys.readouterr().out


@pytest.mark.parametrize("slices", [True, False])
def test_the_reference_form_takes_our_step(slices):
    """Without randomness in the augmentation both must learn the same: one is what the other is compared with."""
    case = replace(TINY, options=replace(OPTIONS, augmentation="none"))
    config, published = case.config("fp32"), case.published()
    T = untrained(published.latent_dim, config.navigator, config.seed)
    players = make_players(_steps.run(config, CPU), published, T)
    theirs = baselines.reference_game(
        published,
        T,
        players.f,
        augmentations.get("none"),
        lr=OPTIONS.lr,
        estimator_lr=OPTIONS.estimator_lr,
        temperature=OPTIONS.temperature,
        base_temperature=OPTIONS.base_temperature,
        slices=slices,
    )
    batch = draw_batch(config, published, 0, CPU)
    ours = alternating_step(players, batch).metrics
    loss_f, loss_T = baselines.reference_step(theirs, batch.z)
    torch.testing.assert_close(ours["loss_estimator"].detach(), loss_f, rtol=1e-4, atol=1e-5)
    # Through the updated f: Adam's first step is lr long in the gradient's sign, rounding's included.
    torch.testing.assert_close(ours["loss_navigator"].detach(), loss_T, rtol=1e-3, atol=1e-4)
    start = untrained(published.latent_dim, config.navigator, config.seed)
    for mine, other, before in zip(T.parameters(), theirs.T.parameters(), start.parameters(), strict=True):
        moved = (mine - before).abs().max()
        assert moved > 5e-3, "both stood still"
        assert ((mine - other).abs() > 0.1 * moved).float().mean() < 0.05


def test_the_reference_form_is_wasteful_as_it_was():
    """Weight gradients of the generator are computed and kept; the estimator is forwarded twice; ours does neither."""
    case = replace(TINY, options=replace(OPTIONS, augmentation="simclr"))
    published = case.published()
    game = area.their_game(case, published, CPU)
    baselines.reference_step(game, torch.randn(3, published.latent_dim))
    assert all(layers[0].conv_sc.weight.grad.abs().sum() > 0 for layers in game.G.blocks)
    assert not any(p.requires_grad for p in published.parameters()), "the peer has a copy"
    assert all(p.is_contiguous() for p in game.f.parameters())
    x = torch.rand(3, 3, 16, 16, requires_grad=True)
    views = baselines.augmented(game, x, x)
    assert views.shape == (6, 3, 16, 16)
    node, copies = views.grad_fn, 0
    while node is not None:
        copies += type(node).__name__ == "CopySlices"
        node = node.next_functions[0][0] if node.next_functions else None
    assert copies == 6, "each image is assigned into the batch"
