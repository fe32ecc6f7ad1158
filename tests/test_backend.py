import pytest
import torch

from copgen_fast.ops import augment, backends, info_nce
from copgen_fast.ops.augment import AugmentParams, AugmentPolicy
from copgen_fast.ops.backend import resolve


def test_every_op_and_device_has_a_default_that_resolves():
    table = backends()
    assert set(table) == {"augment", "info_nce"}
    for op, devices in table.items():
        for device, name in devices.items():
            assert resolve(op, device) == name
            assert resolve(op, torch.device(device), name) == name


def test_the_reference_serves_devices_without_a_kernel():
    assert resolve("augment", "meta") == "reference"


def test_the_table_handed_out_is_a_copy():
    backends()["augment"]["cpu"] = "nonsense"
    assert backends()["augment"]["cpu"] != "nonsense"


def test_an_unavailable_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="backend: info_nce on cpu has no 'vulkan', only .*reference"):
        resolve("info_nce", "cpu", "vulkan")


def test_the_ops_pass_their_backend_on():
    rows = torch.randn(2, 4)
    assert info_nce(rows, rows, backend="reference") == info_nce(rows, rows)
    with pytest.raises(ValueError, match="backend"):
        info_nce(rows, rows, backend="vulkan")
    params = AugmentParams.sample(1, (4, 4), AugmentPolicy())
    with pytest.raises(ValueError, match="backend"):
        augment(torch.rand(1, 3, 4, 4), params, 4, backend="vulkan")
