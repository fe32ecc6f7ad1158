"""The area convolutions of `python -m bench`: every method is the same function; no time is asserted."""

import pytest
import torch
import torch.nn.functional as F

from bench.areas import convolutions as area


@pytest.mark.parametrize("name", area.METHODS)
@pytest.mark.parametrize("size", [(1, 1), (4, 3), (5, 8)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_every_method_is_the_same_function(name, size, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, *size, generator=generator, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(3, 5, 3, 3, generator=generator, dtype=torch.float64)
    for bias in (None, torch.randn(3, generator=generator, dtype=torch.float64)):
        method = area.METHODS[name]
        ours = method.run(x, method.prepare(weight), bias)
        theirs = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs)))


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", (area.Case(2, 4, 3, 2),))
    rows = measured("convolutions")
    assert {row["peer"] for row in rows} == set(area.METHODS) - {"one transposed 4 x 4 convolution"}
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
