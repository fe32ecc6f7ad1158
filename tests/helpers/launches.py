"""Launches every Triton kernel through Triton's own launcher, on a stand-in for the CUDA driver; prints them as JSON.

    python -m tests.helpers.launches LIBCUDA_FOLDER TRITON_CACHE

The folder holds libcuda.so.1, made from tests/helpers/cuda_driver. Tensors are on the CPU, or have no memory where they
are large; one claims to be on the second device.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import math
import operator
import os
import re
import sys
from functools import partial
from pathlib import Path
from unittest import mock

KERNELS = Path(__file__).parents[2] / "kernels"
STREAMS = (0x1000, 0x2000)
"""The current stream of each device."""
ANOTHER_STREAM = 0x3000
"""The first device's in the end."""
CAPABILITIES = ((7, 5), (9, 0))


class Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("values", ctypes.c_uint64 * 96),
    ]


def ptx_sizes(text):
    """Bytes of each parameter of a kernel's PTX."""
    head = re.search(r"\.entry \w+\((.*?)\)", text, re.DOTALL)[1]
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+(?:\.align \d+\s+)?\.[a-z](\d+)", head)]


def flat(types, values):
    """Pairs of type and value of the arguments that are passed at run time, those in tuples too."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def bits(kind, value):
    """What a parameter's bytes should be, as an unsigned number of 8 bytes, and how many they are."""
    if kind.startswith("*"):
        return (0 if value is None else value.data_ptr()), 8
    if kind in ("fp32", "f32", "fp64"):
        made = (ctypes.c_double if kind == "fp64" else ctypes.c_float)(value)
    else:
        made = {"i1": ctypes.c_int32, "i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind](int(value))
    return int.from_bytes(bytes(made), "little"), ctypes.sizeof(made)


def main(folder, cache):
    os.environ["TRITON_LIBCUDA_PATH"], os.environ["TRITON_CACHE_DIR"] = folder, cache
    library = ctypes.CDLL(str(Path(folder, "libcuda.so.1")), ctypes.RTLD_GLOBAL)
    library.stand_in_launches.restype = ctypes.POINTER(Launch)
    assert library.stand_in_size() == ctypes.sizeof(Launch)

    import torch
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
    from triton.runtime import driver

    names, given_by_triton = {}, []

    def loaded(module, function, name, files, _):
        text = Path(files[f"{name}.ptx"]).read_text()
        sizes, threads = ptx_sizes(text), int(re.search(r"\.reqntid (\d+)", text)[1])
        library.stand_in_parameters(ctypes.c_uint64(function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        names[function] = {"kernel": name, "sizes": sizes, "threads": threads}

    class Recording(CudaLauncher):
        """Notes what a launch is given, and then launches."""

        def __init__(self, source, metadata):
            super().__init__(source, metadata)
            self.types = tuple(source.signature.values())
            self.multiples = [path for path, known in source.attrs.items() if ["tt.divisibility", 16] in known]

        def __call__(self, *given):
            arguments = given[9:]
            passed = list(flat(self.types, arguments))
            multiples = [functools.reduce(operator.getitem, path, arguments) for path in self.multiples]
            given_by_triton.append(
                {
                    "expected": [bits(*pair) for pair in passed] + [(0, 8), (0, 8)],  # two scratches
                    "numbers": [bits(*pair) for pair in passed if not pair[0].startswith("*")],
                    "multiples_of_16": [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in multiples],
                }
            )
            super().__call__(*given)

    def get_device():
        number = ctypes.c_int()
        library.cuCtxGetDevice(ctypes.byref(number))
        return number.value

    def set_device(number):
        context = ctypes.c_void_p()
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
        library.cuCtxSetCurrent(context)

    @contextlib.contextmanager
    def current(device):
        before = get_device()
        set_device(torch.device(device).index)
        yield
        set_device(before)

    set_device(0)
    made = CudaDriver()
    made.launcher_cls = Recording
    # Those of torch.cuda, which has no driver here.
    made.get_current_device, made.get_device_capability = get_device, CAPABILITIES.__getitem__
    streams = list(STREAMS)
    made.get_current_stream = streams.__getitem__
    torch.cuda.device = current
    driver.set_active(made)
    knobs.runtime.kernel_load_end_hook.add(loaded)

    class OnSecond(torch.Tensor):
        """A tensor that claims to be on the second device."""

        is_cuda, device = True, torch.device("cuda", 1)

    variants = []

    def note(variant):
        variants.extend([variant] * (len(given_by_triton) - len(variants)))

    def by_triton():
        """Within, launches remember nothing."""
        launch = importlib.import_module("copgen_fast.kernels.launch").Launch
        return mock.patch.object(launch, "__call__", launch.anew)

    # From the second call on launches pass Triton's look by.
    times = (("first", contextlib.nullcontext), ("again", contextlib.nullcontext), ("by Triton", by_triton))

    modules = [importlib.import_module(f"copgen_fast.kernels.{path.stem}") for path in sorted(KERNELS.glob("*.py"))]
    for device, thorough in ((0, True), (1, False)):
        set_device(device)
        for module in (module for module in modules if hasattr(module, "examples")):
            for example, call in module.examples(thorough, "cpu"):
                name = f"{module.__name__}, {example}"
                for time, looked_at in times:
                    with looked_at():
                        call()
                    note([name, time])
        for name, call in large(device == 0):
            call()
            note(f"large: {name}")
    for time, looked_at in times:
        with looked_at():
            for name, call in alike():
                call()
                note([name, time])
    set_device(0)
    normalize = importlib.import_module("copgen_fast.kernels.l2_normalize").l2_normalize
    for start in (0, 1, 0):  # from an address that is a multiple of 16, and from another
        few = torch.zeros(8 * 32 + 1, dtype=torch.float16)[start : start + 8 * 32].view(8, 32)
        normalize(few, few, torch.zeros(16, 32), torch.zeros(16))
        note(f"from element {start}")
    rows = torch.zeros(224, 128, dtype=torch.float16).as_subclass(OnSecond)
    numbers = torch.zeros(224)
    nce = importlib.import_module("copgen_fast.kernels.info_nce")
    nce.row_losses(rows, None, 0.1, 10.0, 0, 112, True, numbers, numbers, None, None)
    note("on the second device")
    assert get_device() == 0
    rows = rows.as_subclass(torch.Tensor)
    for stream in (STREAMS[0], ANOTHER_STREAM):
        streams[0] = stream
        nce.row_losses(rows, None, 0.1, 10.0, 0, 112, True, numbers, numbers, None, None)
        note(f"on stream {stream}")

    found = library.stand_in_launches()
    result = []
    for i in range(library.stand_in_count()):
        launch = found[i]
        record = {name: list(getattr(launch, name)) for name in ("grid", "block")}
        record |= {name: getattr(launch, name) for name in ("function", "stream", "device", "shared")}
        record |= {"values": [launch.values[k] for k in range(launch.count)], "variant": variants[i]}
        result.append(record | names[launch.function] | given_by_triton[i])
    assert len(result) == len(given_by_triton)
    json.dump(result, sys.stdout)


def alike():
    """Calls of InfoNCE that differ from another one in one thing that Triton compiles for."""
    import torch

    from copgen_fast.kernels import epilogue, info_nce

    def empty(*shape, dtype=torch.float32, start=0):
        """From an address that is a multiple of 16, but for `start` elements."""
        made = torch.empty(math.prod(shape) + 8, dtype=dtype)
        return made[made.data_ptr() % 16 + start :][: math.prod(shape)].view(shape)

    def losses(rows, lse, nearest=None, exclude_self=True, bound=10.0, columns=None, **sizes):
        best = (None, None) if nearest is None else (nearest, empty(len(rows)))
        info_nce.row_losses(rows, columns, 0.1, bound, 0, 0, exclude_self, empty(len(rows)), lse, *best, **sizes)

    def gradients(rows, row_lse, row_grad, column_lse, column_grad, grad_rows, columns=None, **sizes):
        given = (row_lse, row_grad, column_lse, column_grad)
        info_nce.row_gradients(rows, columns, 0.1, 10.0, *given, 0, 0, True, grad_rows, **sizes)

    half = empty(16, 16, dtype=torch.float16)
    beside = empty(16, 16, dtype=torch.float16, start=1)
    lse, grad, beside_lse, double = empty(16), empty(16), empty(16, start=1), empty(16, dtype=torch.float64)
    nearest = empty(16, dtype=torch.int64)
    yield "losses", partial(losses, half, lse)
    yield "losses of unaligned rows", partial(losses, beside, lse)
    yield "losses, unaligned lse", partial(losses, half, beside_lse)
    yield "losses, float64 lse", partial(losses, half, double)
    yield "losses of bfloat16", partial(losses, half.bfloat16(), lse)
    yield "losses of one row", partial(losses, half[:1], lse)
    yield "losses of fewer columns", partial(losses, half, lse, columns=half[:15])
    yield "losses of odd D", partial(losses, half.flatten()[:240].view(16, 15), lse)
    yield "losses with nearest", partial(losses, half, lse, nearest)
    yield "losses with self", partial(losses, half, lse, exclude_self=False)
    yield "losses without a bound", partial(losses, half, lse, bound=1000.0)
    yield "triangle", partial(losses, half, lse, triangle_from=1)
    yield "triangle of unaligned rows", partial(losses, beside, lse, triangle_from=1)
    columns = empty(2048, 16, dtype=torch.float16)
    yield "split losses", partial(losses, half, lse, columns=columns)
    yield "split losses, unaligned columns", partial(losses, half, lse, columns=columns.flatten()[1:-15].view(-1, 16))
    for name, sizes in (("", {}), (", by factors", {"factors_from": 1})):
        yield f"gradients{name}", partial(gradients, half, lse, grad, None, None, half, **sizes)
        yield f"both gradients{name}", partial(gradients, half, lse, grad, lse, grad, half, half, **sizes)
        yield f"gradients of columns{name}", partial(gradients, half, None, None, lse, grad, half, half, **sizes)
        yield f"gradients, unaligned lse{name}", partial(gradients, half, beside_lse, grad, None, None, half, **sizes)
    for offset in (0, 2**31):
        of_products = (empty(16, 16), 0.1, 0, 16, offset, 0, True, lse, lse, None, None)
        yield f"losses of products from column {offset}", partial(epilogue.losses_of, *of_products)
    yield "gradients to float32", partial(gradients, half, lse, grad, None, None, half.float())
    yield "unaligned gradients", partial(gradients, half, lse, grad, None, None, beside)


def large(turing):
    """Launches at sizes beyond those that anybody trains with."""
    import torch

    from copgen_fast.kernels import add_upsampled, augment, cond_norm, info_nce

    def empty(*shape, dtype=torch.float32, layout=torch.contiguous_format):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

    half = torch.float16 if turing else torch.bfloat16
    images, views = (empty(16384, 3, side, side, dtype=dtype) for side, dtype in ((224, half), (256, torch.float32)))
    crop, row, std = empty(16384, 4), empty(16384), (0.5,) * 3
    drawn = (crop.long(), row.bool(), crop.long(), crop, row.bool(), row.bool(), row)
    yield "augment", partial(augment.augment_forward, images, *drawn, mean=std, std=std, views=views, pivot=row)
    given = {"pivot": row, "std": std, "straight_through": False, "grad_images": images}
    yield "augment backward", partial(augment.augment_backward, views, images, *drawn, **given)
    rows, numbers = empty(131072, 128, dtype=torch.float16), empty(131072)
    losses = (rows, None, 0.1, 10.0, 0, 65536, True, numbers, numbers, None, None)
    yield "row_losses", partial(info_nce.row_losses, *losses)
    of = (numbers, numbers, None, None, 0, 65536, True, rows.float())
    yield "row_gradients", partial(info_nce.row_gradients, rows, None, 0.1, 10.0, *of)
    x = empty(4096, 192, 64, 64, dtype=half, layout=torch.channels_last)
    small = empty(4096, 192, 32, 32, dtype=half, layout=torch.channels_last)
    yield "add_upsampled", partial(add_upsampled.add_upsampled, x, small, None, x)
    yield "add_upsampled backward", partial(add_upsampled.sum_by_four, x, small)
    affine = empty(4096, 192)
    yield "cond_norm", partial(cond_norm.cond_norm, x, affine, affine, False, x)
    backward = (x, x, affine, affine, False, x, affine, affine)
    yield "cond_norm backward", partial(cond_norm.cond_norm_backward, *backward)


if __name__ == "__main__":
    main(*sys.argv[1:])
