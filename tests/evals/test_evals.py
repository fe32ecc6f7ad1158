"""Evaluations against known answers: separable, random, collapsed and low-rank features, and real digits."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from copgen_fast import augmentations, registry
from copgen_fast.config import DataConfig, PretrainConfig, ProbeConfig, RunConfig
from copgen_fast.errors import NonFiniteError, UsageError
from copgen_fast.evals import FrozenEncoder, evaluate, freeze, linear_augmented
from copgen_fast.evals.collapse import feature_std, rankme
from copgen_fast.evals.knn import classify
from copgen_fast.evals.linear_augmented import learning_rate
from copgen_fast.evals.lowshot import draw_labels
from copgen_fast.images import sets
from copgen_fast.images.views import Squash
from copgen_fast.runtime import interrupts
from copgen_fast.train import validate

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)
CLASSES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class EvalRun:
    """What an evaluation sees of a run, on real images from a file."""

    config: RunConfig
    folder: Path
    device: torch.device = CPU


def pixels():
    return nn.Flatten()


def function(call):
    """An encoder that is a plain function of normalised images."""
    return lambda images: call(images)


def run_on(images, *options, seed=0, **probe):
    """A run whose real images lie in the file `images`."""
    config = RunConfig(
        seed=seed,
        data=DataConfig("npz", str(images), image_size=np.load(images)["train_images"].shape[1]),
        probe=ProbeConfig(evals=registry.names("evals"), options=options, **probe),
        pretrain=PretrainConfig(augmentation="none"),
    )
    return EvalRun(config, images.parent)


def run(name, encoder, images, *options, **changes):
    """Evaluate an encoder on the images of a file."""
    return evaluate(name, encoder, run_on(images, *options, **changes))


def save(folder, images):
    """A data set as an .npz file."""
    arrays = {name: getattr(images, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    arrays = {name: (x.movedim(1, 3) if x.ndim == 4 else x).numpy() for name, x in arrays.items()}
    np.savez(folder / "images.npz", **arrays)
    return folder / "images.npz"


def noisy_classes(signal, per_class=24, test_per_class=20, size=4, classes=CLASSES):
    """Noise images, plus `signal` times a pattern of the class."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(classes, 3, size, size, generator=generator)
    splits = []
    for count in (per_class, test_per_class):
        labels = torch.arange(classes).repeat(count)
        noise = torch.randn(len(labels), 3, size, size, generator=generator)
        images = 128 + 20 * (noise + signal * patterns[labels])
        splits += [images.clamp(0, 255).to(torch.uint8), labels]
    return sets.LabelledImages(*splits)


@pytest.fixture(scope="module")
def separable(tmp_path_factory):
    return save(tmp_path_factory.mktemp("separable"), noisy_classes(signal=3))


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory):
    return save(tmp_path_factory.mktemp("unrelated"), noisy_classes(signal=0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save(tmp_path_factory.mktemp("digits"), sets.digits(8))


FAST = ("linear", "lowshot", "knn")


def test_every_evaluation_is_registered():
    known = set(registry.names("evals"))
    assert known > {"alpha-req", "collapse", "generated", "knn", "lidar", "linear", "lowshot", "pairs"}
    with pytest.raises(UsageError, match="unknown name 'svm' in evals"):
        registry.load("evals", "svm")


@pytest.mark.parametrize("name", FAST)
def test_separable_classes_are_all_found(name, separable):
    found = run(name, pixels(), separable)
    assert found[f"{name}_top1"] == 1.0


@pytest.mark.parametrize("name", FAST)
def test_unrelated_labels_give_chance(name, unrelated):
    found = run(name, pixels(), unrelated)
    assert 0.02 < found[f"{name}_top1"] < 0.2  # chance is 0.1; four standard deviations are 0.085


def test_top5_only_where_it_says_something(separable, unrelated, tmp_path):
    assert run("linear", pixels(), separable)["linear_top5"] == 1.0
    assert run("linear", pixels(), unrelated)["linear_top5"] == pytest.approx(0.5, abs=0.15)
    two = save(tmp_path, noisy_classes(signal=3, classes=2))
    assert run("linear", pixels(), two) == {"linear_top1": 1.0}


def test_linear_converges(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("linear", pixels(), digits)


def test_linear_stands_dead_dimensions(separable):
    constant = function(lambda x: torch.cat([x.flatten(1), torch.full((len(x), 3), 7.0)], dim=1))
    assert run("linear", constant, separable)["linear_top1"] == 1.0


def test_pixels_on_real_digits(digits):
    assert run("linear", pixels(), digits)["linear_top1"] > 0.93
    assert run("knn", pixels(), digits)["knn_top1"] > 0.93
    lowshot = run("lowshot", pixels(), digits)
    assert 0.75 < lowshot["lowshot_min"] <= lowshot["lowshot_top1"] <= lowshot["lowshot_max"] < 0.95
    assert 0 < lowshot["lowshot_std"] < 0.05
    assert run("lowshot", pixels(), digits) == lowshot
    assert run("lowshot", pixels(), digits, seed=1) != lowshot


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
def test_draws_are_balanced_and_without_replacement(shots, seed, draw):
    labels = torch.randperm(60, generator=torch.Generator().manual_seed(9)) % 6
    chosen = draw_labels(labels, shots, seed, draw)
    assert labels[chosen].bincount().tolist() == [shots] * 6
    assert len(chosen.unique()) == len(chosen)
    assert chosen.equal(draw_labels(labels, shots, seed, draw))


def test_draws_differ_by_seed_and_number_only():
    labels = torch.arange(200) % 10
    kinds = {tuple(draw_labels(labels, 5, seed, draw).tolist()) for seed in range(3) for draw in range(4)}
    assert len(kinds) == 12


def test_every_encoder_is_evaluated_on_the_same_draws(digits, monkeypatch):
    from copgen_fast.evals import lowshot

    seen = []
    monkeypatch.setattr(lowshot, "draw_labels", lambda *key: seen.append(draw_labels(*key)) or seen[-1])
    for encoder in (pixels(), function(lambda x: x.mean(1).flatten(1))):
        run("lowshot", encoder, digits, "lowshot.draws=3", seed=4)
    assert len(seen) == 6
    assert all(one.equal(other) for one, other in zip(seen[:3], seen[3:], strict=True))


def test_too_few_labels(separable):
    with pytest.raises(UsageError, match="expected 1 .. 24, the training images of class 0, got 25"):
        run("lowshot", pixels(), separable, "lowshot.shots=25")


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("lowshot", "shots=0", "shots: expected .*got 0"),
        ("lowshot", "draws=0", "draws: expected .*got 0"),
        ("knn", "neighbours=0", "neighbours: expected .*got 0"),
        ("linear-augmented", "epochs=0", "epochs: expected .*got 0"),
        ("linear-augmented", "lr=nan", "lr: expected .*got nan"),
        ("linear-augmented", "augmentation=blur", "unknown augmentation 'blur'"),
    ],
)
def test_options_out_of_range_are_refused_before_any_stage(name, word, message):
    config = RunConfig(probe=ProbeConfig(evals=(name,), options=(f"{name}.{word}",)))
    with pytest.raises(UsageError, match=message):
        validate(config)


def test_one_draw_has_no_spread(separable):
    found = run("lowshot", pixels(), separable, "lowshot.draws=1")
    assert found["lowshot_std"] == 0 and found["lowshot_min"] == found["lowshot_max"]
    with pytest.raises(UsageError, match="draws: expected"):
        run("lowshot", pixels(), separable, "lowshot.draws=0")


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_knn_agrees_with_scikit_learn(neighbours):
    generator = torch.Generator().manual_seed(3)
    train, test = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (400, 1500))
    labels = (train[:, 0] > 0).long() + (train[:, 1] > 0.5).long()
    peer = KNeighborsClassifier(neighbours, metric="cosine").fit(train.numpy(), labels.numpy())
    votes = np.sort(peer.predict_proba(test.numpy()), axis=1)
    clear = votes[:, -1] > votes[:, -2]
    assert clear.mean() > 0.7
    predicted = classify(train, labels, test, neighbours).numpy()
    np.testing.assert_array_equal(predicted[clear], peer.predict(test.numpy())[clear])


def test_knn_ties_go_to_the_nearer_class():
    angles = torch.tensor([0.1, 0.5, 0.3, 0.6])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    test = torch.tensor([[1.0, 0.0]])
    assert classify(train, torch.tensor([1, 1, 0, 0]), test, 4).item() == 1
    assert classify(train, torch.tensor([0, 0, 1, 1]), test, 4).item() == 0
    far = torch.tensor([[0.1, 1.0], [0.1, 1.0], [1.0, 0.0]])  # two votes of similarity 0.1 against one of 1
    assert classify(far, torch.tensor([0, 0, 1]), test, 3).item() == 0


def test_knn_needs_enough_neighbours(separable):
    with pytest.raises(UsageError, match="expected 1 .. 240 training images, got 241"):
        run("knn", pixels(), separable, "knn.neighbours=241")


@pytest.mark.parametrize("shape", [(500, 32), (40, 100)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rankme_counts_directions(shape, rank):
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in shape)
    assert rankme(left @ right.T) == pytest.approx(rank, rel=1e-3)


def test_rankme_is_its_definition():
    features = torch.randn(80, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum()
    assert rankme(features) == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-9)


def test_feature_std_is_one_for_isotropic_and_zero_for_collapsed():
    features = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(features) == pytest.approx(1, abs=0.01)
    assert feature_std(features * 100) == pytest.approx(feature_std(features), rel=1e-5)
    assert feature_std(torch.ones(50, 64)) == pytest.approx(0, abs=1e-6)
    assert rankme(torch.zeros(50, 64)) == 1


def test_collapse_takes_a_sample_of_many(monkeypatch, separable):
    from copgen_fast.evals import collapse

    whole = run("collapse", pixels(), separable)
    monkeypatch.setattr(collapse, "_SAMPLE", 300)
    part = run("collapse", pixels(), separable)
    assert part != whole and part == run("collapse", pixels(), separable)
    assert part["rankme"] == pytest.approx(whole["rankme"], rel=0.1)


def test_features_are_normalised_batched_and_computed_once(tmp_path):
    images = noisy_classes(signal=3)
    batches = []

    def encoder(images):
        batches.append(len(images))
        return images.flatten(1)

    frozen = FrozenEncoder(encoder, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), CPU, 100)
    features = frozen.features(images.train_images)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    torch.testing.assert_close(features, ((images.train_images / 255 - mean) / std).flatten(1))
    assert batches == [100, 100, 40]
    data = sets.open_set(DataConfig("npz", str(save(tmp_path, images)), image_size=4))
    kept = frozen.split_features(data, "train")
    assert kept.features.equal(features) and kept.labels.equal(images.train_labels) and len(batches) == 6
    assert frozen.split_features(data, "train") is kept and len(batches) == 6
    frozen.split_features(data, "train", Squash(4))
    assert len(batches) == 9, "another view is encoded anew"
    assert len(frozen.features(images.test_images)) == 200 and len(batches) == 11


def test_evaluations_of_a_run_share_its_images_and_features(separable):
    calls = []
    encoder, shared = function(lambda x: calls.append(len(x)) or x.flatten(1)), run_on(separable)
    for name in FAST:
        evaluate(name, encoder, shared)
    assert sum(calls) == 240 + 200, "each image was encoded once"


def test_an_encoder_is_frozen_for_its_evaluation(separable):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()).train()
    frozen = freeze(encoder, run_on(separable))
    assert frozen is freeze(encoder, run_on(separable)) and not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_features_that_are_not_finite_name_the_batch(separable):
    policy = augmentations.get("none")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (policy.mean, policy.std))
    spoilt = (noisy_classes(signal=3).train_images[150].float() / 255 - mean) / std

    def encoder(images):
        features = images.flatten(1)
        features[(images == spoilt).flatten(1).all(1)] = float("nan")
        return features

    with pytest.raises(NonFiniteError, match="features: NaN or infinity in batch 1 "):
        run("linear", encoder, separable, batch=100)


def test_wrong_arguments_are_named():
    images = noisy_classes(signal=3).train_images
    with pytest.raises(TypeError, match="images: expected torch.uint8"):
        FrozenEncoder(pixels(), HALF, HALF, CPU, 10).features(images.float())
    with pytest.raises(ValueError, match="features: expected shape \\[10, D\\]"):
        FrozenEncoder(nn.Identity(), HALF, HALF, CPU, 10).features(images)


@pytest.mark.parametrize("name", ["linear", "lowshot", "linear-augmented"])
def test_a_requested_stop_ends_the_evaluation(name, separable, monkeypatch):
    encoder, shared = pixels(), run_on(separable)
    if name != "linear":
        evaluate("linear", encoder, shared)  # so that the features are there
    monkeypatch.setattr(f"copgen_fast.evals.{_stop_in(name)}.stop_requested", lambda: True)
    with pytest.raises(interrupts.Interrupted):
        evaluate(name, encoder, shared)


def _stop_in(name):
    return "_frozen" if name == "linear" else name.replace("-", "_")


def augmented(encoder, images, *, seed=0, batch=80, **changes):
    options = {"epochs": 3, "lr": 1.0, "augmentation": "none"} | changes
    words = [f"linear-augmented.{name}={value}" for name, value in options.items()]
    return run("linear-augmented", encoder, images, *words, seed=seed, batch=batch)


@pytest.fixture
def normalised(monkeypatch):
    """Gives encoders another normalisation: that of the policy they were trained under."""

    def change(mean, std):
        policy = dataclasses.replace(augmentations.get("none"), mean=mean, std=std)
        monkeypatch.setitem(augmentations.POLICIES, "none", policy)

    return change


def test_linear_augmented_learns_and_repeats(separable):
    found = augmented(pixels(), separable)
    assert found["linear_augmented_top1_last"] > 0.95
    assert found["linear_augmented_top1_best"] >= found["linear_augmented_top1_last"]
    assert found["linear_augmented_top5_last"] == 1.0
    assert set(found) == {f"linear_augmented_top{k}_{which}" for k in (1, 5) for which in ("last", "best")}
    assert found == augmented(pixels(), separable)


def test_linear_augmented_gives_chance_on_unrelated_labels(unrelated):
    assert 0.02 < augmented(pixels(), unrelated, augmentation="no-color")["linear_augmented_top1_last"] < 0.2


def test_linear_augmented_views_depend_on_seed_policy_normalisation_and_epoch(separable, normalised):
    def views(seed=0, policy="no-color"):
        seen = []
        spy = function(lambda x: seen.append(x) or x.flatten(1))
        augmented(spy, separable, seed=seed, epochs=2, augmentation=policy)
        return torch.stack(seen[-6:])  # three batches of each epoch

    first = views()
    assert first.equal(views()) and not first[:3].equal(first[3:])
    assert not any(first.equal(other) for other in (views(seed=1), views(policy="none")))
    normalised(HALF, (0.1, 0.2, 0.3))
    assert not first.equal(views())


def test_linear_augmented_sees_normalised_views_and_leaves_the_encoder_alone(separable, normalised):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    augmented(encoder, separable, epochs=2)
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    seen = []
    normalised((0.4, 0.4, 0.4), (0.1, 0.2, 0.3))
    augmented(function(lambda x: seen.append(x) or x.flatten(1)), separable, epochs=1, batch=240)
    plain, views = seen[0], seen[-1]
    assert sorted(len(part) for part in seen) == [200, 240] and plain.dtype == views.dtype == torch.float32
    scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected = (noisy_classes(signal=3).train_images / 255 - 0.4) / scale  # only the order differs
    torch.testing.assert_close(views.sum(0), expected.sum(0), rtol=1e-4, atol=1e-2)


def test_learning_rate_is_the_references():
    rates = [learning_rate(linear_augmented.Config(), 224, epoch) for epoch in range(1, 61)]
    assert rates[0] == pytest.approx(0.014 + (1.75 - 0.014) * (1 + np.cos(np.pi / 60)) / 2)
    assert rates[-1] == pytest.approx(0.014) and rates == sorted(rates, reverse=True)


def test_linear_augmented_refuses(separable):
    with pytest.raises(UsageError, match="epochs: expected"):
        augmented(pixels(), separable, epochs=0)
    with pytest.raises(UsageError, match="unknown augmentation 'blur'"):
        augmented(pixels(), separable, augmentation="blur")


def test_linear_augmented_names_a_loss_that_is_not_finite(separable):
    calls = []

    def encoder(images):
        calls.append(None)
        return images.flatten(1) * (float("nan") if len(calls) > 5 else 1)  # the plain test images come first

    with pytest.raises(NonFiniteError, match="loss of linear-augmented: NaN or infinity in epoch 1"):
        augmented(encoder, separable)
