"""What is sent when gradients are averaged, seen by a communication hook. Their values: test_distributed.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from copgen_fast.runtime.distributed import Ranks
from copgen_fast.training.grad_sync import data_parallel, no_sync

WIDTH = 600  # 1.4 MB a layer: more than the first bucket takes


@pytest.fixture
def ranks():
    """The first of two ranks, in a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 2, dist.group.WORLD)
    dist.destroy_process_group()


def recorded(module, ranks):
    """The module on several ranks, and the shapes in each bucket that it sends."""
    sent = []

    def hook(_, bucket):
        sent.append([tuple(parameter.shape) for parameter in bucket.parameters()])
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    called = data_parallel(module, ranks)
    called.register_comm_hook(None, hook)
    return called, sent


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))


def test_buckets_are_the_same_in_each_backward(ranks):
    """Else a resumed run would add in another order than one that was not killed."""
    called, sent = recorded(layers(), ranks)
    for _ in range(3):
        called(torch.ones(5, 2)).sum().backward()
    count = len(sent) // 3
    assert count > 1 and sent == 3 * sent[:count]
    assert sorted(shape for bucket in sent[:count] for shape in bucket) == sorted(
        tuple(parameter.shape) for parameter in called.parameters()
    )


def test_a_frozen_module_sends_nothing_and_passes_the_gradient(ranks):
    (first, sent_first), (second, sent_second) = (recorded(nn.Linear(3, 3), ranks) for _ in range(2))
    for frozen in (True, False):
        second.requires_grad_(not frozen)
        second(first(torch.ones(5, 3))).sum().backward()
        assert (len(sent_first), len(sent_second)) == ((1, 0) if frozen else (2, 1))


def test_several_backwards_send_once(ranks):
    called, sent = recorded(nn.Linear(2, 3), ranks)
    with no_sync(called):
        called(torch.ones(5, 2)).sum().backward()
    assert sent == []
    called(torch.ones(5, 2)).sum().backward()
    assert len(sent) == 1
    assert torch.equal(called.bias.grad, torch.full((3,), 10.0))


def test_attributes_and_state_are_the_modules(ranks):
    module = nn.Linear(2, 3)
    module.note = "kept"
    called = data_parallel(module, ranks)
    assert called.note == "kept" and called.weight is module.weight
    assert list(called.state_dict()) == ["weight", "bias"]
    called.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert torch.equal(module.weight, torch.ones(3, 2))
    with pytest.raises(AttributeError, match="nothing"):
        called.nothing  # noqa: B018


def test_one_process_sends_nothing():
    module = nn.Linear(2, 3)
    assert data_parallel(module, Ranks()) is module
    with no_sync(module):
        module(torch.ones(5, 2)).sum().backward()
