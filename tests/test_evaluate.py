"""Evaluating encoders from anywhere: a trained network in everyone's form of file, and what is refused."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from copgen_fast import augmentations
from copgen_fast.config import DataConfig, EncoderConfig, PretrainConfig, RunConfig
from copgen_fast.convert.encoder_names import read_encoder, wrap, write_encoder
from copgen_fast.convert.load_encoder import EncoderOptions, LoadedEncoder, load
from copgen_fast.encoders import Encoder
from copgen_fast.errors import UsageError
from copgen_fast.evaluate import EvaluateConfig, evaluation, expect_features, main
from copgen_fast.images import sets
from copgen_fast.record import identity
from copgen_fast.runtime import artifacts
from tests.helpers.encoder_fixtures import supcon_names, without_fc

SIZE = 8
DIGITS = ["--data.name", "digits", "--data.image-size", str(SIZE)]
POLICY = augmentations.get("simclr")  # ImageNet's normalisation


def normalised(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (POLICY.mean, POLICY.std))
    return (images.float() / 255 - mean) / std


@pytest.fixture(scope="module")
def trained():
    """A narrow ResNet-18 trained on digits, and the test accuracy that its classifier reached."""
    torch.manual_seed(0)
    data = sets.digits(SIZE)
    model = Encoder(EncoderConfig("resnet18", "cifar", 8))
    model.fc = nn.Linear(model.feature_dim, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    images, labels = normalised(data.train_images), data.train_labels
    for _ in range(3):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model.eval()(normalised(data.test_images)).argmax(1) == data.test_labels
    return model.state_dict(), right.double().mean().item()


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def renamed(spelling, state):
    return write_encoder(read_encoder(state), spelling)[0]


ONE = torch.ones(1)
FORMS = {
    "torchvision": (lambda s: s, "torchvision names (first layer conv1.weight)"),
    "safetensors": (lambda s: s, "left out the classifier: fc."),
    "DDP": (lambda s: {"model": under("module.", s), "epoch": 3}, "first layer model.module.conv1.weight"),
    "compiled": (lambda s: under("_orig_mod.", s), "first layer _orig_mod.conv1.weight"),
    "MoCo": (
        lambda s: {
            "state_dict": under("module.encoder_q.", s)
            | under("module.encoder_k.", {name: value + 1 for name, value in s.items()})
            | {"module.queue": ONE}
        },
        "first layer state_dict.module.encoder_q.conv1.weight",
    ),
    "SupContrast": (
        lambda s: {"model": supcon_names(without_fc(s))},
        "supcon names (first layer model.encoder.stem.0.weight)",
    ),
    "reference on GPUs": (
        lambda s: {"model": {k.replace("encoder.", "encoder.module.", 1): v for k, v in renamed("supcon", s).items()}},
        "first layer model.encoder.module.stem.0.weight",
    ),
    "VISSL": (lambda s: wrap("vissl", renamed("vissl", s)), "vissl names"),
    "lightly": (
        lambda s: under("backbone.", renamed("sequential", s)) | {"projection_head.layers.0.weight": ONE},
        "sequential names (first layer backbone.0.weight)",
    ),
    "solo-learn": (
        lambda s: {"state_dict": under("backbone.", s) | under("momentum_backbone.", s) | {"classifier.weight": ONE}},
        "first layer state_dict.backbone.conv1.weight",
    ),
    "detectron2": (lambda s: wrap("detectron2", renamed("detectron2", s)), "detectron2 names"),
}


def saved(folder, content, name="weights"):
    path = folder / f"{name}.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint_is_the_same_network(form, trained, tmp_path):
    state, _ = trained
    make, told = FORMS[form]
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        path = saved(tmp_path, make(state))
    loaded = load(path, EncoderOptions())
    assert told in loaded.summary and "all 120 tensors matched" in loaded.summary and "\n" not in loaded.summary
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_supervised_network_keeps_its_accuracy(trained, tmp_path, capsys):
    state, accuracy = trained
    assert accuracy > 0.85
    path = saved(tmp_path, {"state_dict": under("module.", state)}, "net")
    assert main([str(path), *DIGITS, "--evals", "linear", "knn", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "linear top1 %" in shown and "features [N, 64]" in shown
    found = artifacts.read_record(tmp_path / "net.digits.json")
    assert found["results"]["linear_top1"] > accuracy - 0.02
    assert found["results"]["knn_top1"] > accuracy - 0.03
    assert found["encoder"]["network"] == "resnet18" and found["encoder"]["mean"] == list(POLICY.mean)
    assert main([str(path), *DIGITS, "--device", "cpu"]) == 2, "results are not replaced unless told so"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "give --overwrite" in line
    wrong = ["--mean", "1", "1", "1", "--std", "0.01", "0.01", "0.01", "--overwrite", "--evals", "knn"]
    assert main([str(path), *DIGITS, *wrong, "--device", "cpu"]) == 0
    assert artifacts.read_record(tmp_path / "net.digits.json")["results"]["knn_top1"] < accuracy - 0.05


def test_a_runs_encoder_brings_its_stem_and_its_normalisation(tmp_path):
    config = EncoderConfig("resnet18", "half", 8)
    run = RunConfig(pretrain=PretrainConfig(encoder=config, augmentation="digits"))
    path = tmp_path / "run/pretrain/navigator/simclr/encoder.safetensors"
    artifacts.write_tensors(path, Encoder(config).state_dict(), source="navigator", method="simclr")
    (tmp_path / "run/config.json").write_text(json.dumps(identity(run)))
    assert "stem half" in load(path, EncoderOptions()).summary
    out = tmp_path / "here.json"
    assert main([str(path), *DIGITS, "--evals", "knn", "--device", "cpu", "--out", str(out)]) == 0
    found = artifacts.read_record(out)
    assert found["encoder"]["mean"] == [0.5, 0.5, 0.5] and found["encoder"]["stem"] == "half"
    assert "stem cifar" in load(path, EncoderOptions(stem="cifar")).summary


SHUFFLENET = "torchvision:shufflenet_v2_x0_5"


def test_other_networks_of_torchvision_by_name(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    path = saved(tmp_path, {"state_dict": under("module.", theirs.state_dict())})
    loaded = load(path, EncoderOptions(name=SHUFFLENET))
    assert "left out the classifier: fc.weight, fc.bias" in loaded.summary
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(images), theirs(images))


def test_networks_of_timm_by_name(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    path = saved(tmp_path, under("module.", theirs.state_dict()))
    loaded = load(path, EncoderOptions(name="timm:vit_tiny_patch16_224"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        torch.testing.assert_close(loaded.module.eval()(images), expected)
    out = ["--encoder.name", "timm:vit_tiny_patch16_224", *DIGITS, "--evals", "knn"]
    assert main([str(path), *out]) == 2


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (without("layer3.0.conv1.weight"), [], "missing: layer3.0.conv1.weight.*--encoder.name torchvision:NAME"),
        (lambda s: s | {"layer1.9.x": ONE}, [], "not known: layer1.9.x"),
        (lambda s: s | {"bn1.weight": torch.ones(4)}, [], r"bn1.weight is \[4\], expected \[8\]"),
        (lambda s: under("a.", s) | under("b.", s), [], "ambiguous .*--encoder.prefix"),
        (lambda s: {"net.0.weight": ONE}, [], "no encoder by .* its first names are net.0.weight"),
        (lambda s: s, ["--encoder.stem", "imagenet"], "the first convolution of .* is 3x3"),
        (lambda s: s, ["--encoder.name", "resnet34"], "expected auto, torchvision:NAME or timm:NAME"),
        (lambda s: s, ["--encoder.name", "torchvision:resnet19"], "did you mean resnet"),
        (lambda s: s, ["--encoder.name", "torchvision:squeezenet1_0"], "no linear classifier"),
        (lambda s: s, ["--encoder.name", SHUFFLENET], "expected"),
        (lambda s: s, ["--evals", "svm"], "unknown name 'svm' in evals"),
        (lambda s: s, ["--evals"], "evals"),
        (lambda s: s, ["--evals", "knn", "--evals.options", "knn.k=5"], "option 'k' of knn"),
        (lambda s: s, ["--data.name", "cifar10"], "needs --data.root"),
        (lambda s: s, ["--std", "0", "1", "1"], "--std: expected 0.001 to 10, got 0"),
        (lambda s: s, ["--precision", "fp16"], "--precision fp16 needs a CUDA device"),
        (lambda s: s, ["--out", "weights.pth/a.json"], "not writable: .*--out"),
    ],
)
def test_what_can_not_be_evaluated_is_said_in_one_line(content, words, message, trained, tmp_path, capsys):
    path = saved(tmp_path, content(trained[0]))
    words = [str(tmp_path / word) if word.startswith("weights") else word for word in words]
    code = main([str(path), *DIGITS, "--device", "cpu", *words])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and re.search(message, line), line
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pth"]


def test_files_that_are_no_weights_are_named(tmp_path, capsys):
    for name, data in (("a.pth", b"<html>"), ("b.safetensors", b"\0" * 20), ("c.pt", b"")):
        (tmp_path / name).write_bytes(data)
        assert main([str(tmp_path / name), *DIGITS]) != 0
        assert str(tmp_path / name) in capsys.readouterr().err
    assert main([str(tmp_path / "none.pth"), *DIGITS]) == 2


class Picky(nn.Module):
    """Takes images of one size, as vision transformers do."""

    def forward(self, images):
        assert images.shape[-1] == 224, f"Wrong image height! Expected 224 but got {images.shape[-1]}!"
        return images.flatten(1)


def test_a_size_that_the_network_does_not_take_is_said_before_images_are_read(tmp_path):
    options = EvaluateConfig(tmp_path / "a.pth", data=DataConfig("digits", image_size=SIZE))
    run = evaluation(options, LoadedEncoder(Picky(), ""), torch.device("cpu"))
    with pytest.raises(UsageError, match="takes no images of 8 pixels .*Expected 224 but got 8"):
        expect_features(Picky(), run)
