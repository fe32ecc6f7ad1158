import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from copgen_fast.ops import augment, backends, info_nce
from copgen_fast.ops.augment.functional import AugmentParams, AugmentPolicy
from copgen_fast.ops.backend import INSTALLED, installed, launcher_lacks, reason, resolve, support_table, triton_lacks
from copgen_fast.ops.info_nce import chunked


def test_every_op_and_device_has_a_default_that_resolves():
    table = backends()
    assert set(table) == {
        "augment",
        "rand_augment",
        "info_nce",
        "l2_normalize",
        "cond_norm",
        "conv3x3",
        "add_upsampled",
    }
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
    torch.testing.assert_close(info_nce(rows, rows, backend="reference"), info_nce(rows, rows), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="backend"):
        info_nce(rows, rows, backend="vulkan")
    params = AugmentParams.sample(1, (4, 4), AugmentPolicy())
    with pytest.raises(ValueError, match="backend"):
        augment(torch.rand(1, 3, 4, 4), params, 4, backend="vulkan")


@pytest.mark.parametrize(
    ("capability", "dtype", "dimension", "backend"),
    [
        ((7, 5), torch.float16, 128, "cuda"),
        ((7, 5), torch.float32, 128, "chunked"),
        ((7, 0), torch.float16, 128, "chunked"),
        ((8, 0), torch.float32, 128, "triton"),
        ((12, 0), torch.bfloat16, 512, "triton"),
        ((9, 0), torch.float16, 513, "chunked"),
        ((9, 0), torch.float64, 128, "chunked"),
    ],
)
def test_a_gpu_gets_what_its_generation_can(monkeypatch, capability, dtype, dimension, backend):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("copgen_fast.ops.backend.INSTALLED", {"triton", "cuda", "chunked", "reference"})
    monkeypatch.setattr("copgen_fast.ops.backend.triton_lacks", lambda: None)
    assert resolve("info_nce", "cuda", dtype=dtype, dimension=dimension) == backend


@pytest.mark.parametrize(
    ("missing", "lost"),
    [(None, set()), ("copgen_fast._cpp", {"cpp", "cuda"}), ("copgen_fast._cuda", {"cuda"}), ("triton", {"triton"})],
)
def test_a_backend_is_offered_where_all_its_modules_are(monkeypatch, missing, lost):
    monkeypatch.setattr("copgen_fast.ops.backend.find_spec", lambda name: None if name == missing else object())
    assert installed() == {"reference", "chunked", "cpp", "cuda", "triton"} - lost


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with the package triton, and nothing to compile its launcher with."""
    monkeypatch.setattr("copgen_fast.ops.backend.INSTALLED", {"triton", "chunked", "reference"})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    launcher_lacks.cache_clear()
    yield monkeypatch
    launcher_lacks.cache_clear()


def test_triton_is_not_offered_on_a_gpu_without_a_c_compiler(bare):
    assert resolve("augment", "cuda") == "reference"
    assert "not triton: on a GPU Triton needs a C compiler: install gcc" in reason("augment", "cuda")
    with pytest.raises(ValueError, match=r"only reference \(on a GPU Triton needs a C compiler"):
        resolve("augment", "cuda", "triton")
    bare.setenv("CC", "no-such-compiler")
    launcher_lacks.cache_clear()
    assert "a C compiler" in triton_lacks()


def test_no_triton_is_launched_beside_cublas_on_a_gpu_without_a_c_compiler(bare):
    assert resolve("info_nce", "cuda") == "chunked"
    bare.setattr(chunked, "load", lambda backend, op: pytest.fail(f"{op} is taken from {backend}"))
    with FakeTensorMode(), torch.device("cuda"):
        rows, grad, (losses, lse) = torch.ones(8, 4), torch.empty(8, 4), torch.empty(2, 8)
        place = (0, 4, True)
        chunked.row_losses(rows, None, 0.1, 10.0, *place, losses, lse, None, None)
        chunked.row_gradients(rows, None, 0.1, 10.0, lse, losses, None, None, *place, grad)


def test_triton_is_not_offered_on_a_gpu_without_pythons_headers(bare, tmp_path):
    bare.setenv("CC", sys.executable)
    bare.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "install Python's headers" in reason("l2_normalize", "cuda")
    (tmp_path / "Python.h").touch()
    launcher_lacks.cache_clear()
    assert resolve("l2_normalize", "cuda") == "triton"


def test_the_support_table_names_every_default():
    lines = support_table().splitlines()
    assert lines[0].split() == ["op", "device", "backend", "installed", "default", "for"]
    found = {tuple(line.split()[:2]): line.split()[2] for line in lines if line.split()[3] == "default"}
    assert found == {(op, device): name for op, table in backends().items() for device, name in table.items()}
    installed = {line.split()[2] for line in lines[1:] if line.split()[3] != "no"}
    assert installed <= INSTALLED


def test_a_compiled_function_knows_whether_triton_can_launch():
    compiled = torch.compile(lambda x: x + (triton_lacks() is None), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2) + (triton_lacks() is None))
