"""VISSL's linear protocol beside a loop written out, and both transfer protocols on the seven sets' layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast.config import DataConfig
from copgen_fast.errors import NonFiniteError
from copgen_fast.evals import freeze, real_images, vissl
from copgen_fast.evals._vissl import epoch_order, stepped
from copgen_fast.images import transfer_sets
from copgen_fast.images.views import Centre, RandomCrop, Squash
from copgen_fast.runtime import interrupts, seeds
from tests.helpers import transfer_layouts
from tests.helpers.eval_runs import Colours, measure, run_on, save_noisy_classes
from tests.helpers.transfer_layouts import COUNTS, NAMES


class Convolution(nn.Module):
    """An encoder with batch norm, whose statistics must not move."""

    def __init__(self):
        super().__init__()
        with seeds.seeded(0, "test"):
            self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def literal_steps(encoder, batches, classes, config, seed):
    """VISSL's training of its `eval_mlp` head, with SGD's updates written out."""
    with seeds.seeded(seed, "vissl"):
        norm, linear = nn.BatchNorm2d(6), nn.Linear(6, classes)
    parameters = [(linear.weight, 5e-4), (linear.bias, 5e-4), (norm.weight, 0.0), (norm.bias, 0.0)]
    momenta = [torch.zeros_like(parameter) for parameter, _ in parameters]
    for epoch, images, labels in batches:
        with torch.no_grad():
            maps = encoder.eval()(images)[:, :, None, None]
        loss = F.cross_entropy(linear(norm(maps).flatten(1)), labels)
        gradients = torch.autograd.grad(loss, [parameter for parameter, _ in parameters])
        rate = config.lr * config.batch / 256 * (0.1 if epoch >= config.milestones[0] else 1)
        with torch.no_grad():
            for (parameter, decay), momentum, gradient in zip(parameters, momenta, gradients, strict=True):
                gradient = gradient + decay * parameter
                momentum.mul_(0.9).add_(gradient)
                parameter.sub_(rate * (gradient + 0.9 * momentum))
    return nn.Sequential(norm, nn.Flatten(), linear)


@pytest.mark.parametrize("crop", [True, False])
def test_steps_equal_a_literal_loop(tmp_path, crop, monkeypatch):
    """Two epochs of 24 images in batches of 10: the last batch is partial and kept, the second epoch has lr / 10."""
    data = save_noisy_classes(tmp_path, 1, per_class=6)
    monkeypatch.setattr(vissl, "rules", lambda name: transfer_sets.Rules(crop=crop))
    config = vissl.Config(size=8, epochs=2, milestones=(1,), lr=1.0, batch=10)
    run, encoder = run_on(data, tmp_path, "vissl", seed=3), Convolution()
    frozen, images = freeze(encoder, run), real_images(run)
    ours = vissl.fit(frozen, images, config, run, 6)

    batches, rows = [], torch.arange(24)
    for epoch in range(2):
        flips = torch.rand(24, generator=seeds.generator(3, "vissl", epoch, "flip")) < 0.5
        for chosen in epoch_order(rows, 10, False, 3, "vissl", epoch):
            view = RandomCrop(8, (3, "vissl", epoch))
            views = [(view if crop else Squash(8)) for _ in chosen]
            taken = [images.splits["train"].read(int(index), view) for index, view in zip(chosen, views, strict=True)]
            batch = torch.stack([pixels for pixels, _ in taken])
            if not crop:
                batch = torch.where(flips[chosen, None, None, None], batch.flip(3), batch)
            batches.append((epoch, frozen.normalize(batch), torch.tensor([label for _, label in taken])))
    assert [len(labels) for _, _, labels in batches] == [10, 10, 4] * 2
    expected = literal_steps(encoder, batches, 4, config, seed=3)
    features = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(features), expected.eval()(features[:, :, None, None]), rtol=1e-4, atol=1e-4
        )


def test_learning_rates_are_those_of_vissl():
    rates = [stepped(0.01, 256, (8, 16, 24), epoch) for epoch in range(28)]
    assert rates == pytest.approx([1e-2] * 8 + [1e-3] * 8 + [1e-4] * 8 + [1e-5] * 4)
    assert stepped(0.01, 128, (8,), 0) == 0.005


@pytest.mark.parametrize(("signal", "low", "high"), [(6, 0.97, 1), (0, 0.06, 0.44)])
def test_separable_classes_are_found_and_unrelated_labels_give_chance(tmp_path, signal, low, high):
    data = save_noisy_classes(tmp_path, signal)
    found = measure("vissl", Colours(), data, tmp_path, "size=8", "epochs=6", "lr=2", "batch=32")
    assert low <= found["vissl_top1"] <= high
    assert found == measure("vissl", Colours(), data, tmp_path, "size=8", "epochs=6", "lr=2", "batch=32")


@pytest.mark.filterwarnings("ignore:.*not comparable")
@pytest.mark.parametrize("name", NAMES)
def test_both_protocols_run_on_each_set(tmp_path, name, monkeypatch):
    transfer_layouts.trust(monkeypatch)
    transfer_layouts.write(tmp_path, name)
    data, encoder, seen = DataConfig(name, str(tmp_path), image_size=8), Colours(), []
    counted = lambda images: seen.append(len(images)) or encoder(images)  # noqa: E731
    for protocol, words in (("lbfgs", ("penalties=5",)), ("vissl", ("epochs=12", "milestones=10", "lr=2", "batch=16"))):
        found = measure(protocol, counted, data, tmp_path, "size=8", *words)
        assert found[f"{protocol}_top1"] == found[f"{protocol}_top1_per_class"] == 1
        train, test = COUNTS[name]
        if protocol == "vissl":
            passes = 12 if name not in ("cifar10", "cifar100", "sun397") else 2
            assert sum(seen) == passes * train + test, "whole images are encoded once, and once mirrored"
        seen.clear()


def test_a_last_image_alone_waits_for_the_next_epoch(tmp_path):
    data = save_noisy_classes(tmp_path, 6, per_class=5)  # 20 images in batches of 19
    assert measure("vissl", Colours(), data, tmp_path, "size=8", "epochs=2", "batch=19")["vissl_top1"] > 0


def test_losses_that_are_not_finite_name_the_epoch(tmp_path, monkeypatch):
    data = save_noisy_classes(tmp_path, 1)
    monkeypatch.setattr(vissl, "_cropped", lambda *_: iter([(torch.full((8, 12), 1e38), torch.zeros(8).long())]))
    with pytest.raises(NonFiniteError, match="loss of vissl: NaN or infinity in epoch 1"):
        measure("vissl", Colours(), data, tmp_path, "size=8", "lr=1000")


def test_a_requested_stop_ends_it(tmp_path, monkeypatch):
    data = save_noisy_classes(tmp_path, 1)
    monkeypatch.setattr("copgen_fast.evals.vissl.stop_requested", lambda: True)
    with pytest.raises(interrupts.Interrupted, match="epoch 1 of vissl"):
        measure("vissl", Colours(), data, tmp_path, "size=8")


def test_test_images_are_resized_by_the_sets_rules(tmp_path):
    from copgen_fast.evals._vissl import test_view

    assert test_view(224, True) == Centre(224, 256, "bilinear") and test_view(224, False) == Squash(224)
