"""Tensors as the interpreter's memory: which bytes are elements, and which of them were written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from tests.helpers.ptx.memory import BEFORE, NEVER, WIDEST, Global, room, users

_EMPTY = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


class Written:
    """Tensors made by torch.empty and its like, and which of their bytes kernels have written.

    Those that PyTorch itself has written since are taken to be written throughout.
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
            self._made[storage.data_ptr()] = tensor, tensor._version, users(storage.nbytes() + 2 * WIDEST, NEVER)
            return tensor

        return make

    def users(self, tensor: torch.Tensor) -> np.ndarray:
        """The last users of the bytes of a tensor's storage, and of WIDEST bytes before and after, as of a launch."""
        storage = tensor.untyped_storage()
        made, version, last = self._made.get(storage.data_ptr(), (tensor, None, None))
        if made._version != version:
            return users(storage.nbytes() + 2 * WIDEST, BEFORE)
        last[last != NEVER] = BEFORE
        return last


def region(memory: Global, name: str, tensor: torch.Tensor, written: Written) -> int:
    """Address, for kernels, of a tensor's elements: no byte between or beside them may be accessed."""
    if tensor.numel() == 0:
        return 0
    item, start = tensor.element_size(), tensor.untyped_storage().data_ptr()
    size = item * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
    before, length = room(tensor.data_ptr(), size)
    exists = None
    if size != item * tensor.numel():
        exists = np.zeros(length, bool)
        steps = [item * step for step in tensor.stride()]
        np.lib.stride_tricks.as_strided(exists[before:], (*tensor.shape, item), (*steps, 1))[...] = True
    last = memory.storages.setdefault(start, written.users(tensor))
    first = WIDEST + tensor.data_ptr() - start - before
    return memory.add(name, tensor.data_ptr(), size, exists, last[:, first : first + length])
