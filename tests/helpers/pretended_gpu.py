"""A GPU of fake tensors: code takes its way for GPUs, nothing is computed, and a look at a value raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from copgen_fast.runtime import devices

CUDA = torch.device("cuda")


@contextlib.contextmanager
def pretended_gpu(leaves: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within it, modules and tensors are made on CUDA, and `devices.send` takes real ones there.

    Autograd's engine would need a driver: `backward` gives the `leaves` that ask for a gradient one of ones.
    """
    mode = FakeTensorMode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return mode.from_tensor(tensor).to(CUDA)

    def send(values, device):
        return fake(values) if isinstance(values, torch.Tensor) else values._map(fake)

    def backward(loss, *_, **__):
        for parameter in leaves:
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)

    with pytest.MonkeyPatch.context() as patch, mode, CUDA:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(devices, "send", send)
        patch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)  # made there already
        patch.setattr(torch.Tensor, "backward", backward)
        yield
