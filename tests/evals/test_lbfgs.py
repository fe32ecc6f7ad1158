"""Logistic regression by L-BFGS: scikit-learn's solution, the choice of the penalty, and what is held out for it."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.evals import lbfgs
from copgen_fast.images import sets
from copgen_fast.runtime import interrupts
from tests.helpers import transfer_layouts
from tests.helpers.eval_runs import Colours, measure, run_on, save_noisy_classes

FAST = ("size=8", "penalties=5")


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 5
    centres = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(150, 12, generator=generator, dtype=torch.float64) * 2 + 3, labels


def probabilities(features, weights):
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T).softmax(1)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_heads_equal_scikit_learns(features, l2, rotate):
    x, y = features
    ours = lbfgs.along_principal_axes(x, x)[0] if rotate else x
    weights = lbfgs.fit(ours, y, l2, torch.zeros(5, 13, dtype=torch.float64), 1000)
    peer = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(probabilities(ours, weights).numpy(), peer.predict_proba(x.numpy()), atol=2e-3)
    assert (lbfgs.predicted(ours, weights).numpy() == peer.predict(x.numpy())).mean() > 0.98
    norms = weights[:, :-1].square().sum().sqrt().item(), np.linalg.norm(peer.coef_)
    assert norms[0] == pytest.approx(norms[1], rel=3e-3)


def test_a_warm_start_does_not_change_the_solution(features):
    x, y = features
    cold = lbfgs.fit(x, y, 0.1, torch.zeros(5, 13, dtype=torch.float64), 1000)
    warm = lbfgs.fit(x, y, 0.1, lbfgs.fit(x, y, 1e3, torch.zeros_like(cold), 1000), 1000)
    torch.testing.assert_close(probabilities(x, cold), probabilities(x, warm), rtol=0, atol=2e-3)


def test_more_features_than_are_rotated_are_solved_all_the_same(tmp_path, monkeypatch):
    data = save_noisy_classes(tmp_path, 1)
    rotated = measure("lbfgs", Colours(), data, tmp_path, *FAST)
    monkeypatch.setattr(lbfgs, "_MOST_AXES", 11)
    assert measure("lbfgs", Colours(), data, tmp_path, *FAST)["lbfgs_top1"] == pytest.approx(
        rotated["lbfgs_top1"], abs=0.03
    )


def test_accuracy_by_image_and_by_class():
    labels = torch.tensor([0, 0, 0, 0, 1, 3])
    found = torch.tensor([0, 0, 0, 1, 1, 1])
    top1, per_class = lbfgs.both_accuracies(found, labels)
    assert top1 == pytest.approx(4 / 6)
    assert per_class == pytest.approx(balanced_accuracy_score(labels, found)) == pytest.approx((0.75 + 1 + 0) / 3)


@pytest.mark.parametrize(("signal", "low", "high"), [(6, 0.99, 1), (0, 0.06, 0.44)])
def test_separable_classes_are_found_and_unrelated_labels_give_chance(tmp_path, signal, low, high):
    data = save_noisy_classes(tmp_path, signal)
    found = measure("lbfgs", Colours(), data, tmp_path, *FAST)
    assert low <= found["lbfgs_top1"] <= high  # chance is 0.25; four standard deviations of 80 images are 0.19
    assert low <= found["lbfgs_top1_per_class"] <= high
    assert found == measure("lbfgs", Colours(), data, tmp_path, *FAST)


def test_the_test_images_choose_nothing(tmp_path, monkeypatch):
    data = save_noisy_classes(tmp_path, 1)
    fits = []
    fit = lbfgs.fit
    monkeypatch.setattr(lbfgs, "fit", lambda x, y, *rest: fits.append((len(x), rest[0])) or fit(x, y, *rest))
    found = measure("lbfgs", Colours(), data, tmp_path, *FAST, "validation=0.25")
    assert [count for count, _ in fits] == [72] * 5 + [96], "a quarter of 4 x 24 is held out; the last fit has all"
    assert [l2 for _, l2 in fits[:5]] == pytest.approx(np.logspace(5, -6, 5).tolist())
    assert fits[-1][1] == pytest.approx(10 ** found["lbfgs_log10_l2"])


def test_held_out_rows_are_of_every_class_alike(tmp_path):
    data = sets.open_set(save_noisy_classes(tmp_path, 1))
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] * 1 + [3] * 33)
    draw = partial(lbfgs.validation_rows, of="linear-grid chooses a head")
    rows = draw(data, labels, 0.2, seed=1)
    assert labels[rows].bincount().tolist() == [2, 1, 0, 7] and len(rows.unique()) == len(rows)
    assert rows.equal(draw(data, labels, 0.2, seed=1))
    assert not rows.equal(draw(data, labels, 0.2, seed=2))
    with pytest.raises(UsageError, match="linear-grid chooses a head on a part .* there is one image a"):
        draw(data, torch.arange(4), 0.2, seed=1)


def test_the_validation_part_of_a_set_is_held_out_also_where_images_are_left_out(tmp_path, monkeypatch):
    transfer_layouts.trust(monkeypatch)
    transfer_layouts.write(tmp_path, "flowers102")
    (tmp_path / "flowers-102" / "jpg" / "image_00002.jpg").write_bytes(b"none")
    run = run_on(DataConfig("flowers102", str(tmp_path), 8, "skip"), tmp_path, "lbfgs", *FAST)
    held_out = []
    rows = lbfgs.validation_rows
    monkeypatch.setattr(lbfgs, "validation_rows", lambda *key: held_out.append(rows(*key)) or held_out[0])
    with pytest.warns(UserWarning, match="left out 1 images"):
        lbfgs.evaluate(Colours(), lbfgs.Config(8, penalties=3), run)
    assert held_out[0].tolist() == list(range(5, 11)), "images 6 to 11 of twelve, the second being left out"


def test_a_requested_stop_ends_it(tmp_path, monkeypatch):
    data = save_noisy_classes(tmp_path, 1)
    monkeypatch.setattr("copgen_fast.evals.lbfgs.stop_requested", lambda: True)
    with pytest.raises(interrupts.Interrupted):
        measure("lbfgs", Colours(), data, tmp_path, *FAST)


def test_features_that_do_not_fit_memory_are_refused(tmp_path, monkeypatch):
    data = save_noisy_classes(tmp_path, 1)
    needed = 3 * 8 * 96 * 12 / 1e6  # in float64: plain, centred and rotated
    monkeypatch.setattr("copgen_fast.evals.lbfgs.available_memory", lambda device: 0.9 * needed)
    with pytest.raises(UsageError, match="leave `pixels` out of --probe.baselines"):
        measure("lbfgs", Colours(), data, tmp_path, *FAST)


def test_crops_are_of_the_given_size(tmp_path):
    """Photographs of 20 x 12 pixels: the shorter side becomes 16, the centre is cropped."""
    for split in ("train", "test"):
        for label, name in enumerate(("a", "b")):
            for number in range(3):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 12), (100 * label,) * 3).save(path)
    shapes = []

    def encoder(images):
        shapes.append(tuple(images.shape[2:]))
        return images.mean((2, 3))

    found = measure("lbfgs", encoder, DataConfig("folder", str(tmp_path), 4), tmp_path, "size=16", "penalties=3")
    assert set(shapes) == {(16, 16)} and found["lbfgs_top1"] == 1
