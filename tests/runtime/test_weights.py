import argparse
import gzip
import os
import pathlib
import socket

import pytest
import torch
from safetensors.torch import save
from torch import nn

from copgen_fast import generators
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.runtime import artifacts, weights


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class GAN(nn.Module):
    """A class that the reader knows nothing of."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator


MODULE, OTHER = small(), small(1)
STATE = MODULE.state_dict()


def under(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


ARGUMENTS = {"args": argparse.Namespace(out=pathlib.Path("runs")), "root": pathlib.Path("/data"), "step": 3}
FORMS = {
    "plain": STATE,
    "DataParallel": under("module."),
    "compiled": under("module._orig_mod."),
    "wrapped": {"state_dict": under("generator."), "epoch": 3},
    "averaged": {"g": OTHER.state_dict(), "d": OTHER[0].state_dict(), "g_ema": STATE, **ARGUMENTS},
    "averaged by prefix": under("G_ema.") | under("G.", OTHER.state_dict()),
    "parameters": {"params": dict(MODULE.named_parameters()) | dict(MODULE.named_buffers())},
    "pickled module": GAN(MODULE),
    "parallel module": {
        "netG": nn.DataParallel(MODULE),
        "optimizer": torch.optim.Adam(MODULE.parameters()).state_dict(),
    },
    "pickled tuple": (GAN(MODULE), {"step": 3}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_weights_are_found_wherever_they_lie(tmp_path, form, zip_format, capsys):
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form], path, _use_new_zipfile_serialization=zip_format)
    found = small(2)
    artifacts.load_strictly(found, weights.load(path, found.state_dict().keys()), path)
    assert all(torch.equal(value, STATE[name]) for name, value in found.state_dict().items())
    assert ("'g_ema.' are taken, 9 others left out" in capsys.readouterr().out) == (form == "averaged")


def test_safetensors_are_known_by_their_content(tmp_path):
    (tmp_path / "weights.bin").write_bytes(save(under("module.")))
    assert weights.load(tmp_path / "weights.bin", STATE.keys()).keys() == STATE.keys()


CONTENTS = {
    "a list without tensors": [1, 2],
    r"2 tensors: a.b \[2\], c \[1\]; expected 7 tensors: 0.bias": {
        "a": {"b": torch.ones(2)},
        "c": torch.ones(1),
    },
    r"an object of class torch.nn.modules.linear.Identity without tensors": nn.Identity(),
    r"several places \(copy., model.\): save one of them alone": {"model": STATE, "copy": OTHER.state_dict()},
}


@pytest.mark.parametrize("message", CONTENTS)
def test_a_file_without_the_wanted_weights_says_what_it_holds(tmp_path, message):
    torch.save(CONTENTS[message], tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=f"odd.pth holds .*{message}"):
        weights.load(tmp_path / "odd.pth", STATE.keys())


BYTES = {
    "is empty": b"",
    "is a pointer of git-lfs.*`git lfs pull`": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "is a web page": b"\n<!DOCTYPE html><html>Sign in</html>",
    "is compressed by gzip: unpack it": gzip.compress(b"1"),
    "is truncated, altered or no checkpoint": b"hello world",
}


@pytest.mark.parametrize("message", BYTES)
def test_what_is_no_file_of_weights_is_named_with_the_remedy(tmp_path, message):
    (tmp_path / "odd.pth").write_bytes(BYTES[message])
    with pytest.raises(UsageError, match=f"odd.pth {message}.*fit.digits"):
        generators.build("digits", tmp_path / "odd.pth")


@pytest.mark.parametrize("generator", ["digits", "resnet-gan", "own"])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device", "can't be read", "is missing"])
def test_weights_that_are_no_regular_file_are_refused_at_once(tmp_path, monkeypatch, generator, kind):
    monkeypatch.chdir(tmp_path)
    path = {"a device": "/dev/zero", "can't be read": "/proc/self/mem"}.get(kind, "weights")
    if kind == "a folder":
        os.mkdir(path)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(path)
    if generator == "own":
        pathlib.Path("own.py").write_text("import torch\ndef build(weights, config):\n    return torch.load(weights)\n")
        generator = "./own.py"
        fails = {"a folder": "IsADirectoryError", "can't be read": "OSError"}.get(kind)
        kind = f"its build fails with {fails}" if fails else kind
    with pytest.raises(UsageError, match=kind):
        generators.build(generator, path)


def test_nothing_that_a_file_of_weights_names_is_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'touched'}",)

    torch.save({"g_ema": STATE, "x": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(CopgenError, match="names posix.system, which runs code"):
        weights.load(tmp_path / "evil.pth", STATE.keys())
    assert not (tmp_path / "touched").exists()
