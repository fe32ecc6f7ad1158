"""Generators from TorchScript and torch.export files, and files of both kinds that could run code."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import UsageError

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, z):
        return self.out(self.up(z)).sigmoid()


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    network, z = Network().eval(), torch.randn(3, 6, 1, 1)
    with torch.no_grad():
        torch.jit.trace(network, z).save(folder / "torchscript.pt")
    program = torch.export.export(network, (z,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "export.pt2")
    return network, {"torchscript": folder / "torchscript.pt", "export": folder / "export.pt2"}


@pytest.mark.parametrize("name", ["torchscript", "export"])
@pytest.mark.parametrize("options", [("range=unit",), ("range=unit", "latent=6,1,1")])
def test_a_program_is_a_generator(saved, name, options):
    network, files = saved
    config = GeneratorConfig(name=name, weights=str(files[name]), options=options)
    generator = generators.load(config, CPU)
    assert (generator.latent_shape, generator.image_shape, generator.differentiable) == ((6, 1, 1), (3, 4, 4), True)
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = 2 * network(z[..., None, None]).expand(-1, 3, -1, -1) - 1
    torch.testing.assert_close(generator(z), wanted)
    assert generator(z[:0]).shape == (0, 3, 4, 4) and generator(z[:1]).shape == (1, 3, 4, 4)
    assert generator.record["weights"] == str(files[name])


@pytest.mark.parametrize("name", ["torchscript", "export"])
def test_the_range_must_be_said_and_a_file_given(saved, tmp_path, name):
    with pytest.raises(UsageError, match=f"generator {name}: .*declare image_range"):
        generators.build(name, saved[1][name])
    with pytest.raises(UsageError, match=f"generator {name} needs a program: .*--generator.weights"):
        generators.build(name)
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(UsageError, match="text.pt is no file made by torch"):
        generators.build(name, tmp_path / "text.pt")
    other = {"torchscript": "export", "export": "torchscript"}[name]
    with pytest.raises(UsageError, match=f"{saved[1][other].name} is no "):
        generators.build(name, saved[1][other])


def altered(path, to, changes=(), more=()):
    """A copy of a zip file with replaced text in its members, and with more members."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            data = old.read(name)
            for find, put in changes:
                data = data.replace(find, put) if name.endswith((".json", ".py")) else data
            if name not in {f"{top}/{member}" for member, _ in more}:
                new.writestr(name, data)
        for member, data in more:
            new.writestr(f"{top}/{member}", data)
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"torch.ops.aten.relu.default", b"torch.os.system"), "has target 'torch.os.system'"),
        ((b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default"), "has target 'torch.ops.aten.from_file"),
        ((b"torch.ops.aten.relu.default", b"_operator.methodcaller"), "has target '_operator.methodcaller'"),
        ((b'"use_pickle": false', b'"use_pickle": true'), "has use_pickle 'True'"),
        ((b"positive=True", b"_=__import__(1)"), "has expr_str .*__import__"),
        ((b'"name": "relu"', b'"name": "x=print(1)"'), "has name 'x=print"),
        ((b"builtins.tuple", b"__enum__"), "has in_spec .*__enum__"),
    ],
)
def test_exported_programs_that_could_run_code_are_refused(saved, tmp_path, change, message):
    file = altered(saved[1]["export"], tmp_path / "bad.pt2", [change])
    with pytest.raises(UsageError, match=f"bad.pt2.* {message}.*could reach beyond its tensors: it is not loaded"):
        generators.build("export", file, ["range=unit"])


def test_what_is_compiled_or_unpickled_is_refused_or_left_out(saved, tmp_path):
    torch.save({"x": Touch(tmp_path / "ran")}, stream := io.BytesIO())
    for member, data in (
        ("data/sample_inputs/model.pt", stream.getvalue()),
        ("data/sample_inputs/model.pt", pickle.dumps(Touch(tmp_path / "ran"))),
        ("data/aotinductor/model/model.so", b""),
    ):
        file = altered(saved[1]["export"], tmp_path / "bad.pt2", more=[(member, data)])
        with pytest.raises(UsageError, match="bad.pt2 holds .*could reach beyond its tensors"):
            generators.build("export", file, ["range=unit"])
    code = json.dumps([f"open({str(tmp_path / 'ran')!r}, 'w')"]).encode()
    file = altered(saved[1]["export"], tmp_path / "guard.pt2", [(b'"guards_code": []', b'"guards_code": ' + code)])
    generators.build("export", file, ["range=unit"])(torch.zeros(2, 6))
    assert not (tmp_path / "ran").exists()


def test_scripts_that_touch_files_are_refused(tmp_path):
    class Writes(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            torch.save(z, "/nowhere")
            return z

    torch.jit.script(Writes()).save(tmp_path / "writes.pt")
    with pytest.raises(UsageError, match=r"writes.pt: .* has 'save\(', which reaches beyond its tensors"):
        generators.build("torchscript", tmp_path / "writes.pt")
