import pytest
import torch
import torchvision

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel, Encoder


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_at_full_width_it_is_torchvisions_network(name):
    torch.manual_seed(0)
    ours = Encoder(EncoderConfig(name=name, stem="imagenet")).eval()
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["fc.weight", "fc.bias"]
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


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
    from copgen_fast import seeds

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
