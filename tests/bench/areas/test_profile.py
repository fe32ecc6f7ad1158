"""`python -m bench AREA --profile`: traces, and the phase that each operation's time belongs to."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from bench.__main__ import main
from bench.areas import _profile as profile
from bench.areas import navigator, pretrain
from copgen_fast.config import EncoderConfig, NavigatorConfig, PretrainConfig

CPU = torch.device("cpu")
SMALL = EncoderConfig("resnet18", "half", 8)


class Square(torch.autograd.Function):
    """An operator that autograd gets from Python, as ours do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient @ x.T + x.T @ gradient


@pytest.fixture
def traced(tmp_path):
    def run(step):
        return profile.profile("a step", step, CPU, tmp_path)

    return run


@pytest.mark.parametrize("marked", ["generator", "estimator"])
def test_backward_work_belongs_to_the_mark_of_its_forward(traced, marked):
    x = torch.randn(600, 600, requires_grad=True)

    def step():
        with record_function(marked):
            y = Square.apply(x) @ x
        with torch.no_grad(), record_function("augment"):
            y.detach() @ x
        with record_function("loss"):
            loss = y.square().mean()
        with record_function("backward"):
            loss.backward()

    found = traced(step)
    assert set(found.forward) == {marked, "augment", "loss", "other"}, "other is what stands around the marks"
    assert set(found.backward) <= {marked, "loss", "other"}, "the augmentation has no backward"
    # Four products of 600 x 600 numbers, beside a few passes over them; whatever else the machine does.
    assert found.backward[marked] > found.backward["loss"] > 0
    assert found.backward[marked] > found.backward.get("other", 0.0)
    assert sum((found.forward | {"": sum(found.backward.values())}).values()) == pytest.approx(found.step_ms, rel=0.1)


def test_nodes_that_an_operation_makes_beside_its_own_are_its(traced):
    """Writing in place into part of a tensor makes nodes that no operation bears the number of."""
    x = torch.randn(2000, 1000, requires_grad=True)

    def step():
        with record_function("generator"):
            y = x * 2
            y.view(1000, 2, 1000)[:, 1].add_(1)
        with record_function("loss"):
            loss = y.sum()
        with record_function("backward"):
            loss.backward()

    with torch.profiler.profile() as profiler, record_function(profile.STEP):
        step()
    assert any("CopySlices" in e.name for e in profiler.events())
    phases = profile.Phases(list(profiler.events()))
    for e in profiler.events():
        if "CopySlices" in e.name or "AsStridedBackward" in e.name:
            assert phases.of(e) == ("generator", True), e.name


def test_what_has_no_mark_is_other(traced):
    x = torch.randn(200, 200)
    found = traced(lambda: x @ x)
    assert set(found.forward) == {"other"} and not found.backward


def test_the_host_waits_for_data(traced):
    x = torch.randn(400, 400)

    def step():
        with record_function("data"):
            for _ in range(10):
                x @ x

    found = traced(step)
    assert 0.5 * found.step_ms < found.data_wait_ms <= found.step_ms


def event(name, start, us, *, parent=None, thread=1, sequence=-1, fwd_thread=0, device_us=0.0, kernel=False):
    return SimpleNamespace(
        name=name,
        thread=thread,
        sequence_nr=sequence,
        fwd_thread=fwd_thread,
        cpu_parent=parent,
        cpu_time_total=us,
        self_cpu_time_total=us,
        self_device_time_total=device_us,
        device_type=DeviceType.CUDA if kernel else DeviceType.CPU,
        is_user_annotation=False,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: us),
    )


def test_a_gpus_time_is_that_of_the_kernels_each_operation_launches(monkeypatch):
    monkeypatch.setattr(profile, "STEPS", 1)
    step = event(profile.STEP, 0, 10_000)
    mark = event("generator", 1, 100, parent=step)
    convolution = event("aten::convolution", 2, 50, parent=mark, sequence=7, device_us=3000)
    lookup = event("aten::detach", 1.5, 5, parent=step, sequence=7)
    # On a GPU the backward pass has another thread, and so other numbers.
    backward = event("ConvolutionBackward0", 60, 80, thread=2, sequence=7, fwd_thread=1)
    kernel_of_it = event("aten::convolution_backward", 61, 70, parent=backward, thread=2, sequence=0, device_us=4000)
    kernels = [event("k", 5, us, kernel=True) for us in (3000, 4000, 500)]
    found = profile.breakdown([step, mark, lookup, convolution, backward, kernel_of_it, *kernels], torch.device("cuda"))
    assert found.forward == {"generator": 3.0, "other": 0.5} and found.backward == {"generator": 4.0}
    assert (found.step_ms, found.idle_ms) == (10.0, 2.5)
    text = "\n".join(profile.lines("a step", found))
    assert "70.0%" in text and "device idle" in text and "25.0%" in text


def test_the_command_leaves_traces_and_prints_shares(monkeypatch, tmp_path, capsys):
    options = NavigatorConfig(estimator=SMALL, augmentation="simclr")
    monkeypatch.setattr(navigator, "CASES", (navigator.Case("bigbigan", 2, 16, options, width=2),))
    case = pretrain.Case(2, 16, PretrainConfig(encoder=SMALL), workers=0)
    monkeypatch.setattr(pretrain, "CASES", (case,))
    monkeypatch.setattr(pretrain, "READING", (pretrain.Reading(case, epoch=2),))
    for area, phases in (("navigator", profile.PHASES), ("pretrain", {*profile.PHASES} - {"generator"})):
        assert main([area, "--device", "cpu", "--profile", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert all(f"  {phase} " in printed for phase in phases), printed
        assert "the host waited for data" in printed
    traces = sorted(tmp_path.glob("*fp32.json"))
    assert [path.name.partition("_")[0] for path in traces] == ["navigator", "pretrain", "pretrain"]
    assert "pairs_read" in traces[1].name or "pairs_read" in traces[2].name
    assert any(found.get("name") == "augment" for found in json.loads(traces[0].read_text())["traceEvents"])
    assert main(["info_nce", "--device", "cpu", "--profile", str(tmp_path)]) == 2
    assert "no training step in info_nce" in capsys.readouterr().err
