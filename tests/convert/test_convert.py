import argparse
import hashlib
import importlib
import json
import pathlib
import pickle
import re
import sys
import uuid

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from copgen_fast.config import EncoderConfig
from copgen_fast.convert.__main__ import main
from copgen_fast.convert.encoder_names import SPELLINGS
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.files import sha256
from copgen_fast.positives.navigator import Navigator
from copgen_fast.runtime import artifacts, latents
from tests.helpers.encoder_fixtures import equal, randomised, small, supcon_names, without_fc


def fails(capsys, *arguments):
    """The one line that a refused command ends with."""
    assert main([str(argument) for argument in arguments]) in (1, 2)
    line = capsys.readouterr().err
    assert line.startswith("copgen_fast: ") and line.count("\n") == 1
    return line


# Navigators


class NonlinearWalk(nn.Module):
    """The reference's module, as far as its pickle shows it."""

    def __init__(self, dim, hidden=None, between=True):
        super().__init__()
        hidden = hidden or dim
        layers = [nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)]
        self.walker = nn.Sequential(*(layers if between else layers[::2]))


class LinearWalk(NonlinearWalk):
    def __init__(self, dim):
        super().__init__(dim, between=False)


@pytest.fixture
def as_script(monkeypatch):
    """Pickle the two classes by the names that the reference's script gave them."""
    for cls in (NonlinearWalk, LinearWalk):
        monkeypatch.setattr(cls, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], cls.__name__, cls, raising=False)


@pytest.mark.parametrize("kind", ["nonlinear", "linear"])
@pytest.mark.parametrize("form", ["parallel", "module", "state", "parallel state", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_released_navigator_is_imported_to_the_bit(tmp_path, as_script, capsys, kind, form):
    torch.manual_seed(0)
    walk = (NonlinearWalk if kind == "nonlinear" else LinearWalk)(120)
    content = nn.DataParallel(walk) if form in ("parallel", "parallel state", "legacy") else walk
    if form.startswith("parallel"):  # as on the machine of the release: four devices
        content.device_ids, content.output_device, content.src_device_obj = [0, 1, 2, 3], 0, torch.device("cuda:0")
    content = content.state_dict() if form.endswith("state") else content
    source, out = tmp_path / "walk.pth", tmp_path / "run" / "navigator.safetensors"
    torch.save({"nn_walker": content}, source, _use_new_zipfile_serialization=form != "legacy")
    assert main(["navigator", str(source), str(out)]) == 0

    navigator = Navigator(120, kind)
    artifacts.load_strictly(navigator, artifacts.read_tensors(out), out)
    assert equal(navigator.state_dict(), dict(walk.state_dict()))
    with safe_open(out, "pt") as file:
        record = json.loads(file.metadata()["copgen_fast"])
    assert (record["kind"], record["latent_dim"]) == (kind, 120)
    assert record["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    lengths = {}
    for prior in ("normal", "truncnorm"):
        z = latents.sample(prior, 0, (10_000, 120))
        with torch.no_grad():
            lengths[prior] = walk.walker(z).norm(dim=1).mean().item()
        assert record["displacement_norm"][prior] == pytest.approx(lengths[prior], abs=1e-3)
    printed = capsys.readouterr().out
    assert f"a {kind} navigator, sha256 {record['source_sha256']}" in printed
    assert "walker.0.weight [120, 120]" in printed and str(record["displacement_norm"]["normal"]) in printed
    assert ("--navigator.kind linear" in printed) == (kind == "linear")


def test_one_source_gives_one_file(tmp_path, as_script):
    torch.save({"nn_walker": NonlinearWalk(8)}, tmp_path / "walk.pth")
    for out in ("a", "b"):
        assert main(["navigator", str(tmp_path / "walk.pth"), str(tmp_path / f"{out}.safetensors")]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_hidden_layer_of_another_width_is_imported_with_it(tmp_path, as_script, capsys):
    source, out = tmp_path / "walk.pth", tmp_path / "out.safetensors"
    torch.save({"nn_walker": NonlinearWalk(8, hidden=4)}, source)  # the reference's --reduction_ratio 2
    assert main(["navigator", str(source), str(out)]) == 0
    assert "use it with --navigator.hidden 4" in capsys.readouterr().out
    artifacts.load_strictly(Navigator(8, hidden=4), artifacts.read_tensors(out), out)


def test_what_is_no_navigator_is_refused_by_name(tmp_path, as_script, capsys):
    source, out = tmp_path / "walk.pth", tmp_path / "out.safetensors"
    bad = NonlinearWalk(8)
    bad.walker[0].bias.data[3] = float("nan")
    tanh = NonlinearWalk(8)
    tanh.walker[1] = nn.Identity()
    deep = NonlinearWalk(8)
    deep.walker.append(nn.Linear(8, 8))
    narrow = NonlinearWalk(8, hidden=4)
    narrow.walker[0] = nn.Linear(8, 3)
    cases = [
        (narrow, r"walker.2.weight is \[8, 4\] torch.float32, expected \[8, 3\]"),
        (NonlinearWalk(8).double(), "float64"),
        (bad, "walker.0.bias holds NaN"),
        (tanh, "no navigator of two layers: .*Identity"),
        (deep, "no navigator of two layers: .*walker.3.weight"),
        (nn.Conv2d(1, 1, 1), "no navigator of two layers: weight"),
        (nn.Tanh(), "no navigator of two layers: Tanh"),
        (3, "holds no navigator"),
    ]
    for content, message in cases:
        torch.save({"nn_walker": content}, source)
        line = fails(capsys, "navigator", source, out)
        assert re.search(message, line) and str(source) in line
    torch.save({"model": {"x": torch.ones(1)}, "epoch": 3}, source)
    assert "holds no navigator (nn_walker), but 1 tensors: model.x [1]" in fails(capsys, "navigator", source, out)
    assert not out.exists()


def test_pairs_are_made_from_an_imported_navigator(tmp_path, as_script, capsys):
    from copgen_fast.train import main as train
    from tests.conftest import TINY

    torch.save({"nn_walker": nn.DataParallel(NonlinearWalk(64))}, tmp_path / "walk.pth")
    run = tmp_path / "run"
    imported = run / "navigator" / "navigator.safetensors"
    assert main(["navigator", str(tmp_path / "walk.pth"), str(imported)]) == 0
    digest = sha256(imported)
    command = [*TINY, "--stages", "navigator", "pairs", "--pairs.positives", "navigator", "--out", str(run)]
    assert train(command) == 0 and train(command) == 0
    assert sha256(imported) == digest
    assert digest in (run / "pairs" / "navigator" / "index.json").read_text()
    stray = tmp_path / "stray"
    for name in ("navigator.safetensors", "notes.txt"):
        artifacts.write_bytes(stray / "navigator" / name, b"")
    assert train([*TINY, "--out", str(stray)]) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err


# Encoders


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("spelling", "suffix"),
    [(s, suffix) for s in SPELLINGS if s != "copgen-model" for suffix in (".safetensors", ".pth")]
    + [("detectron2", ".pkl")],
)
def test_files_keep_every_bit_there_and_back(tmp_path, name, spelling, suffix, capsys):
    state = small(name)
    source, middle, back = tmp_path / "source.pth", tmp_path / f"middle{suffix}", tmp_path / "back.safetensors"
    torch.save(state, source)
    assert main(["encoder", str(source), str(middle), "--to", spelling]) == 0
    given = spelling if name == "resnet18" else "auto"
    assert main(["encoder", str(middle), str(back), "--from", given, "--to", "copgen"]) == 0
    assert equal(artifacts.read_tensors(back), without_fc(state))
    printed = capsys.readouterr().out
    assert "left out the classifier: fc.weight, fc.bias" in printed and f"{name} of width 8" in printed
    if suffix == ".pkl":
        content = pickle.loads(middle.read_bytes(), encoding="latin1")
        assert content.keys() == {"model", "__author__", "matching_heuristics"} and content["matching_heuristics"]
        assert all(isinstance(value, np.ndarray) for value in content["model"].values())
        assert b"numpy.core.multiarray" in middle.read_bytes() and b"numpy._core" not in middle.read_bytes()[:500]
    elif suffix == ".pth":
        torch.load(middle, weights_only=True)


def supcon_checkpoint(head=True, prefix=""):
    """A file as main_unified saves it."""
    model = ContrastiveModel(EncoderConfig(name="resnet50", stem="imagenet", width=8))
    state = supcon_names(randomised(model.encoder.state_dict()))
    state |= {f"head.{name}": value for name, value in randomised(model.head.state_dict(), 1).items()} if head else {}
    state = {name.replace("encoder.", f"encoder.{prefix}", 1): value for name, value in state.items()}
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    return {
        "opt": argparse.Namespace(batch_size=224, epochs=[1, 2], cosine=True),
        "model": state,
        "optimizer": optimizer.state_dict(),
        "grad_updates": 5,
        "class_count": np.zeros(1000),
        "epoch": 100,
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_reference_checkpoints_keep_their_head(tmp_path, prefix, capsys):
    content = supcon_checkpoint(prefix=prefix)
    plain = {name.replace("encoder.module.", "encoder."): value for name, value in content["model"].items()}
    source, ours, back = tmp_path / "last.pth", tmp_path / "ours.safetensors", tmp_path / "back.pth"
    torch.save(content, source)
    assert main(["encoder", str(source), str(ours), "--to", "copgen-model"]) == 0
    model = ContrastiveModel(EncoderConfig(name="resnet50", stem="imagenet", width=8))
    artifacts.load_strictly(model, artifacts.read_tensors(ours), ours)
    assert torch.equal(model.head[2].bias, plain["head.2.bias"])
    parallel = ["--parallel"] if prefix else []
    assert main(["encoder", str(ours), str(back), "--to", "supcon", *parallel]) == 0
    written = torch.load(back, weights_only=True)
    assert written.keys() == {"model"} and equal(written["model"], content["model"])
    assert main(["encoder", str(source), str(ours), "--to", "copgen", "--overwrite"]) == 0
    assert equal(artifacts.read_tensors(ours), dict(model.encoder.state_dict()))
    assert "left out the projection head: head.0.weight" in capsys.readouterr().out


def test_what_lies_beside_an_encoder_is_left_out_and_said(tmp_path, capsys):
    encoder = small("resnet18", classifier=False)
    content = {
        "state_dict": {f"module.encoder_q.{name}": value for name, value in encoder.items()}
        | {"module.queue": torch.ones(3)},
        "args": argparse.Namespace(data=pathlib.Path("/data"), device=torch.device("cpu")),
        "git": uuid.UUID(int=3),
        "seen": np.array(["a", None], dtype=object),
    }
    source, out = tmp_path / "moco.pth.tar", tmp_path / "out.safetensors"
    torch.save(content, source)
    assert main(["encoder", str(source), str(out), "--to", "copgen"]) == 0
    assert equal(artifacts.read_tensors(out), encoder)
    printed = capsys.readouterr().out
    assert "left out what lies beside the encoder: state_dict.queue" in printed
    assert "left out objects of argparse.Namespace, pathlib.PosixPath, uuid.UUID" in printed
    command = ["encoder", source, out, "--to", "copgen", "--overwrite", "--prefix", "encoder_k."]
    assert f"{source}: no encoder by" in fails(capsys, *command)


def test_a_runs_own_checkpoint_is_read(tmp_path):
    model = ContrastiveModel(EncoderConfig(stem="half", width=16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    source, out = tmp_path / "checkpoint.pt", tmp_path / "out.pth"
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}}
    artifacts.write_checkpoint(source, {"progress": {"step": 3, "finished": True}, "state": states})
    assert main(["encoder", str(source), str(out), "--to", "supcon"]) == 0
    written = torch.load(out, weights_only=True)["model"]
    head = {name: written.pop(name) for name in list(written) if name.startswith("head.")}
    assert equal(written, supcon_names(model.encoder.state_dict()))
    assert equal(head, {f"head.{name}": value for name, value in model.head.state_dict().items()})


def test_commands_that_would_lose_something_are_refused(tmp_path, capsys):
    source, out = tmp_path / "source.pth", tmp_path / "out.safetensors"
    torch.save(small("resnet18"), source)
    out.write_bytes(b"mine")
    assert "--overwrite" in fails(capsys, "encoder", source, out, "--to", "copgen")
    assert "--overwrite" in fails(capsys, "navigator", source, out)
    assert out.read_bytes() == b"mine"
    assert "none.pth is missing" in fails(capsys, "encoder", tmp_path / "none.pth", out, "--to", "copgen")
    assert "ends in .safetensors or" in fails(capsys, "encoder", source, tmp_path / "out.bin", "--to", "copgen")
    assert "ends in .safetensors" in fails(capsys, "navigator", source, tmp_path / "out.pth")
    assert "detectron2's" in fails(capsys, "encoder", source, tmp_path / "o.pkl", "--to", "vissl")
    assert "no projection head" in fails(capsys, "encoder", source, tmp_path / "o.pth", "--to", "copgen-model")
    assert "only supcon" in fails(capsys, "encoder", source, tmp_path / "o.pth", "--to", "vissl", "--parallel")
    source.write_bytes(source.read_bytes()[:5000])
    assert f"{source} is truncated" in fails(capsys, "encoder", source, tmp_path / "o.pth", "--to", "vissl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "source.pth"]


def test_a_damaged_tensor_is_named_with_its_file(tmp_path, capsys):
    state, source = small("resnet18"), tmp_path / "source.pth"
    torch.save(state, source)
    data = bytearray(source.read_bytes())
    data[data.index(state["layer1.0.conv1.weight"].numpy().tobytes()) + 9] ^= 1
    source.write_bytes(bytes(data))
    line = fails(capsys, "encoder", source, tmp_path / "o.pth", "--to", "vissl")
    assert str(source) in line and "CRC" in line


def test_help_says_how_to_make_pairs_from_a_released_navigator(capsys):
    with pytest.raises(SystemExit):
        main(["navigator", "--help"])
    assert "--stages pairs" in capsys.readouterr().out
    assert importlib.import_module("copgen_fast.convert.__main__").__doc__.endswith("[options].")
