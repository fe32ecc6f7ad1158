"""A fake GPU: code for GPUs runs on fake tensors, nothing is computed, and reading a value raises."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from copgen_fast.runtime import devices

CUDA = torch.device("cuda")


@contextlib.contextmanager
def pretended_gpu(leaves: list[torch.nn.Parameter]) -> Iterator[None]:
    """Make modules and tensors on CUDA within the block; `devices.send` makes real ones fake.

    Autograd's engine would need a driver: `backward` sets the gradients of those `leaves` that require one to ones.
    """
    mode = FakeTensorMode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return mode.from_tensor(tensor).to(CUDA)

    def send(values, device):
        if isinstance(values, torch.Tensor):
            return fake(values)
        fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
        return dataclasses.replace(values, **{name: fake(value) for name, value in fields.items() if value is not None})

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
