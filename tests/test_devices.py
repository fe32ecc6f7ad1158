import pytest
import torch

from copgen_fast import devices
from copgen_fast.errors import UsageError


def test_auto_takes_what_is_there():
    assert devices.resolve("auto", "fp32").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.resolve("cpu", "bf16") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UsageError, match=f"--device {name} is not usable here"):
        devices.resolve(name, "fp32")


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(UsageError, match="fp16 needs a CUDA device: choose fp32 or bf16"):
        devices.resolve("cpu", "fp16")


def test_autocast_computes_in_its_precision():
    one = torch.ones(2, 2)
    with devices.autocast(torch.device("cpu"), "bf16"):
        assert (one @ one).dtype == torch.bfloat16
    with devices.autocast(torch.device("cpu"), "fp32"):
        assert (one @ one).dtype == torch.float32
    assert not devices.grad_scaler(torch.device("cpu"), "bf16").is_enabled()
