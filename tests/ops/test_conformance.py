"""The conformance vectors of the augmentation: our backends meet them, and wrong implementations do not."""

from dataclasses import fields

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import functional as tv

from copgen_fast.ops import AugmentParams, augment
from copgen_fast.ops.backend import resolve
from tests.conformance import make_augment
from tests.conformance.make_augment import PATH, tensor_augment
from tests.conformance.score import ours, score

# By how much float arithmetic differs from Pillow's uint8 (in [0, 1]): per view on average, and at most anywhere.
# At 128 px, photographs and noise under simclr: 0.005 on average over views, 0.072 at most, nearly all the hue's.
PIL_MEAN, PIL_MOST = 0.012, 0.075


@pytest.fixture(scope="module")
def vectors():
    with np.load(PATH) as file:
        return dict(file)


def failed(scores):
    return [s for s in scores if not s.passes]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backends_conform(backend):
    try:
        resolve("augment", "cpu", backend)
    except ValueError as error:
        pytest.skip(str(error))
    scores = score(ours(backend))
    assert len(scores) > 150 and not failed(scores)


def test_torchvision_conforms_also_off_the_kinks():
    # A gradient that jumps when the images are perturbed is at a kink, where none is right; ties are the palette's.
    def perturbed(images, *rest):
        if images.dtype != torch.uint8:
            images = images + 1e-6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return tensor_augment(images, *rest)

    assert not failed(score(tensor_augment))
    assert max(s.gradient for s in score(perturbed) if not s.case.endswith("palette")) < 1e-4


def gray(x):
    return tv.rgb_to_grayscale(x)


WRONG_OPS = {
    "contrast about a half": (1, lambda x, f: (f * x + (1 - f) * 0.5).clamp(0, 1)),
    "contrast about the mean of the channels": (1, lambda x, f: (f * x + (1 - f) * x.mean()).clamp(0, 1)),
    "contrast without the mean's gradient": (1, lambda x, f: (f * x + (1 - f) * gray(x).mean().detach()).clamp(0, 1)),
    "saturation about the mean of the channels": (2, lambda x, f: (f * x + (1 - f) * x.mean(0)).clamp(0, 1)),
    "brightness that adds": (0, lambda x, f: (x + f - 1).clamp(0, 1)),
    "brightness without clamp": (0, lambda x, f: f * x),
    "hue backwards": (3, lambda x, f: tv.adjust_hue(x, -f)),
    "hue in 8 bits": (3, lambda x, f: tv.adjust_hue(x, int(f * 255) / 255)),
}


@pytest.mark.parametrize("wrong", WRONG_OPS)
def test_a_wrong_op_fails(monkeypatch, wrong):
    monkeypatch.setitem(make_augment.OPS, *WRONG_OPS[wrong])
    assert failed(score(tensor_augment))


WRONG_PARAMETERS = {
    "order": lambda order: torch.arange(4).expand_as(order).contiguous(),
    "flip": torch.zeros_like,
    "gray": torch.zeros_like,
    "jitter": torch.ones_like,
    "crop": lambda crop: crop - crop * torch.tensor([1, 0, 0, 0]),
    "blur": lambda blur: torch.full_like(blur, 1 / blur.shape[1]),
    "solarize": lambda solarize: solarize + 0.1,
}


@pytest.mark.parametrize("name", WRONG_PARAMETERS)
def test_ignoring_a_parameter_fails(name):
    right = ours("reference")

    def wrong(images, params, *rest):
        return right(images, params | {name: WRONG_PARAMETERS[name](params[name])}, *rest)

    assert failed(score(wrong))


def test_a_wrong_gradient_alone_fails():
    def straight_through(images, params, size, mean, std):
        drawn = AugmentParams(**{k: v for k, v in params.items() if k != "sigma"})
        return augment(images, drawn, size, mean=mean, std=std, clamp="straight_through", backend="reference")

    scores = score(straight_through)
    assert failed(scores) and max(s.value for s in scores) <= 1e-5


@pytest.mark.parametrize("group", ["simclr", "simclr-strong"])
def test_the_distance_to_pillow_is_its_rounding(vectors, group):
    arrays = {name: torch.from_numpy(vectors[f"{group}/{name}"]) for name in ("images", "pil")}
    names = [field.name for field in fields(AugmentParams) if field.name != "rand_augment"]
    params = AugmentParams(**{name: torch.from_numpy(vectors[f"{group}/{name}"]) for name in names})
    views = augment(arrays["images"], params, tuple(arrays["pil"].shape[2:]))
    distance = (views - arrays["pil"].float() / 255).abs().flatten(1)
    assert distance.mean(1).max() < PIL_MEAN and distance.max() < PIL_MOST


def test_the_script_makes_the_file(vectors):
    versions = {"torch": torch.__version__.split("+")[0], "torchvision": torchvision.__version__.split("+")[0]}
    for name, version in versions.items():
        if vectors[name] != version:
            pytest.skip(f"made with {name} {vectors[name]}, here is {version}")
    made = make_augment.make()
    assert list(made) == list(vectors)
    for name, array in made.items():
        assert array.dtype == vectors[name].dtype and array.shape == vectors[name].shape, name
        if array.dtype == np.float32:
            # Sums of a gradient add up to tens.
            np.testing.assert_allclose(array, vectors[name], rtol=1e-5, atol=1e-4 if "gradient" in name else 1e-5)
        elif name.split("/")[-1] != "pil" and name != "pillow":
            np.testing.assert_array_equal(array, vectors[name], err_msg=name)


def test_the_file_is_small():
    assert PATH.stat().st_size < 500_000
