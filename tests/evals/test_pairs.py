"""Measures of pairs and of generated sets against literal formulas, closed forms and pairs on disk."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from copgen_fast.config import PretrainConfig, ProbeConfig, RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.evals import evaluate, expect_data, freeze, generated
from copgen_fast.evals.generated import compare, kernel_distance, precision_to_coverage, radii
from copgen_fast.evals.pairs import retrieval, uniformity
from copgen_fast.images.sets import LabelledImages
from tests.evals.test_evals import function, pixels, run_on, save
from tests.evals.test_label_free import normal, white
from tests.helpers import pairs_fixtures

COUNT = 30
MEASURES = ("precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pairs_fixtures.write(folder, dataclasses.replace(pairs_fixtures.CONFIG, count=COUNT))
    return folder


def stored(folder):
    from copgen_fast.pairs.read.dataset import PairDataset

    anchors, positives, _ = zip(*PairDataset(folder), strict=True)
    return torch.stack(anchors), torch.stack(positives)


@pytest.fixture(scope="module")
def real(pairs, tmp_path_factory):
    """Real images like the anchors: class 1 where the top left pixel is bright."""
    z = torch.randn(200, pairs_fixtures.LATENT_DIM, generator=torch.Generator().manual_seed(5))
    images = ((pairs_fixtures.generate(z) + 1) * 127).to(torch.uint8)
    labels = (images[:, 0, 0, 0] > 127).long()
    return save(tmp_path_factory.mktemp("real"), LabelledImages(images[:160], labels[:160], images[160:], labels[160:]))


def measure(name, encoder, real, pairs, *options, **changes):
    return evaluate(name, encoder, run_on(real, f"{name}.folder={pairs}", *options, **changes))


def test_pairs_are_measured_by_their_definitions(pairs, real):
    found = measure("pairs", pixels(), real, pairs)
    frozen = freeze(pixels(), run_on(real))
    anchors, positives = (F.normalize(frozen.features(images).double(), dim=1) for images in stored(pairs))
    distances = [math.dist(a, p) for a, p in zip(anchors.tolist(), positives.tolist(), strict=True)]
    assert found["pairs_alignment"] == pytest.approx(np.mean(np.square(distances)), rel=1e-5)
    for q in (5, 50, 95):
        assert found[f"pairs_distance_p{q:02d}"] == pytest.approx(np.quantile(distances, q / 100), rel=1e-5)
    expected = [
        math.log(np.mean([math.exp(-2 * math.dist(x[i], x[j]) ** 2) for i in range(COUNT) for j in range(i)]))
        for x in (anchors.tolist(), positives.tolist())
    ]
    assert found["pairs_uniformity"] == pytest.approx(np.mean(expected), rel=1e-5)
    nearest = torch.cdist(anchors, positives).argmin(1)
    assert found["pairs_retrieval_top1"] == (nearest == torch.arange(COUNT)).double().mean()
    assert 0.5 < found["pairs_agreement_top1"] <= 1 and 0 < found["pairs_agreement_chance"] < 1
    assert measure("pairs", pixels(), real, pairs, "pairs.count=7") != found
    assert found == measure("pairs", pixels(), real, pairs, batch=11)


def test_agreement_is_that_of_the_classes_and_left_out_without_labels(pairs, real, tmp_path):
    bright = function(lambda x: x[:, 0, :1, :1].flatten(1).expand(-1, 4))
    found = measure("pairs", bright, real, pairs)
    classes = [images[:, 0, 0, 0] > 127 for images in stored(pairs)]
    assert found["pairs_agreement_top1"] == pytest.approx((classes[0] == classes[1]).double().mean().item(), abs=0.07)
    arrays = {name: array for name, array in np.load(real).items() if "labels" not in name}
    np.savez(tmp_path / "unlabelled.npz", **arrays)
    run = run_on(tmp_path / "unlabelled.npz", f"pairs.folder={pairs}")
    alone = dataclasses.replace(run.config, probe=dataclasses.replace(run.config.probe, evals=("pairs",)))
    run = dataclasses.replace(run, config=alone)
    assert {"pairs_alignment", "pairs_retrieval_top1"} < set(evaluate("pairs", bright, run))
    assert not any("agreement" in name for name in evaluate("pairs", bright, run))


def test_uniformity_and_retrieval_at_their_ends():
    points = F.normalize(normal(3000, 64), dim=1)
    assert uniformity(points) == pytest.approx(-4 + 8 / 64, abs=0.02)
    assert uniformity(torch.ones(50, 4) / 2) == pytest.approx(0, abs=1e-5)
    assert retrieval(points, points) == 1 and retrieval(points, points.roll(1, 0)) == 0
    assert retrieval(torch.ones(50, 4), torch.ones(50, 4)) <= 0.1, "collapsed features find nothing"


def test_pairs_of_another_size_are_resized_and_kept_for_the_next_evaluation(pairs, tmp_path):
    images = torch.randint(0, 256, (40, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    shapes = []
    encoder = function(lambda x: shapes.append(tuple(x.shape)) or x.flatten(1))
    data = save(tmp_path, LabelledImages(images, labels, images, labels))
    run = run_on(data, f"pairs.folder={pairs}", f"generated.folder={pairs}")
    evaluate("pairs", encoder, run)
    assert (2 * COUNT, 3, 5, 5) in shapes and len(shapes) == 2
    found = evaluate("generated", encoder, run)
    assert len(shapes) == 2 and found["generated_images"] == 20, "both the pairs' and the images' features were there"


def test_an_encoders_own_pairs_are_those_that_it_was_frozen_with(pairs, real):
    encoder, run = pixels(), run_on(real)
    freeze(encoder, run, pairs)
    assert evaluate("pairs", encoder, run) == measure("pairs", pixels(), real, pairs)


@pytest.mark.parametrize("name", ["pairs", "generated"])
def test_an_encoder_without_pairs_is_refused_in_one_line(name, real, tmp_path):
    remedy = f"name a folder of them by --evals.options {name}.folder=PATH"
    with pytest.raises(UsageError, match=f"evaluation {name} needs pairs, and this encoder comes without: {remedy}"):
        evaluate(name, pixels(), run_on(real))
    config = RunConfig(probe=ProbeConfig((name,)), pretrain=PretrainConfig(data="online"))
    with pytest.raises(UsageError, match="--pretrain.data online writes none: name a folder"):
        expect_data(config)
    config = RunConfig(probe=ProbeConfig((name,), (f"{name}.folder={tmp_path}",)))
    with pytest.raises(UsageError, match="run `--stages pairs`|index.json"):
        expect_data(config)


def test_too_few_images_are_refused(pairs, real, tmp_path):
    images = torch.zeros(11, 3, 8, 8, dtype=torch.uint8)
    few = save(tmp_path, LabelledImages(images, torch.arange(11) % 2, images, torch.arange(11) % 2))
    with pytest.raises(UsageError, match="needs 12 real training images or more, got 11"):
        measure("generated", pixels(), few, pairs)


def test_generated_sets_have_equal_sizes_beside_a_floor(pairs, real):
    found = measure("generated", pixels(), real, pairs)
    assert found["generated_images"] == COUNT
    measures = ["frechet_distance", "kernel_distance", "kernel_distance_std", *MEASURES]
    assert list(found)[1:] == [f"{name}_{measure}" for measure in measures for name in ("anchors", "positives", "real")]
    assert found["real_frechet_distance"] > 0 and found["anchors_frechet_distance"] < 3 * found["real_frechet_distance"]
    assert json.dumps(found) and found == measure("generated", pixels(), real, pairs)
    assert found != measure("generated", pixels(), real, pairs, seed=1)
    assert measure("generated", pixels(), real, pairs, "generated.count=10")["generated_images"] == 10


def literal_prdc(fake, real, k):
    """Kynkaanniemi et al. 2019, equations 1 and 2; Naeem et al. 2020, equations 4 and 6."""

    def radius(points, i):
        return sorted(math.dist(points[i], other) for other in points)[k]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    inside = [[math.dist(x, y) < r for y, r in zip(real, real_radii, strict=True)] for x in fake]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean([any(math.dist(x, y) < r for x, r in zip(fake, fake_radii, strict=True)) for y in real]),
        "density": np.mean([sum(row) / k for row in inside]),
        "coverage": np.mean([any(column) for column in zip(*inside, strict=True)]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_coverage_are_their_definitions(k, monkeypatch):
    monkeypatch.setattr(generated, "_CHUNK", 7)  # so that parts meet
    fake, real = 0.8 * normal(40, 3) + 1.2, normal(50, 3, seed=1)
    found = precision_to_coverage(fake, real, radii(real, (k, k)), (k, k))
    assert found == pytest.approx(literal_prdc(fake.tolist(), real.tolist(), k), abs=1e-12)
    assert 0 < found["precision"] < 1 and 0 < found["coverage"] < 1


def test_the_kernel_distance_is_its_definition():
    a, b = normal(12, 5), normal(15, 5, seed=1) + 0.3

    def kernel(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    def within(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    expected = within(a) + within(b[:12]) - 2 * np.mean([kernel(x, y) for x in a for y in b[:12]])
    assert kernel_distance(a, b[:12], torch.Generator()) == (pytest.approx(expected, rel=1e-12), 0)
    mean, spread = kernel_distance(a, b, torch.Generator().manual_seed(0))
    whole = within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert mean == pytest.approx(whole, abs=3 * spread / 10) and spread > 0


def test_measures_at_their_ends(real):
    run, points = run_on(real), white(300, 6)

    def compared(fake, real):
        return compare(fake, real, radii(real, (3, 5)), run)

    same = compared(points, points)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == pytest.approx(1.2, abs=0.2)  # each ball holds k others and its centre, near enough
    shift = torch.tensor([3.0, 4, 0, 0, 0, 0], dtype=torch.float64)
    assert compared(points + shift, points)["frechet_distance"] == pytest.approx(25, rel=1e-9)
    far = compared(points + 100 * shift, points)
    assert far["precision"] == far["recall"] == far["density"] == far["coverage"] == 0
    assert far["kernel_distance"] > 1e6
    independent = compared(normal(600, 6), normal(600, 6, seed=1))
    assert abs(independent["kernel_distance"]) < 0.1, "unbiased: around 0 for one distribution"
    assert independent["density"] == pytest.approx(1, abs=0.1) and independent["coverage"] > 0.9
