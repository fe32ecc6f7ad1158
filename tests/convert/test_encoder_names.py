import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from copgen_fast.config import EncoderConfig
from copgen_fast.convert.__main__ import encode
from copgen_fast.convert.encoder_names import SPELLINGS, read_encoder, recognise, spell, wrap, write_encoder
from copgen_fast.encoders import Encoder
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.runtime import artifacts
from copgen_fast.runtime.unpickle import loads
from tests.helpers.encoder_fixtures import detectron2_names, equal, small, supcon_names, without_fc


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_real_networks_go_through_every_spelling_and_back(name):
    theirs = getattr(torchvision.models, name)(weights=None)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    weights = read_encoder(state)
    assert (weights.spelling, weights.config) == ("torchvision", EncoderConfig(name=name, stem="imagenet", width=64))
    assert weights.notes == ("left out the classifier: fc.weight, fc.bias",)
    features = without_fc(state)
    assert equal(weights.encoder, features)
    assert len(features) == {"resnet18": 120, "resnet50": 318}[name]
    expected = {
        "copgen": features,
        "torchvision": features,
        "supcon": supcon_names(features),
        "shortcut": {key.replace("downsample", "shortcut"): value for key, value in features.items()},
        "sequential": {sequential(key): value for key, value in features.items()},
        "vissl": {f"_feature_blocks.{key}": value for key, value in features.items()},
        "detectron2": detectron2_names(features),
    }
    for spelling, names in expected.items():
        tensors, _ = write_encoder(weights, spelling)
        assert equal(tensors, names)
        back = read_encoder(wrap(spelling, tensors))
        assert equal(back.encoder, features) and back.config == weights.config
        assert back.spelling == ("torchvision" if spelling == "copgen" else spelling)
    ours = Encoder(weights.config).eval()
    artifacts.load_strictly(ours, weights.encoder, "weights")
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features, expected = ours.double()(images), theirs.eval().double()(images)
    torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-11)  # convolutions add in another order


def sequential(name):
    """The name in nn.Sequential(*resnet.children()), written out without the converter's rules."""
    first, _, rest = name.partition(".")
    return f"{['conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4'].index(first)}.{rest}"


def under(prefix, state, **beside):
    return {prefix + name: value for name, value in state.items()} | beside


def test_encoders_of_other_code_are_found_beside_what_trained_them():
    """State dicts as MoCo, SimSiam, lightly, solo-learn, BYOL and torch.compile leave them."""
    state, other = small("resnet50"), {name: value + 1 for name, value in small("resnet50").items()}
    features, one = without_fc(state), torch.ones(1)
    moco = {"module.queue": one, "module.encoder_q.fc.0.weight": one, "module.encoder_k.fc.0.weight": one}
    wrapped = {
        "MoCo": under("module.encoder_k.", other, **under("module.encoder_q.", state, **moco)),
        "SimSiam": under(
            "module.encoder.", state, **{"module.encoder.fc.6.bias": one, "module.predictor.0.weight": one}
        ),
        "lightly": under(
            "backbone.",
            {sequential(name): value for name, value in features.items()},
            **{"projection_head.layers.0.weight": one},
        ),
        "solo-learn": under("backbone.", state, **under("momentum_backbone.", other, **{"classifier.weight": one})),
        "BYOL": under("online_network.", state, **under("target_network.", other, predictor=one)),
        "compiled": under("_orig_mod.module.", state),
    }
    for name, tensors in wrapped.items():
        for content in (tensors, {"state_dict": tensors, "epoch": 3, "optimizer": {"state": {0: {"momentum": one}}}}):
            found = read_encoder(content)
            assert equal(found.encoder, features), name
            assert name == "compiled" or any("beside the encoder" in note for note in found.notes)
    student = {
        "student": under("module.backbone.", other),
        "teacher": under("backbone.", state, **{"head.mlp.0.weight": one}),
    }
    with pytest.raises(
        UsageError, match=r"torchvision at student.backbone; torchvision at teacher.backbone\): .*--prefix"
    ):
        read_encoder(student)
    for prefix in ("teacher.backbone.", "teacher.backbone"):
        assert equal(read_encoder(student, prefix=prefix).encoder, features)
    assert equal(read_encoder(wrapped["MoCo"], prefix="module.encoder_k.").encoder, without_fc(other))
    with pytest.raises(UsageError, match="names is in it under net.: its first names"):
        read_encoder(student, prefix="net.")


def test_files_as_public_trainers_write_them():
    """MoCo v3, SupContrast, pytorch-cifar, SwAV and Barlow Twins, with what lies beside the encoder."""
    state, one = small("resnet50", classifier=False), torch.ones(1)
    momentum = {name: value + 1 for name, value in state.items()}
    cifar = changed(conv1__weight=torch.ones(8, 3, 3, 3))
    shortcut = {name.replace("downsample", "shortcut"): value for name, value in cifar.items()}
    adam = {"state": {0: {"exp_avg": one}}}
    head = {"head.0.weight": one, "head.0.bias": one, "head.2.weight": one, "head.2.bias": one}
    moco = under("module.base_encoder.", state, **{"module.base_encoder.fc.1.running_mean": one})
    moco |= under("module.momentum_encoder.", momentum, **{"module.predictor.0.weight": one})
    swav = under("module.", state, **{"module.projection_head.0.weight": one, "module.prototypes.weight": one})
    swav |= {"module.prototypes.prototypes0.weight": one}
    twins = under("module.backbone.", state, **{"module.projector.0.weight": one, "module.bn.running_mean": one})
    files = {
        "MoCo v3": ({"state_dict": moco, "optimizer": adam, "scaler": {"scale": 65536.0}}, state, "torchvision"),
        "SupContrast": ({"model": under("encoder.module.", shortcut, **head), "optimizer": adam}, cifar, "shortcut"),
        "SupContrast, one GPU": ({"model": under("encoder.", shortcut, **head)}, cifar, "shortcut"),
        "pytorch-cifar": ({"net": under("module.", shortcut, **{"module.linear.weight": one})}, cifar, "shortcut"),
        "SwAV": (swav, state, "torchvision"),
        "Barlow Twins": ({"model": twins, "optimizer": adam}, state, "torchvision"),
    }
    for name, (content, expected, spelling) in files.items():
        found = read_encoder(content)
        assert equal(found.encoder, expected) and found.spelling == spelling, name
        assert found.config.stem == ("cifar" if expected is cifar else "imagenet")


def test_detectron2_names_are_detectron2s():
    names = {spell("detectron2", name) for name in small("resnet50", classifier=False)}
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.running_mean",
        "res2.0.conv1.weight",
        "res2.0.conv1.norm.weight",
        "res2.0.conv3.norm.bias",
        "res2.0.shortcut.weight",
        "res2.0.shortcut.norm.running_var",
        "res5.2.conv3.weight",
    } <= names
    assert not any("bn" in name or "layer" in name or "downsample" in name for name in names)


def test_prefixes_of_parallel_and_wrapping_modules_are_seen_through(tmp_path):
    state = small("resnet18", classifier=False)
    wrapped = [
        {f"module.{name}": value for name, value in state.items()},
        {f"module.{name}": value for name, value in supcon_names(state).items()},
        {f"trunk.base_model._feature_blocks.{name}": value for name, value in state.items()},
        {"state_dict": {f"module.module.{name}": value for name, value in state.items()}},
    ]
    for content in wrapped:
        assert equal(read_encoder(content).encoder, state)
    with pytest.raises(UsageError, match="two tensors for one name, conv1.weight"):
        read_encoder(state | {"module.conv1.weight": state["conv1.weight"]})


def test_counters_that_old_files_lack_are_added_and_said(tmp_path, capsys):
    state = small("resnet18", classifier=False)
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    weights = read_encoder(detectron2_names(old))
    assert weights.encoder.keys() == state.keys()
    assert weights.notes == ("added 20 counters num_batches_tracked = 0, which it does not hold",)
    some = {name: value for name, value in state.items() if name != "layer1.0.bn1.num_batches_tracked"}
    with pytest.raises(UsageError, match="missing: layer1.0.bn1.num_batches_tracked"):
        read_encoder(some)


def changed(**changes):
    state = small("resnet18", classifier=False)
    for name, value in changes.items():
        name = name.replace("__", ".")
        state = {k: v for k, v in state.items() if k != name} if value is None else state | {name: value}
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: changed(layer2__0__conv1__weight=None), r"missing: layer2\.0\.conv1\.weight"),
        (lambda: changed(extra__weight=torch.ones(1)), r"not known: extra\.weight"),
        (lambda: changed(bn1__weight=torch.ones(3)), r"bn1\.weight is \[3\], expected \[8\]"),
        (lambda: changed(bn1__weight=torch.ones(8, dtype=torch.int64)), r"bn1\.weight is torch\.int64"),
        (lambda: changed(bn1__weight=3), r"missing: bn1\.weight"),
        (lambda: changed(conv1__weight=torch.ones(8, 3, 5, 5)), "no first layer"),
        (lambda: {"a.weight": torch.ones(1), "b": torch.ones(1)}, r"no encoder by .* first names are a\.weight, b$"),
        (lambda: {}, "first names are none"),
        (lambda: 3, "first names are none"),
        (
            lambda: {"model": changed(), "state_dict": dict(changed())},
            "ambiguous.*torchvision at model; torchvision at state",
        ),
        (lambda: changed() | supcon_names(changed()), "ambiguous.*torchvision at the top; supcon at the top"),
        (lambda: supcon_names(changed()) | {"head.0.weight": torch.ones(1)}, r"its head has head\.0\.weight; expected"),
        (lambda: detectron2_names(changed()) | {"stem.fc.weight": torch.ones(1), "q": torch.ones(1)}, "not known: q"),
    ],
)
def test_encoders_that_do_not_fit_are_refused_by_name(content, message):
    with pytest.raises(UsageError, match=message):
        read_encoder(content())


def test_a_spelling_that_is_given_is_the_only_one_looked_for():
    both = changed() | {"other": torch.ones(1)}
    assert recognise(both | supcon_names(changed()), "supcon")[0] == "supcon"
    with pytest.raises(UsageError, match="no encoder by vissl names"):
        read_encoder(both, "vissl")


def test_networks_of_other_depth_are_refused():
    for block, layers in ((BasicBlock, [3, 4, 6, 3]), (Bottleneck, [3, 4, 23, 3])):
        with torch.device("meta"):
            state = ResNet(block, layers).state_dict()
        with pytest.raises(UsageError, match="not known: layer"):
            read_encoder(state)


SMALL = {spelling: None for spelling in SPELLINGS if spelling != "copgen-model"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_damage_to_encoders_gives_nothing_but_clear_errors(data):
    spelling = data.draw(st.sampled_from(sorted(SMALL)))
    if SMALL[spelling] is None:
        tensors, _ = write_encoder(read_encoder(small("resnet18")), spelling)
        SMALL[spelling] = encode(".pkl" if spelling == "detectron2" else ".pth", spelling, tensors, {})
    content = bytearray(SMALL[spelling])
    start = data.draw(st.sampled_from([0, len(content) - 20_000]))  # names at one end, zip's directory at the other
    for _ in range(data.draw(st.integers(1, 3))):
        at = start + data.draw(st.integers(0, 19_999))
        content[at] = data.draw(st.integers(0, 255))
    try:
        read_encoder(loads(bytes(content), "file").tree)
    except CopgenError as error:
        assert str(error)
