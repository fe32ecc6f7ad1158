"""Random calls of the C++ operators beside the reference, for a process that runs under AddressSanitizer.

`python sanitized_calls.py LIBRARY CALLS` takes the compiled operators from LIBRARY; after CALLS calls it writes beyond
a tensor's end.
"""

import importlib.util
import random
import sys

import torch
import torch.nn.functional as F

module = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("copgen_fast._cpp", sys.argv[1])
)
spec.loader.exec_module(module)
sys.modules["copgen_fast._cpp"] = module

from copgen_fast.generators import _convolutions as convolutions  # noqa: E402
from copgen_fast.ops import (  # noqa: E402
    AugmentParams,
    AugmentPolicy,
    augment,
    cond_norm,
    conv3x3,
    info_nce,
    rand_augment,
    tiles,
    winograd,
)
from copgen_fast.ops.rand_augment.params import RandAugmentParams, RandAugmentPolicy  # noqa: E402

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(rng, g, n, height, width, dtypes):
    """Images whose pixels are not always adjacent in memory."""
    x = torch.rand(n, 3, height, width + rng.choice([0, 0, 3]), generator=g)[..., :width]
    x = x.to(memory_format=rng.choice(LAYOUTS)) if rng.random() < 0.7 else x
    dtype = rng.choice(dtypes)
    return (255 * x).byte() if dtype == torch.uint8 else x.to(dtype)


def call_augment(rng, g):
    n, height, width = rng.choice([0, 1, 2, 3]), rng.randint(1, 40), rng.randint(1, 40)
    size = (rng.randint(1, 40), rng.randint(1, 40))
    policy = AugmentPolicy(
        crop_scale=rng.choice([None, (0.01, 1.0), (1e-4, 0.1)]), crop_ratio=rng.choice([(0.75, 4 / 3), (0.01, 100.0)]),
        flip=0.5, brightness=0.4, contrast=0.4, saturation=rng.choice([0.4, 3]), hue=rng.choice([0, 0.5]), jitter=0.8,
        gray=0.2, blur=rng.choice([0, 0.5]), solarize=rng.choice([0, 0.5]),
    )  # fmt: skip
    x = images(rng, g, n, height, width, (torch.uint8, *DTYPES))
    params = AugmentParams.sample(rng.randint(1, 3) * n, (height, width), policy, out_size=size, generator=g)
    options = {
        "out_size": size,
        "memory_format": rng.choice(LAYOUTS),
        "clamp": rng.choice(["exact", "straight_through"]),
    }
    options["out_dtype"] = rng.choice(DTYPES)
    return [x], lambda x, backend: augment(x, params, **options, backend=backend), 1e-4


def call_rand_augment(rng, g):
    n, height, width = rng.randint(0, 3), rng.randint(1, 24), rng.randint(1, 24)
    policy = RandAugmentPolicy(steps=rng.randint(1, 3), magnitude=rng.randint(0, 10))
    uniform = torch.rand(n, 5 * policy.steps, generator=g, dtype=torch.float64)
    params = RandAugmentParams.from_uniform(uniform, policy)
    x = images(rng, g, n, height, width, (torch.float32, torch.float64))
    return [x], lambda x, backend: rand_augment(x, params, backend=backend), 1.01 / 255


def call_info_nce(rng, g):
    n, d = rng.randint(1, 70), rng.choice([1, 3, 8, 17, 64, 130])
    dtype = rng.choice(DTYPES)
    rows = [torch.randn(n, d, generator=g).to(dtype) for _ in range(2)]
    options = {"temperature": rng.choice([0.07, 0.5, 3.0]), "symmetric": rng.random() < 0.6}
    kind = rng.choice(["plain", "labels", "queue"])
    if kind == "labels":
        options["labels"] = torch.randint(0, 4, (n,), generator=g)
    elif kind == "queue":
        options |= {"symmetric": False, "in_batch": rng.random() < 0.5}
        options["negatives"] = torch.randn(rng.randint(1, 90), d, generator=g).to(dtype)
    return rows, lambda a, p, backend: info_nce(a, p, **options, backend=backend), 1e-4


def call_cond_norm(rng, g):
    n, channels, height, width = rng.randint(0, 3), rng.randint(1, 40), rng.randint(1, 20), rng.randint(1, 20)
    dtype, upsample = rng.choice(DTYPES), rng.random() < 0.5
    x = torch.randn(n, channels, height, width, generator=g).to(dtype, memory_format=rng.choice(LAYOUTS))
    affine = list(torch.randn(2, rng.choice([1, n]), channels, generator=g).to(dtype))
    return [x, *affine], lambda *a, backend: cond_norm(*a, upsample=upsample, backend=backend), 1e-4


def call_winograd(rng, g):
    n, outputs, height, width = rng.randint(0, 3), rng.randint(1, 40), rng.randint(1, 20), rng.randint(1, 20)
    x = images(rng, g, n, height, width, (torch.float32, torch.float64))
    shapes = (outputs, 3, 3, 3), (outputs,), (n, height, width, outputs)
    weight, bias, added = (torch.randn(shape, generator=g).to(x.dtype) for shape in shapes)
    added = added if rng.random() < 0.5 else None
    relu = rng.random() < 0.5

    def op(x, backend):
        if backend == "reference":
            out = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)
            out = out if added is None else out + added
            return out.relu() if relu else out
        return winograd.convolve(x.permute(0, 2, 3, 1), winograd.prepare(weight), bias, added, relu)

    return [x], op, 1e-4


def call_differences(rng, g):
    n, outputs, height, width = rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 20), rng.randint(1, 20)
    x = torch.randn(n, height, width, rng.choice([1, 3, 33]), generator=g)
    weight = torch.randn(outputs, x.shape[3], 3, 3, generator=g)

    def op(x, backend):
        if backend == "reference":
            upsampled = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2)
            return F.conv2d(upsampled, weight, padding=1).permute(0, 2, 3, 1)
        prepared = convolutions.DIFFERENCES.prepare(weight)
        out = tiles.convolve(x, prepared, "differences", x.new_empty(n, 2 * height, 2 * width, outputs))
        tiles.convolve_transposed(out, prepared, "differences adjoint", torch.empty_like(x))
        return out

    return [x], op, 1e-4


def call_conv3x3(rng, g):
    n, (height, width) = rng.choice([0, 1, 2, 40]), rng.choices(range(1, 14), k=2)
    channels, outputs = (rng.choice([1, 3, 16, 33, 80]) for _ in range(2))
    dtype = rng.choice(DTYPES[:2])
    x, weight = torch.randn(n, channels, height, width, generator=g), torch.randn(outputs, channels, 3, 3, generator=g)
    inputs = [y.to(dtype, memory_format=rng.choice(LAYOUTS)) for y in (x, weight)]
    return inputs, conv3x3, 1e-4 if dtype == torch.float32 else 1e-9


CALLS = (
    (call_augment, 0.35),
    (call_info_nce, 0.3),
    (call_conv3x3, 0.05),
    (call_cond_norm, 0.15),
    (call_rand_augment, 0.1),
    (call_winograd, 0.03),
    (call_differences, 0.02),
)
WITHOUT_GRADIENTS = (call_rand_augment, call_winograd, call_differences)


def run(call, seed):
    """One random call by both backends: results, and gradients of a random weighting of them."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    inputs, op, tolerance = call(rng, g)
    differentiable = call not in WITHOUT_GRADIENTS and all(x.is_floating_point() for x in inputs)
    found = []
    for backend in ("cpp", "reference"):
        leaves = [x.detach().requires_grad_(differentiable) for x in inputs]
        y = op(*leaves, backend=backend)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
        grads = torch.autograd.grad((y * weights).sum(), leaves) if differentiable else ()
        found.append([y.detach(), *grads])
    coarsest = max((x.dtype for x in (y, *inputs) if x.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)
    if call is call_augment and coarsest != torch.float64:
        found = [of[:1] for of in found]  # rounding decides about the derivative at a kink, of a hue say
    for ours, expected in zip(*found, strict=True):
        # A sum's rounding is a share of its largest terms.
        scale = 1 + expected.abs().nan_to_num().amax().item() if expected.numel() else 1
        tolerance = max(tolerance, 8 * torch.finfo(coarsest).eps)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * scale, check_stride=False)


if __name__ == "__main__":
    pick = random.Random(0)
    for number in range(int(sys.argv[2])):
        call = pick.choices([c for c, _ in CALLS], [share for _, share in CALLS])[0]
        try:
            run(call, number)
        except Exception as error:
            sys.exit(f"{call.__name__} of seed {number}: {error}")
    print(f"{sys.argv[2]} calls", flush=True)
    rows = torch.randn(9, 8)
    torch.ops.copgen_fast_cpp.row_losses(
        rows, None, 1.0, 1.0, 0, 1, True, rows.new_empty(4), rows.new_empty(4), None, None
    )
    print("no overrun noticed")
