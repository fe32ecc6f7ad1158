"""Operators that a backward pass dispatches: no zeros for outputs that have no gradient, which cost a launch each."""

import pytest
import torch

from copgen_fast.ops import AugmentParams, AugmentPolicy, augment, info_nce
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
    assert seen["row_gradients"] >= 1 and seen["l2_normalize_backward"] == 1
    assert not FILLS & seen.keys()


def test_augment():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator).requires_grad_()
    params = AugmentParams.sample(4, (8, 8), AugmentPolicy(brightness=0.4, jitter=1.0), generator=generator)
    seen = backward(augment(images, params, 8).sum())
    assert seen["augment_backward"] == 1
    assert not FILLS & seen.keys()
