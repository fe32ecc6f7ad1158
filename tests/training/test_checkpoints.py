import copy
import re

import pytest
import torch
from torch import nn

from copgen_fast.errors import CorruptArtifactError
from copgen_fast.runtime import artifacts
from copgen_fast.training import checkpoints
from copgen_fast.training.checkpoints import Position


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 2)).square().sum().backward()
    for optimizer in (adam, sgd):
        optimizer.step()
    return {"model": model, "adam": adam, "sgd": sgd, "scaler": torch.amp.GradScaler("cpu", enabled=False)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(path, "test", trained(), Position(3, 1.5, 0.5))
    return path


def fresh():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizers = {
        "adam": torch.optim.Adam(model.parameters(), 0.1),
        "sgd": torch.optim.SGD(model.parameters(), 0.1, 0.9),
    }
    return {"model": model, **optimizers, "scaler": torch.amp.GradScaler("cpu", enabled=False)}


def test_what_was_saved_is_restored_to_the_bit(saved):
    state = fresh()
    assert checkpoints.restore(saved, "test", state, 5) == Position(3, 1.5, 0.5)
    for name, holder in trained().items():
        torch.testing.assert_close(state[name].state_dict(), holder.state_dict(), rtol=0, atol=0)


def put(*path, value):
    """A change of one nested field."""

    def change(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


GROUP, AVERAGES = ("state", "adam", "param_groups", 0), ("state", "adam", "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("label", value="other"), "it is of other, not of test"),
        (put("progress", value=3), "progress: expected an object, got 3"),
        (put("progress", "step", value="3"), "progress.step: expected an integer of 64 bits, got '3'"),
        (put("progress", "step", value=6), "progress: expected up to 5 steps"),
        (put("progress", "step", value=-1), "progress: expected up to 5 steps"),
        (put("progress", "seconds", value=float("nan")), "progress: expected up to 5 steps and their seconds"),
        (put("progress", "finished", value=1), "progress.finished: expected true or false, got 1"),
        (put("progress", "more", value=1), "progress.'more' is no field"),
        (put("state", value=[]), "state: expected an object"),
        (put("state", "model", value=torch.ones(2)), "state.model: expected an object"),
        (put("state", "more", value={}), "state: expected model, adam, sgd, scaler, got"),
        (
            put("state", "model", "0.weight", value=torch.ones(2, 2)),
            r"state.model.0.weight is \[2, 2\] torch.float32, exp",
        ),
        (
            put("state", "model", "0.weight", value=torch.ones(3, 2).double()),
            r"torch.float64, expected \[3, 2\] torch.float32",
        ),
        (put("state", "model", "0.weight", value="text"), r"state.model.0.weight: expected a tensor \[3, 2\], got str"),
        (lambda content: content["state"]["model"].pop("1.bias"), "state.model: other fields than expected .*1.bias"),
        (put("state", "scaler", "scale", value=1.0), "state.scaler: other fields than expected"),
        (put("state", "adam", "state", value=[]), "state.adam: other fields than expected"),
        (put(*GROUP, "lr", value="fast"), r"state.adam.param_groups\[0\].lr: expected float, got str"),
        (put(*GROUP, "betas", value=(0.9,)), r"param_groups\[0\].betas: expected 2 values"),
        (put(*GROUP, "params", value=[0, 1, 2, 2]), "param_groups: other parameters than expected"),
        (put("state", "adam", "param_groups", value=[]), "state.adam.param_groups: expected 1 groups"),
        (put(*AVERAGES, 0, "exp_avg", value=torch.ones(3, 3)), r"state.adam.state.exp_avg is \[3, 3\]"),
        (put(*AVERAGES, 0, "exp_avg", value="text"), "state.adam.state.exp_avg: expected a tensor"),
        (put(*AVERAGES, 0, value=3), "state.adam.state.0: no averages of a parameter"),
        (put(*AVERAGES, 9, value={}), "state.adam.state.9: no averages of a parameter"),
        (
            put("state", "sgd", "state", 1, "momentum_buffer", value=torch.ones(2)),
            "momentum_buffer is .2. torch.float32",
        ),
    ],
)
def test_another_field_type_or_shape_is_named(saved, change, message):
    content = copy.deepcopy(artifacts.read_checkpoint(saved))
    change(content)
    artifacts.write_checkpoint(saved, content)
    with pytest.raises(
        CorruptArtifactError, match=rf"^{re.escape(str(saved))}: .*{message}.*: delete it, and its stage"
    ):
        checkpoints.restore(saved, "test", fresh(), 5)


def test_any_flipped_bit_of_a_tensor_is_noticed(saved):
    data = saved.read_bytes()
    for value in (trained()["model"][0].weight, trained()["adam"].state_dict()["state"][0]["exp_avg"]):
        at = data.index(value.detach().numpy().tobytes())
        for bit in range(0, 8 * value.numel() * 4, 37):
            harmed = bytearray(data)
            harmed[at + bit // 8] ^= 1 << bit % 8
            saved.write_bytes(harmed)
            with pytest.raises(
                CorruptArtifactError, match=r"checkpoint.pt.*CRC.*delete it, and its stage starts again"
            ):
                checkpoints.restore(saved, "test", fresh(), 5)
