import pytest
import torch
import torchvision

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel, Encoder, prepare, statistics_held
from copgen_fast.errors import UsageError
from copgen_fast.ops import Conv3x3
from tests.helpers.pretended_gpu import CUDA, pretended_gpu


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_at_full_width_it_is_torchvisions_network(name):
    torch.manual_seed(0)
    ours = Encoder(EncoderConfig(name=name, stem="imagenet")).eval()
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["fc.weight", "fc.bias"]
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features, expected = ours.double()(images), theirs.double()(images)
    torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-11)  # convolutions add in another order


def test_convolutions_of_stride_1_take_fewer_products():
    by_name = dict(Encoder(EncoderConfig("resnet18", "imagenet")).named_modules())
    assert [name for name, layer in by_name.items() if isinstance(layer, Conv3x3)] == [
        f"layer{stage}.{block}.conv{conv}"
        for stage in range(1, 5)
        for block in range(2)
        for conv in (1, 2)
        if (stage == 1 or (block, conv) != (0, 1))
    ]


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 8), ("cifar", 32), ("half", 16)])
def test_stems_set_the_resolution_of_the_first_stage(stem, size):
    encoder = Encoder(EncoderConfig(stem=stem, width=16))
    sizes = []
    encoder.layer1.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    features = encoder(torch.randn(2, 3, 32, 32))
    assert sizes == [size]
    assert features.shape == (2, encoder.feature_dim) == (2, 128)


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet50", 2048)])
def test_the_projection_head_is_d_d_128(name, dim):
    model = ContrastiveModel(EncoderConfig(name=name))
    assert [tuple(layer.weight.shape) for layer in model.head if hasattr(layer, "weight")] == [(dim, dim), (128, dim)]


def test_the_encoder_alone_starts_as_within_the_model():
    from copgen_fast.runtime import seeds

    config = EncoderConfig(width=16)
    with seeds.seeded(0, "encoder"):
        model = ContrastiveModel(config)
    with seeds.seeded(0, "encoder"):
        encoder = Encoder(config)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name])


def test_views_of_another_shape_are_named():
    model = ContrastiveModel(EncoderConfig(width=16))
    with pytest.raises(ValueError, match=r"views: expected shape \[N, 3, H, W\], got \[2, 1, 8, 8\]"):
        model(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"views: expected a floating-point tensor, got torch.uint8"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def model(config=EncoderConfig(stem="half", width=16), seed=0):  # noqa: B008
    torch.manual_seed(seed)
    return ContrastiveModel(config)


def views():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_images_that_are_not_normalised_are_named():
    encoder = Encoder(EncoderConfig("resnet18", "cifar", width=4)).eval()
    with pytest.raises(ValueError, match="views: expected normalised images, .* got values up to 255"):
        encoder(torch.full((2, 3, 8, 8), 255.0))


def test_checkpointed_it_trains_to_the_same_bits_with_fewer_activations():
    plain, sparing = model(), prepare(model(), torch.device("cpu"), checkpointed=True)
    plain = prepare(plain, torch.device("cpu"))
    kept = {}
    for name, f in (("plain", plain), ("sparing", sparing)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            loss = f(views()).square().mean()
        loss.backward()
        kept[name] = sum(saved)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), sparing.parameters(), strict=True))
    torch.testing.assert_close(plain.state_dict(), sparing.state_dict(), rtol=0, atol=0)  # statistics counted once
    assert plain.encoder.bn1.num_batches_tracked == 1
    assert kept["sparing"] < kept["plain"] / 2


def test_held_statistics_stay_as_they_are():
    f = model()
    before = {name: value.clone() for name, value in f.named_buffers()}
    with statistics_held(f):
        f(views())
    torch.testing.assert_close(dict(f.named_buffers()), before, rtol=0, atol=0)
    f(views())
    assert f.encoder.bn1.num_batches_tracked == 1 and f.encoder.bn1.running_mean.abs().sum() > 0


def test_compiled_its_state_keeps_its_names_and_layout(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    plain, f = model(), prepare(model(), torch.device("cpu"), compiled=True)
    assert compiled and f.state_dict().keys() == plain.state_dict().keys()
    assert f.encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    f.load_state_dict(model(seed=1).state_dict())
    assert torch.equal(f(views()), prepare(model(seed=1), torch.device("cpu"))(views()))


def test_it_compiles_whole():
    torch.manual_seed(0)
    f, plain = model().double(), model().double()
    f.compile(backend="eager", fullgraph=True)
    x = views().double().to(memory_format=torch.channels_last)
    for module in (f, plain):
        module(x).square().mean().backward()
    torch.testing.assert_close(f.state_dict(), plain.state_dict())
    ours, theirs = ([value.grad for value in module.parameters()] for module in (f, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_without_a_compiler_compiling_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="--compile needs a C.. compiler on the CPU, and there is no no-such-compiler"):
        prepare(model(), torch.device("cpu"), compiled=True)


def test_on_a_gpu_compiling_is_refused_without_what_triton_needs(monkeypatch):
    monkeypatch.setattr("copgen_fast.encoders.find_spec", lambda name: object())
    monkeypatch.setattr("copgen_fast.encoders.triton_lacks", lambda: "a C compiler: install gcc, or name one in CC")
    with pretended_gpu([]), pytest.raises(UsageError, match="--compile on a GPU needs a C compiler: install gcc"):
        prepare(model(), CUDA, compiled=True)
