import pytest
import torch
from scipy.optimize import linear_sum_assignment

from copgen_fast.generators.fit import digits
from copgen_fast.generators.fit.fitting import one_thread
from copgen_fast.images import sets
from copgen_fast.runtime import latents


def test_training_brings_the_generator_nearer_to_its_pairs():
    z = latents.sample("truncnorm", 0, (512, 64))
    scans = torch.where(z > 0, 0.5, -0.5)
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        few, many = (digits.fit_generator(z, scans, steps) for steps in (1, 40))
    errors = [(generator.scan(z).flatten(1) - scans).square().mean().item() for generator in (few, many)]
    assert errors[1] < 0.5 * errors[0]


def test_only_the_training_split_is_seen():
    scans = digits.training_scans()
    assert scans.shape == (1437, 64)
    assert scans.min() == -1 and scans.max() == 1
    test = sets.digits(image_size=8).test_images[:, 0].flatten(1).float() / 127.5 - 1
    assert torch.cdist(test, scans).min() > 0.1


def test_coupling_is_the_optimal_permutation():
    z, scans = latents.sample("normal", 1, (2, 9, 64))
    coupled = digits.couple(z, scans)
    assert sorted(map(tuple, coupled.tolist())) == sorted(map(tuple, scans.tolist()))
    costs = torch.cdist(z, scans).square()
    rows, columns = linear_sum_assignment(costs.numpy())
    assert (z - coupled).square().sum().item() == pytest.approx(costs[rows, columns].sum().item(), rel=1e-5)


def test_jitter_moves_scans_a_little_and_stays_in_range():
    scans = digits.training_scans()
    moved = digits.jitter(scans)
    assert moved.shape == scans.shape and moved.abs().max() <= 1
    change = (moved - scans).norm(dim=1).mean() / (scans + 1).norm(dim=1).mean()
    assert 0.01 < change < 0.2


def test_steps_below_one_are_refused(tmp_path, capsys):
    assert digits.main(["--out", str(tmp_path), "--steps", "0"]) == 2
    assert "--steps: expected 1 or more, got 0" in capsys.readouterr().err
