"""Batch norm of several ranks without processes. Its gradients: test_distributed.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.training import sync_bn
from copgen_fast.training.sync_bn import GroupBatchNorm2d


def model():
    return ContrastiveModel(EncoderConfig(name="resnet18", stem="half", width=8))


def norms(module):
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@pytest.mark.parametrize(("device", "kind"), [("cpu", GroupBatchNorm2d), ("cuda", nn.SyncBatchNorm)])
def test_all_are_replaced_and_the_state_keeps_its_names(device, kind):
    module = model()
    names, parameters = list(module.state_dict()), dict(module.named_parameters())
    spread = sync_bn.convert_sync_bn(module, "sync", Ranks(0, 2), torch.device(device))
    assert len(norms(spread)) == 20 and all(type(norm) is kind for norm in norms(spread))
    assert list(spread.state_dict()) == names
    assert all(parameters[name] is parameter for name, parameter in spread.named_parameters())


@pytest.mark.parametrize(("bn", "ranks"), [("sync", Ranks()), ("per-rank", Ranks(0, 2))])
def test_one_process_and_per_rank_statistics_leave_it_as_it_is(bn, ranks):
    assert all(
        type(norm) is nn.BatchNorm2d for norm in norms(sync_bn.convert_sync_bn(model(), bn, ranks, torch.device("cpu")))
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.floats(-100, 100), st.integers(0, 99))
def test_statistics_are_those_of_all_rows(world, rows, side, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(world * rows, 3, side, side, generator=generator, dtype=torch.float64) + offset
    whole = nn.BatchNorm2d(3).double()
    expected = whole(x)
    own = []

    class Gather:  # what each rank would send, and all would get
        @staticmethod
        def apply(sent, group):
            parts = x.chunk(world)
            everyones = [torch.stack([part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)]) for part in parts]
            torch.testing.assert_close(sent[0], everyones[len(own)])
            return torch.stack(everyones)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_bn, "Gather", Gather)
        for part in x.chunk(world):
            norm = GroupBatchNorm2d(nn.BatchNorm2d(3).double(), group=None)
            own.append(norm(part))
            torch.testing.assert_close(norm.state_dict(), whole.state_dict())
    torch.testing.assert_close(torch.cat(own), expected)
    norm.eval(), whole.eval()
    torch.testing.assert_close(norm(x), whole(x))
