"""Implementations agree; a step of several players is applied to all or none; apex is found or said to be missing."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from copgen_fast.errors import UsageError
from copgen_fast.training import optimizers

CPU = torch.device("cpu")


def model(seed=0):
    torch.manual_seed(seed)
    # In float64: where two computations are compared after Adam's steps, rounding is what those amplify.
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def inputs():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make(kind, module, impl):
    if kind == "adam":
        return optimizers.adam(module.parameters(), 1e-2, (0.5, 0.999), impl, CPU)
    if kind == "lars":
        return optimizers.lars([{"params": list(module.parameters())}], 1e-2, 0.9, 1e-4, impl, CPU)
    return optimizers.sgd(module.parameters(), 1e-2, 0.9, 1e-4, impl, CPU)


def parameters(module):
    return [value.detach().clone() for value in module.parameters()]


def train(module, optimizer, steps=4):
    x = inputs()
    for _ in range(steps):
        optimizers.descend(module(x).square().mean(), torch.amp.GradScaler("cpu", enabled=False), optimizer)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_implementations_make_the_same_updates(kind):
    trained = {}
    for impl in ("auto", "foreach", "fused"):
        module = model()
        train(module, make(kind, module, impl))
        trained[impl] = parameters(module)
    plain = model()
    torch_optimizer = (
        torch.optim.Adam(plain.parameters(), 1e-2, (0.5, 0.999))
        if kind == "adam"
        else torch.optim.SGD(plain.parameters(), 1e-2, momentum=0.9, weight_decay=1e-4)
    )
    train(plain, torch_optimizer)
    for values in trained.values():
        torch.testing.assert_close(values, parameters(plain), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(trained["auto"], trained["fused"], strict=True))


@pytest.mark.parametrize("impl", ["auto", "foreach"])
def test_lars_is_lightlys_without_norms_and_biases(impl):
    from lightly.utils.lars import LARS

    ours, theirs = (nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), *model()).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizers.lars([{"params": list(ours.parameters())}], 10.0, 0.9, 1e-2, impl, CPU)
    weights = [value for value in theirs.parameters() if value.ndim > 1]
    others = [value for value in theirs.parameters() if value.ndim == 1]
    split = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    train(ours, optimizer)
    train(theirs, LARS(split, lr=10.0, momentum=0.9, weight_decay=1e-2))
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-9, atol=1e-12)
    assert [group["lr"] for group in optimizer.param_groups] == [10.0, 10.0]


def test_lars_leaves_weights_of_zeros_to_sgd():
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = optimizers.lars([{"params": list(layer.parameters()), "scheduled": False}], 0.5, 0.0, 0.1, "auto", CPU)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, torch.full((2, 3), -0.5)) and not optimizer.param_groups[0]["scheduled"]


def test_a_checkpoint_of_another_implementation_goes_on_in_its_own():
    module = model()
    before = make("adam", module, "foreach")
    train(module, before)
    other = copy.deepcopy(module)
    after = make("adam", other, "fused")
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["fused"] is True and after.param_groups[0]["foreach"] is None
    train(module, before)
    train(other, after)
    torch.testing.assert_close(parameters(other), parameters(module), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("culprit", [0, 1, None])
def test_an_overflow_of_one_player_stops_both(impl, culprit):
    players = [model(0), model(1)]
    adams = [make("adam", player, impl) for player in players]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = inputs()
    for player in players:
        scaler.scale(player(x).square().mean()).backward()
    if culprit is not None:
        next(players[culprit].parameters()).grad[0, 0] = torch.inf
    before = [parameters(player) for player in players]
    optimizers.step(scaler, *adams)
    for player, values in zip(players, before, strict=True):
        same = [torch.equal(a, b) for a, b in zip(parameters(player), values, strict=True)]
        assert all(same) if culprit is not None else not any(same)
    assert scaler.get_scale() == (8.0 if culprit is None else 4.0)


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("kind", ["adam", "sgd", "lars"])
def test_an_overflow_of_the_first_step_leaves_nothing_behind(kind, impl):
    players = [model(), model()]
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        for player, overflows in zip(players, (True, False), strict=True):
            optimizer, scaler = make(kind, player, impl), torch.amp.GradScaler("cpu", init_scale=8.0)
            if overflows:
                scaler.scale(player(torch.full_like(inputs(), torch.inf)).sum()).backward()
                optimizers.step(scaler, optimizer)
            train(player, optimizer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*map(parameters, players), strict=True))


def test_scaled_steps_are_those_of_the_unscaled_loss():
    x = inputs()
    plain, scaled = model(), model()
    adams = [make("adam", module, "fused") for module in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two changes no digit
    for _ in range(3):
        optimizers.descend(plain(x).square().mean(), torch.amp.GradScaler("cpu", enabled=False), adams[0])
        optimizers.descend(scaled(x).square().mean(), scaler, adams[1])
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(scaled), strict=True))


def test_apex_needs_a_gpu():
    with pytest.raises(UsageError, match="--optimizer.impl apex needs a CUDA device: choose fused or auto on the CPU"):
        optimizers.resolve("apex", CPU)


def test_apex_that_is_not_there_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="NVIDIA's apex is not installed: build it from .*, or choose fused"):
        optimizers.resolve("apex", torch.device("cuda"))


@pytest.mark.parametrize("source", ["", "import nothing_of_that_name", "raise RuntimeError('old Python')"])
def test_pypis_apex_is_another_project(monkeypatch, tmp_path, source):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UsageError, match="`apex` is not NVIDIA's .PyPI's apex is another project.: uninstall it"):
        optimizers.resolve("apex", torch.device("cuda"))
    sys.modules.pop("apex", None)


def apex_modules(monkeypatch, *, compiled):
    made = []

    class Fused:
        def __init__(self, parameters, lr, **options):
            made.append((list(parameters), lr, options))

    package, module = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.__path__ = []
    module.FusedAdam = module.FusedSGD = Fused
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: package)
    if compiled:
        monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    else:
        monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    return made


def test_apexs_optimisers_are_taken_where_they_are(monkeypatch):
    made = apex_modules(monkeypatch, compiled=True)
    weights, cuda = [nn.Parameter(torch.ones(2))], torch.device("cuda")
    optimizers.adam(weights, 1e-3, (0.5, 0.999), "apex", cuda)
    optimizers.sgd(weights, 1e-3, 0.9, 1e-4, "apex", cuda)
    assert made == [
        (weights, 1e-3, {"betas": (0.5, 0.999), "adam_w_mode": False}),
        (weights, 1e-3, {"momentum": 0.9, "weight_decay": 1e-4}),
    ]


def test_apex_without_its_kernels_is_refused(monkeypatch):
    apex_modules(monkeypatch, compiled=False)
    with pytest.raises(UsageError, match="without its CUDA extensions: build it from"):
        optimizers.resolve("apex", torch.device("cuda"))
