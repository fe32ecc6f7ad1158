"""The form in which a frozen encoder computes features: the same function, in float64 and up to rounding in float32."""

import copy

import pytest
import torch
from torch import nn

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import Encoder
from copgen_fast.evals import _inference
from copgen_fast.evals._inference import inference_form


def trained(name="resnet18", stem="imagenet", width=16):
    """An encoder with statistics that are not those of a new one."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(name, stem, width))
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.bias, 0, 0.1)
    return encoder


@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize(("name", "stem", "width"), [("resnet18", "imagenet", 16), ("resnet50", "cifar", 8)])
def test_it_is_the_same_function(monkeypatch, name, stem, width, side):
    monkeypatch.setattr("copgen_fast.evals._inference._VALUES", 2 * width * side**2 // 4)  # two images at a time
    encoder = trained(name, stem, width)
    assert inference_form(encoder) is encoder, "batch statistics can't be folded"
    encoder.double().eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    form, images = inference_form(encoder), torch.randn(5, 3, side, side, dtype=torch.float64)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in form.modules())
    with torch.no_grad():
        torch.testing.assert_close(form(images), encoder(images), rtol=1e-10, atol=1e-10)
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())


def test_it_rounds_as_the_encoder_does():
    encoder, images = trained().eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(images.double())
        ours, theirs = ((f(images).double() - exact).norm() for f in (inference_form(encoder), encoder))
    assert ours <= 4 * theirs


@pytest.mark.parametrize(("side", "fewer"), [(16, 4), (32, 7), (48, 10), (64, 10), (128, 13)])
def test_fewer_products_are_taken_where_images_fill_the_tiles(monkeypatch, side, fewer):
    """Thirteen of the convolutions have stride 1 and 32 channels or more; of small images the last see few pixels."""
    calls, convolve = [], _inference.winograd.convolve
    monkeypatch.setattr(_inference.winograd, "convolve", lambda *args: calls.append(1) or convolve(*args))
    encoder, images = trained(width=32).eval(), torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(inference_form(encoder)(images), encoder(images), rtol=1e-3, atol=1e-4)
    assert len(calls) == (fewer if _inference.tiles.compiled(images) else 0)


def test_autocast_and_gradients_take_the_convolutions_as_they_were():
    encoder, images = trained().eval(), torch.randn(2, 3, 32, 32)
    form = inference_form(encoder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(form(images).float(), encoder(images).float(), rtol=0.05, atol=0.05)
    images.requires_grad_()
    ours, theirs = (torch.autograd.grad(f(images).sum(), images)[0] for f in (form, encoder))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.fixture
def multiplies_bf16(monkeypatch):
    """Any CPU computes in bfloat16 here; one without instructions for it, slowly."""
    monkeypatch.setattr(_inference.devices, "multiplies_bf16", lambda device: True)


@pytest.mark.parametrize("fewest", [16, 128, 10**9])  # by fewer products: all convolutions, the last stage's, none
def test_bfloat16_rounds_features_by_a_fiftieth_at_most(monkeypatch, multiplies_bf16, fewest):
    monkeypatch.setattr(_inference.winograd, "FEWEST", fewest)
    encoder, images = trained().eval(), torch.randn(4, 3, 64, 64)
    form = inference_form(encoder, "bf16")
    assert {value.dtype for value in form.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        exact, ours = encoder(images), form(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert form(images).equal(ours), "autocast has nothing left to do"
            autocast = encoder(images)
    error, theirs = ((half.float() - exact).norm() for half in (ours, autocast))
    assert 0 < error <= 0.02 * exact.norm() and error <= 3 * theirs


def test_without_instructions_for_bfloat16_weights_stay_float32(monkeypatch):
    monkeypatch.setattr(_inference.devices, "multiplies_bf16", lambda device: False)
    form = inference_form(trained().eval(), "bf16")
    assert {value.dtype for value in form.state_dict().values()} == {torch.float32}


def test_a_network_with_another_forward_is_left_as_it_is():
    class Early(Encoder):
        def _forward_impl(self, x):
            return self.maxpool(self.conv1(x)).flatten(1)

    encoder = Early(EncoderConfig("resnet18", "imagenet", 16)).eval()
    assert inference_form(encoder) is encoder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_nan_comes_through(multiplies_bf16, precision):
    form, images = inference_form(trained().eval(), precision), torch.zeros(2, 3, 32, 32)
    images[0, 1, 9, 9] = torch.nan
    with torch.no_grad():
        assert form(images).isnan().any(1).tolist() == [True, False]
