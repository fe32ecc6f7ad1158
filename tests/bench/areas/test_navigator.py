"""The area navigator of `python -m bench`: its rows, and that the reference form takes our step; no time asserted."""

from dataclasses import replace

import pytest
import torch

from bench import limits
from bench.areas import _steps
from bench.areas import navigator as area
from bench.baselines.navigator import ReferenceNavigator
from bench.rows import Options
from copgen_fast.config import EncoderConfig, NavigatorConfig
from copgen_fast.errors import CopgenError
from copgen_fast.stages.navigator import alternating_step, draw_batch

OPTIONS = NavigatorConfig(estimator=EncoderConfig("resnet18", "half", 8), lr=1e-2, estimator_lr=1e-3)
TINY = area.Case("bigbigan", 3, 16, OPTIONS, width=2)
CPU = torch.device("cpu")


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (TINY, area.Case("digits", 2, 32, OPTIONS, stacked=True)))
    monkeypatch.setattr(_steps, "precisions", lambda device, of_gpus: ("fp32", "bf16"))
    rows = measured("navigator", "--repeats", "3")
    found = {(row["case"], row["precision"], row["peer"]) for row in rows}
    assert found == {
        ("bigbigan B=3 16px", "fp32", "reference form, fp32"),
        ("bigbigan B=3 16px", "bf16", "reference form, fp32"),
        ("digits B=2 32px", "fp32", "reference form, fp32, views stacked"),
        ("digits B=2 32px", "bf16", "reference form, fp32, views stacked"),
    }
    for row in rows:
        assert (row["area"], row["direction"], row["n"]) == ("navigator", "step", 7)
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
    monkeypatch.setattr(area, "our_step", our_step)
    monkeypatch.setattr(area.devices, "resolve_precision", lambda wanted, device: "bf16")
    monkeypatch.setattr(_steps.devices, "multiplies_bf16", lambda device: True)
    found = [(step.precision, step.backend) for step in area.our_steps(TINY, Pretended())]
    assert found == [("fp16", "pytorch"), ("bf16", "pytorch"), ("bf16", "CUDA graph")][: 3 if can else 2]
    assert ("left out" in capsys.readouterr().out) != can


def test_precisions_are_those_the_device_computes_in(monkeypatch, capsys):
    gpu = torch.device("cuda")
    for able in (True, False):
        monkeypatch.setattr(_steps.devices, "multiplies_bf16", lambda device, able=able: able)
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
    found = list(_steps.rows(tried, (TINY,), Options(device="cpu", repeats=3, min_seconds=0)))
    assert [row.precision for row in found] == ["bf16"]
    assert "left out: bigbigan B=3 16px, fp32" in capsys.readouterr().out


@pytest.mark.parametrize("stacked", [False, True])
def test_the_reference_form_takes_our_step(stacked):
    """In float64, without randomness in the augmentation: one is what the other is compared with."""
    config, published = replace(TINY, options=replace(OPTIONS, augmentation="none")).config("fp32"), TINY.published()
    ours = area.players(config, published.double(), CPU)
    for player in (ours.T_z, ours.f):
        player.double()
    theirs = ReferenceNavigator(published, ours.T_z, ours.f, config.navigator, stacked)
    batch = draw_batch(config, published, 0, CPU)
    batch = replace(batch, z=batch.z.double())
    start = [p.detach().clone() for p in ours.T_z.parameters()]
    for _ in range(2):
        metrics = alternating_step(ours, batch).metrics
        loss_f, loss_T = theirs.step(batch.z)
        torch.testing.assert_close(metrics["loss_estimator"].detach(), loss_f)
        torch.testing.assert_close(metrics["loss_navigator"].detach(), loss_T)
    for mine, other, before in zip(ours.T_z.parameters(), theirs.T_z.parameters(), start, strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=1e-3 * (mine - before).abs().max().item())
        assert not torch.equal(mine, before)


def test_the_reference_form_is_wasteful_as_it_was():
    """Weight gradients of the generator are computed and kept; the estimator is forwarded twice; ours does neither."""
    config, published = TINY.config("fp32"), TINY.published()
    start = area.players(config, published, CPU)
    theirs = ReferenceNavigator(published, start.T_z, start.f, config.navigator)
    theirs.step(torch.randn(3, published.latent_dim))
    assert all(layers[0].conv_sc.weight.grad.abs().sum() > 0 for layers in theirs.G.blocks)
    assert not any(p.requires_grad for p in published.parameters()), "the peer has a copy"
    assert all(p.is_contiguous() for p in theirs.f.parameters())
    x = torch.rand(3, 3, 16, 16, requires_grad=True)
    views = theirs.views(x, x)
    assert views.shape == (6, 3, 16, 16)
    node, copies = views.grad_fn, 0
    while node is not None:
        copies += type(node).__name__ == "CopySlices"
        node = node.next_functions[0][0] if node.next_functions else None
    assert copies == 6, "each image is assigned into the batch"
