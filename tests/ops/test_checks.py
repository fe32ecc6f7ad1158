import pytest
import torch

from copgen_fast.ops.checks import expect_tensor


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, r"z: expected a torch.Tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, r"z: expected a floating-point tensor, got torch.int64"),
        (torch.ones(2), ValueError, r"z: expected shape \[N, 3\], got \[2\]"),
        (torch.ones(2, 4), ValueError, r"z: expected shape \[N, 3\], got \[2, 4\]"),
    ],
)
def test_the_message_names_the_argument_and_what_was_expected(value, error, message):
    with pytest.raises(error, match=message):
        expect_tensor("z", value, ("N", 3))


def test_listed_dtypes_are_the_only_ones():
    assert expect_tensor("images", torch.ones(2, dtype=torch.uint8), ("N",), [torch.uint8]).dtype == torch.uint8
    with pytest.raises(TypeError, match="images: expected torch.uint8 or torch.float32, got torch.float64"):
        expect_tensor("images", torch.ones(2, dtype=torch.float64), ("N",), [torch.uint8, torch.float32])


def test_a_fitting_tensor_is_returned_as_it_is():
    value = torch.ones(0, 3)
    assert expect_tensor("z", value, ("N", 3)) is value
