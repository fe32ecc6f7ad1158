"""The reference's linear protocol on streamed photographs, against a literal loop; the encoder's faster form."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from copgen_fast import augmentations
from copgen_fast.config import DataConfig
from copgen_fast.evals import FrozenEncoder
from copgen_fast.evals.linear_augmented import Config, augmented_features, centre, several_features, train
from copgen_fast.images import sets
from copgen_fast.images.views import RandomCrop
from copgen_fast.ops import AugmentPolicy
from copgen_fast.runtime import seeds

CPU, BATCH, SIZE = torch.device("cpu"), 8, 12
POLICY = augmentations.get("no-color")
MEAN, STD = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of seven photographs of several shapes for training, and one each for testing."""
    root = tmp_path_factory.mktemp("photographs")
    torch.manual_seed(0)
    for split, count in (("train", 7), ("test", 1)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (20 + 3 * i, 31 - 2 * label, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return sets.open_set(DataConfig("folder", str(root), SIZE))


def frozen_encoder():
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(5), nn.Flatten()).eval()
    return FrozenEncoder(encoder.requires_grad_(False), MEAN, STD, CPU, BATCH)


def test_three_steps_equal_a_literal_loop(photographs):
    frozen, config, seed = frozen_encoder(), Config(epochs=5, lr=0.7), 3
    classifier = nn.Linear(16, 3)
    weight, bias = (x.detach().clone() for x in (classifier.weight, classifier.bias))
    assert next(train(frozen, photographs, config, classifier, seed)) == 1

    highest = 0.7 * BATCH / 256
    lr = highest * 0.2**3 + (highest - highest * 0.2**3) * (1 + math.cos(math.pi * 1 / 5)) / 2
    key = (seed, "linear-augmented", 1)
    order = torch.randperm(21, generator=seeds.generator(*key))
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    crop = RandomCrop(SIZE, key, (0.2, 1.0), flip=0.5)
    for chosen in (order[:8], order[8:16], order[16:]):
        views, labels = [], []
        for index in chosen.tolist():
            path, label = photographs.splits["train"].items[index]
            pixels = np.array(Image.open(path))
            view = crop(pixels, index).float() / 255
            views.append((view - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
            labels.append(label)
        features = frozen.encoder(torch.stack(views))
        parameters = [weight.requires_grad_(), bias.requires_grad_()]
        loss = F.cross_entropy(F.linear(features, *parameters), torch.tensor(labels))
        gradients = torch.autograd.grad(loss, parameters)
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        weight, bias = ((p - lr * v).detach() for p, v in zip(parameters, velocity, strict=True))
    torch.testing.assert_close(classifier.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(classifier.bias.detach(), bias, rtol=1e-5, atol=1e-6)


def test_test_images_are_resized_and_cropped_as_the_reference_does():
    view = centre(128)
    assert (view.size, view.shorter, view.mode) == (128, 146, "bilinear")
    pixels = torch.randint(0, 256, (160, 200, 3), dtype=torch.uint8).numpy()
    theirs = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(146), torchvision.transforms.CenterCrop(128)]
    )(Image.fromarray(pixels))
    difference = view(pixels, 0).movedim(0, 2).int() - torch.from_numpy(np.array(theirs)).int()
    assert difference.abs().max() <= 1


def test_colours_are_changed_and_whole_images_kept_where_the_policy_says_so(photographs):
    def features(policy):
        frozen = FrozenEncoder(nn.Flatten(), MEAN, STD, CPU, 21)
        ((found, labels, _),) = augmented_features(frozen, photographs, policy, (0,))
        return found, labels

    def unscaled(found):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return found.view(21, 3, SIZE, SIZE) * std + mean

    crops, labels = features(dataclasses.replace(POLICY, mean=MEAN, std=STD))
    found, again = features(dataclasses.replace(POLICY, gray=1.0, mean=MEAN, std=STD))
    assert labels.equal(again) and labels.bincount().tolist() == [7, 7, 7]
    pixels = unscaled(found)
    torch.testing.assert_close(pixels[:, 0], pixels[:, 1], rtol=0, atol=1e-5)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(pixels[:, 0], (unscaled(crops) * weights).sum(1), rtol=0, atol=2e-3)
    whole, _ = features(AugmentPolicy(mean=MEAN, std=STD))
    plain, _ = FrozenEncoder(nn.Flatten(), MEAN, STD, CPU, 21).split_features(photographs, "train", centre(SIZE))
    torch.testing.assert_close(whole.sum(0), plain.sum(0))


@pytest.mark.parametrize("scale", [(0.2, 1.0), None], ids=["crops", "whole images"])
def test_views_of_images_decoded_once_are_those_of_images_decoded_each_time(photographs, scale):
    frozen, order = FrozenEncoder(nn.Flatten(), MEAN, STD, CPU, 8), [torch.arange(8), torch.arange(8, 21)]
    policy, keys = dataclasses.replace(POLICY, crop_scale=scale, gray=0.5, mean=MEAN, std=STD), [(0,), (1,)]
    together = list(several_features(frozen, photographs, policy, keys, order))
    for number, key in enumerate(keys):
        alone = augmented_features(frozen, photographs, policy, key, order)
        for (features, *rest), (expected, *others) in zip(together, alone, strict=True):
            assert features[number].equal(expected) and all(map(torch.equal, rest, others))


def test_the_encoders_precision_is_that_of_the_run():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).requires_grad_(False)
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    exact, half = (
        FrozenEncoder(encoder, MEAN, STD, CPU, 4, precision).features(images) for precision in ("fp32", "bf16")
    )
    assert exact.dtype == half.dtype == torch.float32 and not exact.equal(half)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
