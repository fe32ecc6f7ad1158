"""Runs what Triton's launcher is given by the interpreter: kernels compiled for a GPU, on tensors on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from tests.helpers.launches import bits, flat
from tests.helpers.ptx.memory import Global
from tests.helpers.ptx.parse import parse
from tests.helpers.ptx.run import launch
from tests.helpers.ptx.tensors import Written, region


class _InterpretingDriver(CudaDriver):
    """A driver of a device of compute capability `target`, which the interpreter is."""

    def __init__(self, target, written, launched):
        texts, numbers = {}, itertools.count(1)

        def loaded(module, function, name, files, _):
            texts[function] = name, Path(files[f"{name}.ptx"]).read_text()

        class Launcher:
            """Gives a kernel's arguments to the interpreter."""

            def __init__(self, source, metadata):
                self.signature = source.signature.items()
                self.block, self.shared = (32 * metadata.num_warps, 1, 1), metadata.shared

            def __call__(self, x, y, z, stream, function, *given):
                name, text = texts[function]
                memory, params = Global(), b""
                for (argument, types), values in zip(self.signature, given[4:], strict=True):
                    for kind, value in flat([types], [values]):
                        if kind.startswith("*"):
                            number, size = (0 if value is None else region(memory, argument, value, written)), 8
                        else:
                            number, size = bits(kind, value)
                        params += bytes(-len(params) % size) + number.to_bytes(size, "little")
                params += bytes(-len(params) % 8 + 16)  # no scratch
                launched.add(name)
                launch(parse(text, name), (x, y, z), self.block, params, memory, self.shared)

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": {75: 64, 80: 163}.get(target, 99) << 10},
            load_binary=lambda name, binary, shared, device: (None, next(numbers), 0, 0, 1024),
        )
        self.get_current_device, self.get_current_stream = lambda: target, lambda device: 0
        knobs.runtime.kernel_load_end_hook.add(loaded)

    def get_current_target(self):
        return GPUTarget("cuda", self.get_current_device(), 32)


@contextlib.contextmanager
def interpreting(target: int, launched: set[str]) -> Iterator[None]:
    """Within the block Triton's kernels, of tensors on the CPU, are compiled for `target` and interpreted.

    Their names are added to `launched`. The ops then offer the backend "triton" on the CPU as they do in Triton's own
    interpreter, which stays off.
    """
    written = Written()
    knobs.runtime.interpret = False
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}), written.noting():
        driver.set_active(_InterpretingDriver(target, written, launched))
        yield
