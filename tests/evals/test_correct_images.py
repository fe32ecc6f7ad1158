"""Which test images an evaluation got right: its accuracy is the share of them, and the probe stage keeps them."""

import pytest
import torch
from torch import nn

from copgen_fast import evals
from copgen_fast.runtime import artifacts
from copgen_fast.stages.run import IMAGES
from tests.helpers import transfer_layouts
from tests.helpers.eval_runs import Colours, run_on, save_noisy_classes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear", ()),
        ("knn", ("neighbours=5",)),
        ("lbfgs", ("size=8", "penalties=3")),
        ("linear-augmented", ("epochs=2",)),
        ("linear-grid", ("epochs=1", "passes=1")),
        ("vissl", ("size=8", "epochs=1")),
        ("semi-supervised", ("size=8", "epochs=1", "fractions=0.5")),
    ],
)
def test_every_top1_of_the_test_images_says_which(name, words, tmp_path):
    data = save_noisy_classes(tmp_path, signal=0.4)
    run, encoder = run_on(data, tmp_path, name, *words), nn.Sequential(Colours(), nn.Linear(12, 12))
    found = evals.evaluate(name, encoder, run)
    correct = evals.freeze(encoder, run).correct
    assert set(correct) == {
        key for key in found if "top1" in key and not key.endswith(("validation", "held_out_top1", "best", "per_class"))
    }
    for key, right in correct.items():
        assert right.dtype == torch.bool and right.shape == (80,)
        assert right.double().mean().item() == pytest.approx(found[key]), key


def test_those_of_transfers_sets_do_not_take_the_place_of_the_data_sets(tmp_path, monkeypatch):
    transfer_layouts.trust(monkeypatch)
    transfer_layouts.write(tmp_path / "sets", "flowers102")
    data, encoder = save_noisy_classes(tmp_path, signal=0.4), nn.Sequential(Colours(), nn.Linear(12, 12))
    run = run_on(data, tmp_path, "vissl", "size=8", "epochs=1")
    evals.evaluate("vissl", encoder, run)
    kept = dict(evals.freeze(encoder, run).correct)
    words = f"root={tmp_path / 'sets'}", "sets=flowers102", "size=8", "protocol=vissl"
    evals.evaluate("transfer", encoder, run_on(data, tmp_path, "transfer", *words))
    found = evals.freeze(encoder, run).correct
    assert set(found) == set(kept) == {"vissl_top1"} and found["vissl_top1"].equal(kept["vissl_top1"])


def test_the_probe_stage_keeps_them_beside_its_numbers(finished_run):
    for path in (finished_run / "probe").glob("*.json"):
        numbers = artifacts.read_record(path, dict[str, float])
        right = artifacts.read_tensors(path.with_suffix(IMAGES), source=path.stem)
        assert {"linear_top1", "knn_top1"} <= right.keys() <= numbers.keys()
        for name, images in right.items():
            assert images.double().mean().item() == pytest.approx(numbers[name])
