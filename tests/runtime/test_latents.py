import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import truncnorm

from copgen_fast.runtime import latents


@pytest.mark.parametrize("seed", [0, 7, 123456])
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_truncnorm_is_bit_identical_to_the_reference_sampler(seed, scale):
    reference = truncnorm.rvs(-2, 2, scale=scale, size=(64, 120), random_state=np.random.RandomState(seed))
    ours = latents.sample("truncnorm", seed, (64, 120), scale)
    assert np.array_equal(ours.numpy(), reference.astype(np.float32))


def test_the_two_priors_have_their_known_norms():
    truncated = latents.sample("truncnorm", 0, (20_000, 120))
    assert truncated.abs().max() <= 2
    assert truncated.norm(dim=1).mean().item() == pytest.approx(9.621, abs=0.01)
    normal = latents.sample("normal", 0, (20_000, 120))
    assert normal.norm(dim=1).mean().item() == pytest.approx(10.93, abs=0.01)


@settings(deadline=None, max_examples=25)
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), max_size=6),
    dim=st.sampled_from([1, 2, 7, 120, 513]),
    prior=st.sampled_from(["truncnorm", "normal", "uniform", "sphere"]),
)
def test_a_row_depends_on_its_own_seed_only(seeds, dim, prior):
    rows = latents.sample_each(prior, seeds, dim)
    assert rows.shape == (len(seeds), dim) and rows.dtype == torch.float32
    for seed, row in zip(seeds, rows, strict=True):
        assert torch.equal(row, latents.sample(prior, seed, (dim,)))
    of_prior = latents.NamedPrior(prior, dim)
    assert torch.equal(rows, latents.each(of_prior, seeds))
    assert torch.equal(rows, torch.cat([of_prior(0, 0), *(of_prior(seed, 1) for seed in seeds)]))


def test_a_second_word_makes_another_stream():
    assert not torch.equal(latents.sample("truncnorm", 5, (8,)), latents.sample("truncnorm", (5, 1), (8,)))


def test_an_unknown_prior_is_named():
    with pytest.raises(ValueError, match="prior: expected one of truncnorm, normal, uniform, sphere, got 'gumbel'"):
        latents.sample("gumbel", 0, (1,))


def test_uniform_and_sphere_lie_where_they_say():
    uniform, sphere = (latents.sample(prior, 0, (2000, 30)) for prior in ("uniform", "sphere"))
    assert uniform.abs().max() <= 1 and uniform.std().item() == pytest.approx(3**-0.5, abs=0.01)
    torch.testing.assert_close(sphere.norm(dim=1), torch.full((2000,), 30**0.5))
    assert sphere.mean(0).abs().max() < 0.1
