"""The form in which a frozen encoder computes features: the same function, in float64 and up to rounding in float32."""

import copy

import pytest
import torch
from torch import nn

from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import Encoder
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


def test_autocast_and_gradients_take_the_convolutions_as_they_were():
    encoder, images = trained().eval(), torch.randn(2, 3, 32, 32)
    form = inference_form(encoder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(form(images).float(), encoder(images).float(), rtol=0.05, atol=0.05)
    images.requires_grad_()
    ours, theirs = (torch.autograd.grad(f(images).sum(), images)[0] for f in (form, encoder))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_a_nan_comes_through():
    form, images = inference_form(trained().eval()), torch.zeros(2, 3, 32, 32)
    images[0, 1, 9, 9] = torch.nan
    with torch.no_grad():
        assert form(images).isnan().any(1).tolist() == [True, False]
