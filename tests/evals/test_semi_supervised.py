"""Fine-tuning on a part of the labels: what is drawn, VISSL's steps written out, lists of names, and resuming."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from copgen_fast import evals
from copgen_fast.config import DataConfig, PretrainConfig
from copgen_fast.errors import NonFiniteError, UsageError
from copgen_fast.evals import freeze, real_images
from copgen_fast.evals import semi_supervised as semi
from copgen_fast.evals._vissl import epoch_order
from copgen_fast.images import sets
from copgen_fast.images.views import RandomCrop
from copgen_fast.runtime import interrupts, seeds
from copgen_fast.training import loop
from tests.helpers.eval_runs import measure, run_on, save_noisy_classes
from tests.helpers.transfer_layouts import jpeg


class Network(nn.Module):
    """An encoder to be fine-tuned, in float64 so that steps can be compared."""

    def __init__(self):
        super().__init__()
        with seeds.seeded(0, "test"):
            self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images):
        return self.layers(images.to(self.layers[0].weight)).mean((2, 3))


@settings(max_examples=40)
@given(st.lists(st.integers(3, 40), min_size=2, max_size=6), st.integers(0, 5), st.data())
def test_shares_are_nested_and_balanced(counts, seed, data):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    least = len(counts) / len(labels)
    small, large = sorted(data.draw(st.lists(st.floats(least, 1), min_size=2, max_size=2)))
    parts = [semi.draw(labels, fraction, seed) for fraction in (small, large)]
    assert set(parts[0].tolist()) <= set(parts[1].tolist())
    for fraction, rows in zip((small, large), parts, strict=True):
        assert len(rows.unique()) == len(rows) == int(fraction * len(labels) + 1e-6)
        found = labels[rows].bincount(minlength=len(counts))
        whole = found == torch.tensor(counts)
        assert (found.max() - found[~whole].min() <= 1) if (~whole).any() else True, "floor or ceil of the mean"
    assert semi.draw(labels, 1.0, seed).equal(torch.arange(len(labels)))
    assert semi.draw(labels, large, seed).equal(parts[1])


def test_one_per_cent_of_a_thousand_classes_is_as_in_simclrs_lists():
    """12 or 13 images a class: ImageNet's 1 % has 12,811 images, 811 classes of 13."""
    labels = torch.arange(1_281_167) % 1000
    counts = labels[semi.draw(labels, 0.01, 0)].bincount()
    assert counts.sum() == 12_811 and (counts == 13).sum() == 811 and (counts == 12).sum() == 189


def test_seeds_draw_other_images():
    labels = torch.arange(400) % 4
    assert len({tuple(semi.draw(labels, 0.1, seed).tolist()) for seed in range(5)}) == 5


def test_too_small_a_share_is_refused_before_any_stage():
    with pytest.raises(UsageError, match="0.01 of 200 training images is 2, fewer than the 4 classes: take 0.02 or"):
        semi.check(semi.Config(), torch.arange(200) % 4)


def test_steps_equal_a_literal_loop(tmp_path):
    """Two epochs, lr / 10 in the second; 20 of 24 labels in batches of 9, of which the last two are left out."""
    data = save_noisy_classes(tmp_path, 1, per_class=6)
    config = semi.Config(size=8, epochs=2, milestones=(1,), lr=2.0, batch=9)
    run, encoder = run_on(data, tmp_path, "semi-supervised", seed=3), Network().double()
    frozen, images, rows = freeze(encoder, run), real_images(run), torch.arange(2, 22)
    model = nn.Sequential(copy.deepcopy(encoder), nn.Linear(6, 4).double()).requires_grad_(True)
    expected = copy.deepcopy(model)
    semi.fine_tune(model, frozen, images, rows, "test", config, run, tmp_path / "test")

    momenta = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    for epoch in range(2):
        view, key = RandomCrop(8, (3, "semi-supervised", epoch)), (3, "semi-supervised", epoch)
        batches = list(epoch_order(rows, 9, True, *key))
        assert [len(batch) for batch in batches] == [9, 9]
        for chosen in batches:
            taken = [images.splits["train"].read(int(index), view) for index in chosen]
            labels = torch.tensor([label for _, label in taken])
            scores = expected.train()(frozen.normalize(torch.stack([pixels for pixels, _ in taken])))
            gradients = torch.autograd.grad(F.cross_entropy(scores.float(), labels), list(expected.parameters()))
            for parameter, momentum, gradient in zip(expected.parameters(), momenta, gradients, strict=True):
                momentum.mul_(0.9).add_(gradient)
                parameter.data.sub_(2.0 * 9 / 256 * 0.1**epoch * (gradient + 0.9 * momentum))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert not model.training and not model[0].layers[1].running_mean.equal(encoder.layers[1].running_mean)


@pytest.mark.parametrize(("signal", "low", "high"), [(6, 0.9, 1), (0, 0.06, 0.44)])
def test_separable_classes_are_found_and_unrelated_labels_give_chance(tmp_path, signal, low, high):
    data, encoder = save_noisy_classes(tmp_path, signal), Network()
    before = copy.deepcopy(encoder.state_dict())
    words = ("fractions=0.25,0.5", "size=8", "epochs=12", "milestones=8", "lr=2", "batch=24")
    found = measure("semi-supervised", encoder, data, tmp_path, *words)
    assert list(found) == ["semi_supervised_25pct_top1", "semi_supervised_50pct_top1"]
    assert all(low <= value <= high for value in found.values())
    assert all(encoder.state_dict()[name].equal(value) for name, value in before.items()), "a copy is fine-tuned"
    assert not list(tmp_path.glob("semi-supervised-*")), "checkpoints are deleted in the end"


def test_pixels_have_nothing_to_fine_tune(tmp_path):
    assert measure("semi-supervised", nn.Flatten(), save_noisy_classes(tmp_path, 1), tmp_path, "fractions=0.5") == {}


@pytest.fixture
def photographs(tmp_path):
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        for label, name in enumerate(("n01", "n02")):
            for number in numbers:
                jpeg(tmp_path / split / name / f"{name}_{number}.JPEG", label, number)
    return DataConfig("folder", str(tmp_path), image_size=8)


def test_lists_name_the_labelled_images(photographs, tmp_path):
    path = tmp_path / "half.txt"
    path.write_text("n02_3.JPEG\nn01_0.JPEG\nn02_1.JPEG\nn01_5.JPEG\n")
    split = sets.open_set(photographs).splits["train"]
    assert semi.listed(split, path).tolist() == [0, 5, 7, 9]
    words = (f"lists={path}", "size=8", "epochs=2", "batch=4")
    assert list(measure("semi-supervised", Network(), photographs, tmp_path, *words)) == ["semi_supervised_half_top1"]
    path.write_text("n02_3.JPEG\nn09_0.JPEG\n")
    with pytest.raises(UsageError, match="1 of its lines name no image, such as n09_0.JPEG .it is no training image"):
        semi.listed(split, path)
    path.write_text("")
    with pytest.raises(UsageError, match="is empty"):
        semi.listed(split, path)


def test_a_list_of_other_images_is_told_before_any_stage(photographs, tmp_path):
    path = tmp_path / "half.txt"
    config = run_on(photographs, tmp_path, "semi-supervised", f"lists={path}").config
    path.write_text("n02_3.JPEG\n")
    evals.expect_data(config)
    path.write_text("n02_3.JPEG\nn09_0.JPEG\n")
    with pytest.raises(UsageError, match="1 of its lines name no image, such as n09_0.JPEG"):
        evals.expect_data(config)


def test_names_that_several_images_have_are_given_with_their_class(photographs, tmp_path):
    for name in ("n01", "n02"):
        jpeg(tmp_path / "train" / name / "same.jpg", 0, 0)
    split, path = sets.open_set(photographs).splits["train"], tmp_path / "list.txt"
    path.write_text("same.jpg\n")
    with pytest.raises(UsageError, match="same.jpg .2 are called so, give CLASS/FILE"):
        semi.listed(split, path)
    path.write_text("n02/same.jpg\nn01/n01_1.JPEG\n")
    assert semi.listed(split, path).tolist() == [1, 13]


def test_packed_images_have_the_names_of_their_sources(tmp_path):
    names = ("a/train-0.tar: n01/x.JPEG", "a/train-0.tar: y.JPEG")
    (tmp_path / "list.txt").write_text("y.JPEG\nx.JPEG\n")
    assert semi.listed(SimpleNamespace(count=2, where=names.__getitem__), tmp_path / "list.txt").tolist() == [0, 1]


def test_a_missing_list_is_told_before_any_stage(tmp_path):
    with pytest.raises(UsageError, match="1percent.txt is missing"):
        semi.check(semi.Config(lists=(str(tmp_path / "1percent.txt"),)), torch.arange(9))


def test_lists_need_images_with_names(tmp_path):
    (tmp_path / "list.txt").write_text("a\n")
    with pytest.raises(UsageError, match="the training images are none: take semi-supervised.fractions"):
        semi.listed(sets.open_set(save_noisy_classes(tmp_path, 1)).splits["train"], tmp_path / "list.txt")


def test_a_stopped_fine_tuning_goes_on_to_the_same_result(tmp_path, monkeypatch):
    data, encoder = save_noisy_classes(tmp_path, 1), Network()
    words = ("fractions=0.25,0.5", "size=8", "epochs=4", "lr=1", "batch=24")
    whole = measure("semi-supervised", encoder, data, tmp_path, *words)
    steps, stepped = [], semi.stepped
    monkeypatch.setattr(semi, "stepped", lambda *key: steps.append(key[-1]) or stepped(*key))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_requested", lambda: len(steps) == 9)  # in the third of two-step epochs
        with pytest.raises(interrupts.Interrupted, match="semi-supervised 50pct: stopped at step 5"):
            measure("semi-supervised", encoder, data, tmp_path, *words)
    assert len(list(tmp_path.glob("semi-supervised-*/checkpoint.pt"))) == 2
    assert measure("semi-supervised", encoder, data, tmp_path, *words) == whole
    assert steps == [0, 1, 2, 3, *(0, 0, 1, 1, 2), *(2, 3, 3)] and not list(tmp_path.glob("semi-supervised-*"))


def test_another_normalisation_stride_or_precision_is_another_fine_tuning(tmp_path, monkeypatch):
    data, encoder = save_noisy_classes(tmp_path, 1), Network()
    monkeypatch.setattr(loop, "stop_requested", lambda: True)
    run = run_on(data, tmp_path, "semi-supervised", "fractions=0.5", "size=8", "epochs=2")
    half = dataclasses.replace(run.config, probe=dataclasses.replace(run.config.probe, precision="bf16"))
    strided = copy.deepcopy(encoder)
    next(layer for layer in strided.modules() if isinstance(layer, nn.Conv2d)).stride = (2, 2)
    of_mean = dataclasses.replace(run.config, pretrain=PretrainConfig(augmentation="digits"))
    for config, network in ((run.config, encoder), (run.config, strided), (half, encoder), (of_mean, encoder)):
        with pytest.raises(interrupts.Interrupted):
            evals.evaluate("semi-supervised", copy.deepcopy(network), dataclasses.replace(run, config=config))
    assert len(list(tmp_path.glob("semi-supervised-*/checkpoint.pt"))) == 4


def test_where_nothing_can_be_written_a_fine_tuning_is_done_elsewhere(tmp_path):
    data = save_noisy_classes(tmp_path, 1)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="a stopped fine-tuning would start again: .*Not a directory"):
        assert measure(
            "semi-supervised", Network(), data, tmp_path / "file" / "run", "fractions=0.5", "size=8", "epochs=1"
        )


def test_losses_that_are_not_finite_are_named(tmp_path):
    class Failing(Network):
        def forward(self, images):
            return super().forward(images) * (torch.inf if self.training else 1)

    with pytest.raises(NonFiniteError, match="semi-supervised 50pct: NaN or infinity in loss at step 0"):
        measure("semi-supervised", Failing(), save_noisy_classes(tmp_path, 1), tmp_path, "fractions=0.5", "size=8")
