"""The scripts that made the embedded weights: reproducible, and without effects on their caller."""

import pytest
import torch
from PIL import Image

from copgen_fast import generators
from copgen_fast.generators.fit import digits, residual_flow

TINY = {
    "digits": (digits.main, "--steps 3".split()),
    "residual_flow": (residual_flow.main, "--steps 3 --batch 16 --blocks 2 --width 24".split()),
}


@pytest.fixture(scope="module", params=TINY)
def fit(request):
    """Fit in seconds to a new folder; returns its files by name. The flow's report is of one dequantisation."""
    main, options = TINY[request.param]

    def run(folder, *more):
        assert main(["--out", str(folder), *options, *more]) == 0
        return {path.name.removeprefix(request.param): path for path in folder.iterdir()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_flow, "DRAWS", 1)
        yield run


@pytest.fixture(scope="module")
def fitted(fit, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("fit") / "new")


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_caller_alone(fit, fitted, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the caller's threads and random state must not matter
    torch.rand(5)
    state = torch.random.get_rng_state()
    again = fit(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == 1
    torch.set_num_threads(before)
    assert {name: path.read_bytes() for name, path in again.items()} == {
        name: path.read_bytes() for name, path in fitted.items()
    }


def test_another_seed_gives_other_weights(fit, fitted, tmp_path):
    assert fit(tmp_path, "--seed", "1")[".safetensors"].read_bytes() != fitted[".safetensors"].read_bytes()


def test_what_is_written_loads_and_nothing_else_is_left(fitted):
    assert fitted.keys() - {".json"} == {".safetensors", "_samples.png"}
    name = fitted[".safetensors"].stem.replace("_", "-")
    assert generators.build(name, fitted[".safetensors"])(torch.zeros(1, 64)).shape == (1, 3, 32, 32)
    with Image.open(fitted["_samples.png"]) as grid:
        assert grid.size == (16 * 34 + 2, 8 * 34 + 2)
