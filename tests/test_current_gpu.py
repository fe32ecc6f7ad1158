"""Streams, events and graphs are the current GPU's, which need not be the one that tensors are on."""

from unittest import mock

import pytest
import torch

from copgen_fast import verify
from copgen_fast.doctor import __main__ as doctor
from copgen_fast.generators import _choice, _optimize
from copgen_fast.generators.fit import resnet_gan
from copgen_fast.runtime import devices
from copgen_fast.studies import _calibrate

SECOND = torch.device("meta")  # stands in for a GPU that isn't the current one


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda, of which every call is noted with the device that is current then."""
    current, calls = [None], []

    class device:
        def __init__(self, chosen):
            self.chosen = chosen

        def __enter__(self):
            current.append(self.chosen)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("CUDAGraph", "Stream", "Event", "current_stream", "stream", "graph"):
        noted = mock.MagicMock(
            side_effect=lambda *_, name=name, **__: calls.append((name, current[-1])) or mock.DEFAULT
        )
        noted.return_value.elapsed_time.return_value = 1.0
        monkeypatch.setattr(torch.cuda, name, noted)
    return calls


def test_a_generators_graph_is_of_its_gpu(cuda):
    _optimize.capture(lambda z, labels: z, torch.ones(2, 3, device=SECOND), None)
    assert {"graph", "Stream"} <= {name for name, _ in cuda} and {place for _, place in cuda} == {SECOND}
    assert torch.cuda.graph.call_args.kwargs["stream"] is torch.cuda.Stream.return_value


def test_ways_of_convolutions_are_timed_on_their_gpu(cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    form = lambda rewrites: lambda z, labels: 2 * z  # noqa: E731
    _choice.measured(form, (torch.ones(2, 3, device=SECOND), None), "G", torch.float16)
    assert cuda and set(cuda) == {("Event", SECOND)}


class Stopped(Exception):
    """Enough is known."""


@pytest.mark.parametrize("command", ["verify", "calibrate", "doctor", "fit"])
def test_commands_make_their_gpu_the_current_one(command, finished_run, tmp_path, monkeypatch):
    def stop(device):
        raise Stopped(str(device))

    monkeypatch.setattr(devices, "make_current", stop)
    config = resnet_gan.GanConfig(tmp_path / "gan", device="cpu")
    commands = {
        "verify": lambda: verify.main([str(finished_run), "--device", "cpu"]),
        "calibrate": lambda: _calibrate.main([str(finished_run), "--device", "cpu"]),
        "doctor": lambda: doctor.main(["--device", "cpu"]),
        "fit": lambda: resnet_gan.fit(config),
    }
    with pytest.raises(Stopped, match="cpu"):
        commands[command]()
