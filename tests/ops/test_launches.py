"""Launches of the ops: none for zeros of outputs that have no gradient, and no more than stated here on a GPU."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from copgen_fast.ops import AugmentParams, AugmentPolicy, add_upsampled, augment, cond_norm, info_nce
from copgen_fast.ops.backend import resolve
from tests.helpers.operators import Operators

FILLS = {"zeros", "new_zeros", "zeros_like", "zero_", "fill_"}


def backward(loss):
    with Operators() as seen:
        loss.backward()
    return seen.names


@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce(symmetric):
    generator = torch.Generator().manual_seed(0)
    a, p = (torch.randn(12, 8, generator=generator).requires_grad_() for _ in range(2))
    seen = backward(info_nce(a, p, symmetric=symmetric))
    in_one = symmetric and resolve("info_nce", "cpu") == "cpp"
    assert seen["pair_gradients"] == in_one and seen["l2_normalize_backward"] == (not in_one)
    assert seen["row_gradients"] == (0 if in_one else 1 if symmetric else 2)
    assert not FILLS & seen.keys()


def test_augment():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator).requires_grad_()
    params = AugmentParams.sample(4, (8, 8), AugmentPolicy(brightness=0.4, jitter=1.0), generator=generator)
    seen = backward(augment(images, params, 8).sum())
    assert seen["augment_backward"] == 1
    assert not FILLS & seen.keys()


def launches(prepare):
    """Names of a GPU's launches in a call's forward and in its backward, all operators around the kernels included."""
    pytest.importorskip("triton")
    from bench.counting import Counter, as_on_gpu

    with FakeTensorMode() as mode, as_on_gpu():
        call = prepare(mode)
        with Counter() as counted:
            y = call()
        forward = [work.name for work in counted.works for _ in range(work.launches)]
        with Counter() as counted:
            y.backward(torch.empty_like(y))
        return forward, [work.name for work in counted.works for _ in range(work.launches)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_info_nce_takes_four_launches_each_way(dtype):
    def prepare(mode):
        rows = [torch.rand(224, 128, dtype=dtype, requires_grad=True) for _ in range(2)]
        return lambda: info_nce(*rows)

    for names in launches(prepare):
        assert len(names) <= 4, names


def test_augmentation_takes_two_launches_each_way():
    params = AugmentParams.sample(8, (32, 32), AugmentPolicy(contrast=0.4, jitter=1.0))

    def prepare(mode):
        images = torch.rand(8, 3, 32, 32, requires_grad=True)
        given = {x.name: getattr(params, x.name) for x in dataclasses.fields(params)}
        fake = AugmentParams(**{name: x if x is None else mode.from_tensor(x) for name, x in given.items()})
        return lambda: augment(images, fake, 32, check_range=False)

    forward, backward = launches(prepare)
    assert forward == ["pivot_parts_kernel", "forward_kernel"]
    assert backward == ["resized_grad_kernel", "gather_kernel"]


def test_cond_norm_takes_one_launch_each_way_where_scale_and_shift_take_no_gradient():
    def prepare(mode):
        x, scale, shift = torch.rand(2, 8, 4, 4, requires_grad=True), torch.rand(2, 8), torch.rand(2, 8)
        return lambda: cond_norm(x, scale, shift)

    assert launches(prepare) == (["cond_norm_kernel"], ["cond_norm_backward_kernel"])


def test_an_upsampled_shortcut_and_a_bias_take_one_launch_each_way():
    def prepare(mode):
        x, small = torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2, requires_grad=True)
        return lambda: add_upsampled(x, small, torch.empty(8))

    assert launches(prepare) == (["add_upsampled_kernel"], ["sum_by_four_kernel"])
