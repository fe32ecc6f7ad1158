"""Which convolutions a generator takes on a device: by a table, or as timed once."""

import json
import os

import pytest
import torch
from torch import nn

from copgen_fast.generators import Rewrites
from copgen_fast.generators._choice import by_table, measured
from copgen_fast.ops import tiles

FEW = Rewrites(differences=False, winograd=False, strips=False)
PRODUCTS = Rewrites(strips=False)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensor_cores_take_direct_convolutions(dtype):
    assert by_table(CUDA, dtype) == (PRODUCTS if dtype == torch.float32 else FEW)
    tiled = dtype == torch.float32 or tiles.compiled(torch.empty(0, dtype=dtype))
    assert by_table(CPU, dtype) == (Rewrites() if tiled else PRODUCTS)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Time two forms of a generator, of which `fast` takes a second and others two; counts the calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def choose(fast, name="G"):
        def form(rewrites):
            layer = nn.Linear(3, 3)
            layer.rewrites = rewrites
            return layer

        def time(generator, z, labels):
            calls.append(generator.rewrites)
            return 1.0 if generator.rewrites == fast else 2.0

        return measured(form, (torch.ones(2, 3), None), name, torch.float16, time)

    return choose, calls


@pytest.mark.parametrize("fast", [PRODUCTS, FEW], ids=["few products", "few launches"])
def test_the_faster_form_is_taken_and_kept(timed, fast, tmp_path):
    choose, calls = timed
    assert choose(fast) == fast
    assert set(calls) == {PRODUCTS, FEW}
    count = len(calls)
    assert choose(FEW if fast == PRODUCTS else PRODUCTS) == fast and len(calls) == count, "it was timed before"
    (file,) = (tmp_path / "cache" / "copgen_fast").iterdir()
    assert json.loads(file.read_text())["of"][0] == "G"
    choose(fast, "another generator")
    assert len(calls) == 2 * count


def test_without_a_folder_to_keep_it_in_it_is_timed_each_time(timed, tmp_path):
    choose, calls = timed
    (tmp_path / "cache").write_text("a file")
    assert choose(FEW) == FEW
    assert choose(PRODUCTS) == PRODUCTS
    assert not os.path.isdir(tmp_path / "cache")
