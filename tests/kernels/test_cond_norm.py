"""The Triton kernels of the conditional normalisation: their numbers on the CPU and on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.helpers.kernel_processes import assert_passed, names_in, run_numerics

pytest.importorskip("triton")

NUMERICS = Path(__file__).with_name("cond_norm_numerics.py")


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def numerics(request, tmp_path_factory):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return run_numerics(NUMERICS, request.param, tmp_path_factory.mktemp("numerics"))


@pytest.mark.parametrize("name", names_in(NUMERICS))
def test_numbers(numerics, name):
    assert_passed(name, *numerics)
