"""Counts of launches, bytes and products, against those computed by hand on small networks."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import record_function

from bench.counting import Counter, as_on_gpu
from copgen_fast.ops import cond_norm, info_nce

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def fake():
    """Tensors have no memory, and ops take a GPU's backends."""
    with FakeTensorMode(), as_on_gpu():
        yield


def of(works, name):
    (work,) = (work for work in works if work.name == name)
    return work


def test_a_linear_layer():
    layer, x = nn.Linear(3, 4), torch.rand(5, 3, requires_grad=True)
    with Counter() as counted:
        y = layer(x)
        y.sum().backward()
    product = of(counted.works, "addmm")
    assert (product.flops, product.launches, product.half) == (2 * 5 * 3 * 4, 1, False)
    assert product.moved == 4 * (4 + 5 * 3 + 3 * 4 + 5 * 4), "bias, input, weight and result"
    gradients = [work for work in counted.works if work.name == "mm"]
    assert [work.flops for work in gradients] == [2 * 5 * 3 * 4] * 2 and all(work.backward for work in gradients)
    # Before it: the sum. After it: that of the bias's gradient; all views are free.
    assert [work.name for work in counted.works] == ["addmm", "sum", "ones_like", "mm", "mm", "sum"]


def test_a_convolution_in_half_precision_and_its_gradients():
    layer = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float16)
    x = torch.rand(1, 2, 8, 8, dtype=torch.float16)
    with Counter() as counted:
        layer(x).sum().backward()
    forward, backward = of(counted.works, "convolution"), of(counted.works, "convolution_backward")
    assert forward.half and forward.flops == 2 * 8 * 8 * 2 * 3 * 9
    assert backward.launches == 2, "gradients of weight and bias; the image takes none"
    assert backward.flops == forward.flops


def test_work_belongs_to_the_part_of_the_step_that_made_it():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    with Counter() as counted:
        with record_function("generator"):
            x = first(torch.rand(2, 3))
        with record_function("estimator"), record_function("anything"):
            y = second(x)
        with record_function("backward"):
            y.sum().backward()
    found = [(work.part, work.backward, work.name) for work in counted.works if work.flops]
    assert found == [
        ("generator", False, "addmm"),
        ("estimator", False, "addmm"),
        ("estimator", True, "mm"),
        ("estimator", True, "mm"),
        ("generator", True, "mm"),
    ]


def test_expanded_and_repeated_tensors_are_read_once():
    row, x = torch.rand(1, 100), torch.rand(50, 100)
    with Counter() as counted:
        x * row.expand(50, 100)
        x * x
    assert [work.moved for work in counted.works] == [4 * (5000 + 100 + 5000), 4 * (5000 + 5000)]


def test_ops_are_counted_by_their_kernels():
    x = torch.rand(2, 8, 4, 4, requires_grad=True)
    scale, shift = torch.rand(2, 8), torch.rand(2, 8)
    with Counter() as counted:
        cond_norm(x, scale, shift).sum().backward()
    kernels = [work for work in counted.works if work.name.endswith("kernel")]
    assert [(work.name, work.backward) for work in kernels] == [
        ("cond_norm_kernel", False),
        ("cond_norm_backward_kernel", True),
    ]
    assert kernels[0].moved == 4 * (256 + 2 * 16 + 256)


def test_the_products_of_info_nce():
    rows = [torch.rand(12, 8, requires_grad=True) for _ in range(2)]
    with Counter() as counted:
        info_nce(*rows).backward()
    assert sum(work.flops for work in counted.works if not work.backward) == 2 * 24 * 24 * 8
    assert sum(work.flops for work in counted.works if work.backward) == 4 * 24 * 24 * 8


def test_an_optimiser_launches_once_for_some_tens_of_tensors():
    weights = [nn.Parameter(torch.rand(3)) for _ in range(40)]
    for weight in weights:
        weight.grad = torch.rand(3)
    adam = torch.optim.Adam(weights, fused=True)
    with Counter() as counted:
        adam.step()
    assert of(counted.works, "_fused_adam_").launches == 2
