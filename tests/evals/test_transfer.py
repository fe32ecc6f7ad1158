"""Transfer to several sets: each set's number is the protocol's own, and a stopped run goes on with the next set."""

import dataclasses

import pytest
import torch

from copgen_fast import evals
from copgen_fast.config import DataConfig, EncoderConfig
from copgen_fast.encoders import Encoder
from copgen_fast.errors import UsageError
from copgen_fast.evals import transfer
from copgen_fast.runtime.interrupts import Interrupted
from copgen_fast.stages import probe
from tests.helpers import transfer_layouts
from tests.helpers.eval_runs import measure, run_on

WORDS = ("sets=cifar10,flowers102", "size=8")


@pytest.fixture
def root(tmp_path, monkeypatch):
    transfer_layouts.trust(monkeypatch)
    for name in ("cifar10", "flowers102"):
        transfer_layouts.write(tmp_path / "data", name)
    return tmp_path / "data"


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(EncoderConfig("resnet18", "cifar", 8))


@pytest.mark.parametrize("protocol", ["vissl", "lbfgs"])
def test_numbers_are_those_of_the_protocol_on_each_set(protocol, root, encoder, tmp_path):
    words = (*WORDS, f"root={root}", f"protocol={protocol}")
    found = measure("transfer", encoder, DataConfig(image_size=8), tmp_path, *words)
    expected = {}
    for name, per_class in (("cifar10", False), ("flowers102", protocol == "lbfgs")):
        numbers = measure(protocol, encoder, DataConfig(name, str(root), 8), tmp_path, "size=8")
        expected[f"transfer_{name}_top1"] = numbers[f"{protocol}_top1{'_per_class' if per_class else ''}"]
    mean = sum(expected.values()) / 2
    assert found == expected | {"transfer_mean_top1": pytest.approx(mean)}


def test_a_stopped_run_goes_on_with_the_next_set(root, encoder, tmp_path, monkeypatch):
    run = run_on(DataConfig("cifar10", str(root), 8), tmp_path, "transfer", *WORDS)
    seen, evaluate = [], evals.evaluate

    def stopping(name, encoder, on):
        seen.append(on.config.data.name)
        if len(seen) == 2:
            raise Interrupted("stopped")
        return evaluate(name, encoder, on)

    config = transfer.Config(sets=("cifar10", "flowers102"), size=8)
    monkeypatch.setattr(evals, "evaluate", stopping)
    with pytest.raises(Interrupted):
        transfer.evaluate(encoder, config, run)
    first = transfer.evaluate(encoder, config, run)
    assert seen == ["cifar10", "flowers102", "flowers102"]
    assert transfer.evaluate(encoder, config, run) == first and len(seen) == 3
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, seed=1))
    transfer.evaluate(encoder, config, other)
    assert seen[3:] == ["cifar10", "flowers102"], "numbers of another seed are not taken"
    encoder.conv1.stride = (2, 2)
    transfer.evaluate(encoder, config, other)
    assert seen[5:] == ["cifar10", "flowers102"], "nor those of a network of other strides"


@pytest.mark.filterwarnings("ignore:left out")
def test_images_left_out_of_any_set_are_counted_in_the_results(root, encoder, tmp_path):
    for path in sorted((root / "flowers-102" / "jpg").glob("*.jpg"))[:2]:
        path.write_bytes(b"damaged")
    run = run_on(DataConfig("cifar10", str(root), 8, "skip"), tmp_path, "transfer", *WORDS)
    for _ in range(2):  # the second time from the file that keeps them set by set
        assert probe.measure(encoder, run, "evaluate")["corrupt_images"] == 2


def test_sets_that_are_missing_are_all_named_before_anything_runs(root, tmp_path):
    run = run_on(DataConfig("cifar10", str(root), 8), tmp_path, "transfer", "sets=food101,cifar10,sun397")
    with pytest.raises(UsageError) as error:
        evals.expect_data(run.config)
    assert all(f"torchvision.datasets.{cls}(" in str(error.value) for cls in ("Food101", "SUN397"))
    assert "CIFAR10" not in str(error.value)


def test_raw_pixels_have_no_numbers(tmp_path):
    assert measure("transfer", torch.nn.Flatten(), DataConfig(), tmp_path) == {}
    with pytest.raises(ValueError, match="sets: expected at least one, and each once"):
        transfer.Config(sets=("cifar10", "cifar10"))
