"""Gradients' means without processes: what is sent, when. Their values: test_distributed.py."""

import pytest
import torch
from torch import nn

from copgen_fast.runtime.distributed import Ranks
from copgen_fast.training import grad_sync
from copgen_fast.training.grad_sync import GradientSync


class Recorded:
    """A collective that adds the same numbers once more, as a second rank with equal gradients would."""

    def __init__(self, events):
        self.events = events

    def all_reduce(self, flat, group=None, async_op=False):
        assert async_op
        self.events.append(f"send {flat.numel()}")
        self.sent = flat
        flat *= 2
        return self

    def wait(self):
        self.events.append("wait")


class Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.events.append("backward of the first layer")
        return gradient, None


@pytest.fixture
def events(monkeypatch):
    events = []
    monkeypatch.setattr(grad_sync, "dist", Recorded(events))
    monkeypatch.setattr(grad_sync, "BUCKET_BYTES", 64)
    return events


def layers():
    torch.manual_seed(0)
    return nn.Linear(2, 3), nn.Linear(3, 4)


def test_they_are_sent_while_the_backward_runs(events):
    first, second = layers()
    GradientSync([*first.parameters(), *second.parameters()], Ranks(0, 2))
    second(Mark.apply(first(torch.ones(5, 2)), events)).sum().backward()
    assert events == ["send 16", "backward of the first layer", "send 9", "wait", "wait"]


def test_equal_gradients_have_themselves_as_mean(events):
    first, second = layers()
    parameters = [*first.parameters(), *second.parameters()]
    expected = torch.autograd.grad(second(first(torch.ones(5, 2))).sum(), parameters)
    GradientSync(parameters, Ranks(0, 2))
    second(first(torch.ones(5, 2))).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))


def test_a_frozen_player_sends_nothing(events):
    first, second = layers()
    for layer in (first, second):
        GradientSync(layer.parameters(), Ranks(0, 2))
    second.requires_grad_(False)
    second(first(torch.ones(5, 2))).sum().backward()
    assert events == ["send 9", "wait"]


def test_several_backwards_send_once(events):
    first, _ = layers()
    mean = GradientSync(first.parameters(), Ranks(0, 2))
    with mean.no_sync():
        first(torch.ones(5, 2)).sum().backward()
    assert events == []
    first(torch.ones(5, 2)).sum().backward()
    assert events == ["send 9", "wait"]
    assert torch.equal(first.bias.grad, torch.full((3,), 10.0))


def test_a_parameter_left_out_is_a_fault(events):
    first, second = layers()
    GradientSync([*first.parameters(), *second.parameters()], Ranks(0, 2))
    with pytest.raises(RuntimeError, match="2 parameters got no gradient in this backward, others did"):
        first(torch.ones(5, 2)).sum().backward()


def test_one_process_sends_nothing(events):
    first, _ = layers()
    GradientSync(first.parameters(), Ranks())
    first(torch.ones(5, 2)).sum().backward()
    assert events == []


def test_buckets_are_full_and_of_one_dtype(monkeypatch):
    monkeypatch.setattr(grad_sync, "BUCKET_BYTES", 80)
    single, double = torch.float32, torch.float64
    shapes = [(10, single), (8, single), (12, single), (1, double), (40, double)]
    parameters = [nn.Parameter(torch.zeros(count, dtype=dtype)) for count, dtype in shapes]
    sizes = [[parameter.numel() for parameter in bucket] for bucket in grad_sync._bucketed(parameters)]
    assert sizes == [[40], [1], [12, 8], [10]]
