import math

import pytest
import torch

from copgen_fast.evals import _frechet


def exactly(mean, covariance, n=50):
    """n points [n, D], float64, of exactly this mean and covariance."""
    generator = torch.Generator().manual_seed(len(covariance))
    points = torch.randn(n, len(covariance), generator=generator, dtype=torch.float64)
    points = points - points.mean(0)
    root = torch.linalg.cholesky(points.T @ points / (n - 1))
    points = torch.linalg.solve_triangular(root, points.T, upper=False).T
    return points @ torch.linalg.cholesky(covariance).T + mean


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_it_is_the_closed_form_where_covariances_commute():
    """Diagonal: |m - n|^2 + sum (s - t)^2, s and t the standard deviations."""
    a = exactly(vector(1, 2), matrix((4, 0), (0, 9)))
    b = exactly(vector(0, 0), matrix((1, 0), (0, 16)), n=70)
    assert _frechet.frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2, abs=1e-9)


def test_it_is_the_closed_form_where_they_do_not():
    """2x2: tr((AB)^(1/2)) = (tr(AB) + 2 det(AB)^(1/2))^(1/2)."""
    A, B = matrix((2, 0.5), (0.5, 1)), matrix((1, -0.7), (-0.7, 3))
    product = A @ B
    overlap = math.sqrt(product.trace().item() + 2 * math.sqrt(torch.det(product).item()))
    expected = 25 + A.trace().item() + B.trace().item() - 2 * overlap
    found = _frechet.frechet_distance(exactly(vector(3, 4), A), exactly(vector(0, 0), B))
    assert found == pytest.approx(expected, abs=1e-9)


def test_it_is_zero_for_the_same_set_symmetric_and_fit_for_singular_covariances():
    a, b = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))  # 6 points in 20 dimensions
    assert _frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert _frechet.frechet_distance(a, b) == pytest.approx(_frechet.frechet_distance(b, a), rel=1e-9)
    assert _frechet.frechet_distance(torch.zeros(3, 2), torch.full((3, 2), 2.0)) == pytest.approx(8)


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), ValueError, "features_b: expected shape"),
        (torch.zeros(1, 2), torch.zeros(3, 2), ValueError, "features_a: expected two rows or more, got 1"),
        (torch.zeros(3, 2), torch.zeros(0, 2), ValueError, "features_b: expected two rows or more, got 0"),
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2), TypeError, "features_a"),
    ],
)
def test_other_features_are_refused_by_name(a, b, error, words):
    with pytest.raises(error, match=words):
        _frechet.frechet_distance(a, b)


def test_features_are_the_same_for_all_callers_and_row_by_row():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for features, dim in ((_frechet.pixel_features, 48), (_frechet.random_features, 64)):
        assert features(images).shape == (5, dim) and features(images[:0]).shape == (0, dim)
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        again = features(images)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(features(images[2:3]), again[2:3], rtol=0, atol=1e-5)


def test_distances_tell_blur_from_sharp_where_coarse_pixels_cannot():
    images = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pooled = torch.nn.functional.avg_pool2d(images, 8)
    blurred = pooled.repeat_interleave(8, 2).repeat_interleave(8, 3)
    found = _frechet.distances(blurred, images)
    assert found["frechet_pixels"] == pytest.approx(0, abs=1e-3)
    assert found["frechet_random"] > 0.1
