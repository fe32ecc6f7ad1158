"""LiDAR, alpha-ReQ and the weighted vote against literal formulas and known answers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from copgen_fast import augmentations
from copgen_fast.config import RunConfig
from copgen_fast.errors import NonFiniteError, UsageError
from copgen_fast.evals.alpha_req import power_law, spectrum
from copgen_fast.evals.collapse import effective_number, rankme
from copgen_fast.evals.knn import classify
from copgen_fast.evals.lidar import lidar
from copgen_fast.runtime import interrupts
from copgen_fast.train import validate
from tests.evals.test_evals import function, noisy_classes, pixels, run, save


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save(tmp_path_factory.mktemp("images"), noisy_classes(signal=3))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n, dim, seed=0):
    """[n, dim] of mean 0 and covariance exactly I."""
    points = normal(n, dim, seed=seed)
    points = points - points.mean(0)
    return torch.linalg.qr(points).Q * math.sqrt(n - 1)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def test_lidar_is_its_definition():
    n, q, dim, delta = 30, 6, 9, 1e-4
    x = (normal(n, 1, dim) + 0.5 * normal(n, q, dim, seed=1) * torch.arange(1, dim + 1)).numpy()
    means = x.mean(1)
    between = sum(np.outer(mean - means.mean(0), mean - means.mean(0)) for mean in means) / (n - 1)
    within = sum(np.outer(x[i, j] - means[i], x[i, j] - means[i]) for i in range(n) for j in range(q)) / (n * (q - 1))
    within = within + delta * np.eye(dim)
    values = np.linalg.eigvalsh(root(within) @ between @ root(within))
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    for parts in ([x], [x[:7], x[7:20], x[20:]]):
        assert lidar(map(torch.from_numpy, parts), delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_lidar_counts_the_directions_in_which_images_differ(rank):
    means = white(40, 12)
    means[:, rank:] = 0
    views = means[:, None] + 0.1 * white(40 * 5, 12, seed=1).unflatten(0, (40, 5))
    assert lidar([views], 1e-4) == pytest.approx(rank, rel=0.2)
    assert lidar([means[:, None].expand(-1, 5, -1)], 1e-4) == pytest.approx(rank, rel=1e-6)


def test_lidar_of_an_encoder(images):
    words = ("lidar.images=60", "lidar.views=4")
    found = run("lidar", pixels(), images, *words, "lidar.augmentation=simclr")
    assert found == run("lidar", pixels(), images, *words, "lidar.augmentation=simclr", batch=256)
    assert 1 < found["lidar"] < 48
    few = function(lambda x: x.flatten(1)[:, :3])
    assert 1 < run("lidar", few, images, *words)["lidar"] <= 3.001
    seen = []
    run("lidar", function(lambda x: seen.append(x) or x.flatten(1)), images, "lidar.images=5", "lidar.views=3", batch=7)
    assert [len(x) for x in seen] == [6, 6, 3]
    policy = augmentations.get("none")  # of run_on: views are the images, normalised
    assert seen[0][0].equal(seen[0][1]) and not seen[0][0].equal(seen[0][3]) and policy.mean


def test_lidar_names_what_is_not_finite_and_stops(images, monkeypatch):
    with pytest.raises(NonFiniteError, match="features of lidar"):
        run("lidar", function(lambda x: x.flatten(1) / 0), images, "lidar.images=5", "lidar.views=3")
    monkeypatch.setattr("copgen_fast.evals._frozen.stop_requested", lambda: True)
    with pytest.raises(interrupts.Interrupted):
        run("lidar", pixels(), images)


def test_lidar_refuses_a_policy_that_does_not_exist():
    from copgen_fast.config import ProbeConfig

    config = RunConfig(probe=ProbeConfig(evals=("lidar",), options=("lidar.augmentation=blur",)))
    with pytest.raises(UsageError, match="unknown augmentation 'blur'"):
        validate(config)


def test_isotropic_features_have_alpha_0_and_full_rank():
    points = white(400, 64)
    assert spectrum(points) == pytest.approx(np.ones(64), rel=1e-9)
    alpha, _ = power_law(spectrum(points), 10)
    assert alpha == pytest.approx(0, abs=1e-9)
    assert rankme(points) == pytest.approx(64, rel=1e-9)
    assert effective_number(torch.ones(5)) == pytest.approx(5) and effective_number(torch.eye(5)[0]) == 1


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("n", [400, 90])
def test_a_power_law_is_found_and_fits(exponent, n):
    dim = 128 if n < 128 else 96
    ranks = torch.arange(1, dim + 1, dtype=torch.float64)
    points = (white(400, dim) if n == 400 else white(dim, n).T) * ranks[:dim] ** (-exponent / 2)
    values = spectrum(points)
    assert len(values) == min(dim, n - 1 if n < dim else dim)
    if n == 400:
        alpha, r2 = power_law(values, 10)
        assert alpha == pytest.approx(exponent, rel=1e-6) and r2 == pytest.approx(1, abs=1e-9)


def test_the_fit_is_weighted_least_squares():
    values = (-normal(40).abs().cumsum(0)).exp()
    ranks = np.arange(10, 41)
    y = values[9:].log().numpy()
    slope, offset = np.polyfit(np.log(ranks), y, 1, w=np.sqrt(1 / ranks))
    rest = y - slope * np.log(ranks) - offset
    mean = np.average(y, weights=1 / ranks)
    expected = 1 - (rest**2 / ranks).sum() / ((y - mean) ** 2 / ranks).sum()
    assert power_law(values, 10) == pytest.approx((-slope, expected), rel=1e-9)


def test_alpha_req_of_an_encoder_and_where_it_cannot_be_fitted(images):
    found = run("alpha-req", pixels(), images)
    assert set(found) == {"alpha_req", "alpha_req_r2"} and 0 < found["alpha_req_r2"] <= 1
    for narrow in (function(lambda x: x.flatten(1)[:, :8]), function(lambda x: torch.ones(len(x), 40))):
        with pytest.warns(UserWarning, match="alpha-req left out: .* 12 are needed"):
            assert run("alpha-req", narrow, images) == {}


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_the_weighted_vote_is_its_definition(k, temperature):
    train, test = normal(400, 6), normal(60, 6, seed=1)
    labels = (train[:, 0] > 0).long() + (train[:, 1] > 0.5).long()
    expected = []
    for row in test:
        similarity = [torch.dot(row, other) / row.norm() / other.norm() for other in train]
        nearest = sorted(range(400), key=lambda i: -similarity[i])[:k]
        votes = [sum(math.exp(similarity[i] / temperature) for i in nearest if labels[i] == c) for c in range(3)]
        expected.append(votes.index(max(votes)))
    assert classify(train, labels, test, k, temperature).tolist() == expected


def test_weighted_votes_stand_beside_the_plain_one_where_there_are_enough_images(images, tmp_path):
    weighted = {f"knn_k{k}_t{t}_top1" for k in (20, 200) for t in ("07", "10")}
    found = run("knn", pixels(), images)
    assert set(found) == {"knn_top1"} | weighted and all(found[name] == 1 for name in weighted)
    few = save(tmp_path, noisy_classes(signal=3, per_class=5))
    found = run("knn", nn.Flatten(), few, "knn.neighbours=5")
    assert set(found) == {"knn_top1", "knn_k20_t07_top1", "knn_k20_t10_top1"}
