"""Tensors as the interpreter's memory: which bytes are elements, and which of them were written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from tests.helpers.ptx.memory import WIDEST, Global, room

_EMPTY = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


class Written:
    """Flags of the bytes that kernels have written of tensors made by torch.empty and its like.

    Tensors that PyTorch itself has written since are taken to be written throughout.
    """

    def __init__(self) -> None:
        # The tensors are kept, so that their memory stays theirs.
        self._made: dict[int, tuple[torch.Tensor, int, np.ndarray]] = {}

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note tensors that are made empty within the block."""
        with contextlib.ExitStack() as stack:
            for owner, name in _EMPTY:
                stack.enter_context(mock.patch.object(owner, name, self._noted(getattr(owner, name))))
            yield

    def _noted(self, function):
        def make(*given, **options):
            tensor = function(*given, **options)
            storage = tensor.untyped_storage()
            flags = np.zeros(storage.nbytes() + 2 * WIDEST, bool)
            self._made[storage.data_ptr()] = tensor, tensor._version, flags
            return tensor

        return make

    def flags(self, tensor: torch.Tensor, before: int, length: int) -> np.ndarray | None:
        """Those of `length` bytes from `before` bytes before a tensor; None: all are written."""
        start = tensor.untyped_storage().data_ptr()
        made, version, flags = self._made.get(start, (tensor, None, None))
        first = WIDEST + tensor.data_ptr() - start - before
        return flags[first : first + length] if made._version == version else None


def region(memory: Global, name: str, tensor: torch.Tensor, written: Written) -> int:
    """Address, for kernels, of a tensor's elements: no byte between or beside them may be accessed."""
    if tensor.numel() == 0:
        return 0
    item = tensor.element_size()
    size = item * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
    before, length = room(tensor.data_ptr(), size)
    exists = None
    if size != item * tensor.numel():
        exists = np.zeros(length, bool)
        steps = [item * step for step in tensor.stride()]
        np.lib.stride_tricks.as_strided(exists[before:], (*tensor.shape, item), (*steps, 1))[...] = True
    return memory.add(name, tensor.data_ptr(), size, exists, written.flags(tensor, before, length))
