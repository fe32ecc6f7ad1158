"""Batch norm over ranks without processes. Its gradients: test_distributed.py."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.training import sync_bn
from copgen_fast.training.sync_bn import GroupBatchNorm


def model():
    return ContrastiveModel(EncoderConfig(name="resnet18", stem="half", width=8))


def head():
    """As SimSiam's: BatchNorm1d, the last of them without weights."""
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4), nn.BatchNorm1d(4, affine=False)
    )


def norms(module):
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@pytest.mark.parametrize(("device", "kind"), [("cpu", GroupBatchNorm), ("cuda", nn.SyncBatchNorm)])
@pytest.mark.parametrize(("make", "count"), [(model, 20), (head, 2), (lambda: nn.BatchNorm3d(2), 1)])
def test_all_are_replaced_and_the_state_keeps_its_names(device, kind, make, count):
    module = make()
    names, parameters = list(module.state_dict()), dict(module.named_parameters())
    converted = sync_bn.convert_sync_bn(module, "sync", Ranks(0, 2), torch.device(device))
    assert [type(norm) for norm in norms(converted)] == [kind] * count
    assert list(converted.state_dict()) == names
    assert all(parameters[name] is parameter for name, parameter in converted.named_parameters())


@pytest.mark.parametrize(("bn", "ranks"), [("sync", Ranks()), ("per-rank", Ranks(0, 2))])
def test_one_process_and_per_rank_statistics_leave_it_as_it_is(bn, ranks):
    assert all(
        type(norm) is nn.BatchNorm2d for norm in norms(sync_bn.convert_sync_bn(model(), bn, ranks, torch.device("cpu")))
    )


@settings(max_examples=25, deadline=None)
@given(
    world=st.integers(1, 4),
    rows=st.integers(1, 3),
    sides=st.lists(st.integers(2, 4), min_size=0, max_size=3),
    offset=st.floats(-100, 100),
    seed=st.integers(0, 99),
    options=st.fixed_dictionaries({"affine": st.booleans(), "momentum": st.sampled_from([0.1, None])}),
)
def test_statistics_are_those_of_all_rows(world, rows, sides, offset, seed, options):
    assume(world * rows > 1)
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(sides)]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(world * rows, 3, *sides, generator=generator, dtype=torch.float64) + offset
    whole = kind(3, **options).double()
    expected, dims = whole(x), (0, *range(2, x.dim()))
    own = []

    class Gather:  # what each rank would send, and all would get
        @staticmethod
        def apply(sent, group):
            parts = x.chunk(world)
            everyones = [torch.stack([part.mean(dims), part.var(dims, correction=0)]) for part in parts]
            torch.testing.assert_close(sent[0], everyones[len(own)])
            return torch.stack(everyones)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_bn, "Gather", Gather)
        for part in x.chunk(world):
            norm = GroupBatchNorm(kind(3, **options).double(), group=None)
            own.append(norm(part))
            torch.testing.assert_close(norm.state_dict(), whole.state_dict())
    torch.testing.assert_close(torch.cat(own), expected)
    norm.eval(), whole.eval()
    torch.testing.assert_close(norm(x), whole(x))


def test_a_row_alone_is_refused(monkeypatch):
    monkeypatch.setattr(sync_bn.Gather, "apply", lambda sent, group: sent)
    with pytest.raises(ValueError, match="expected more than one value per channel in training"):
        GroupBatchNorm(nn.BatchNorm1d(3), group=None)(torch.ones(1, 3))


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"expected \[N, C, ...\], got \[3\]"):
        GroupBatchNorm(nn.BatchNorm1d(3), group=None)(torch.ones(3))
