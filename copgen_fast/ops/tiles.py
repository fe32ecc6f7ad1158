"""3 x 3 convolutions in tiles by the C++ extension: few matrix products over channels, whose values stay in a cache.

Images are channels last, [N, H, W, C], of any size; weights are constants, prepared once:

- winograd: [36, C, O] by `ops.winograd.prepare`; the outputs have the images' size.
- differences: [25, C, O], of nearest upsampling by 2 and a convolution; the outputs are twice as wide and high.
- winograd adjoint, differences adjoint: their gradients, by the weights' transposes [36, O, C] and [25, O, C].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.ops.backend import INSTALLED, load

Form = Literal["winograd", "winograd adjoint", "differences", "differences adjoint"]


def built() -> bool:
    """Whether the C++ extension is built and has these convolutions, which one built earlier may lack."""
    return "cpp" in INSTALLED and hasattr(load("cpp", "tiles"), "tiles_weight_gradient")


def compiled(x: Tensor) -> bool:
    """Whether the extension convolves images like x: on a CPU, bfloat16 where oneDNN multiplies it by instructions."""
    able = x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and _multiplies_bf16())
    return able and x.device.type == "cpu" and built()


def _multiplies_bf16() -> bool:
    able = torch.cpu.get_capabilities()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (able.get("avx512_bf16", False) or able.get("amx_bf16", False))
    )


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` takes images like x and a prepared weight: of bfloat16, one in `pairs`."""
    return compiled(x) and (x.dtype == torch.bfloat16) == (weight.ndim == 4)


def fits_transposed(gradient: Tensor, weight: Tensor) -> bool:
    """Whether `convolve_transposed` takes a gradient and a prepared weight: of bfloat16, one of even channels."""
    return compiled(gradient) and (gradient.dtype != torch.bfloat16 or weight.shape[2] % 2 == 0)


def prepare(weight: Tensor) -> Tensor:
    """[O, C, 3, 3], of any strides, to the "winograd" form's [36, C, O]; as `ops.winograd.prepare`, faster."""
    outputs, channels = weight.shape[:2]
    size = channels * outputs
    # A power of two apart, the 36 numbers of a tap would share one place of the cache.
    prepared = weight.new_empty(36, size + 16)[:, :size].unflatten(1, (channels, outputs))
    load("cpp", "tiles").prepare_tiles(weight, prepared)
    return prepared


def pairs(weight: Tensor) -> Tensor:
    """A prepared weight [K, C, O] as products of bfloat16 take it: pairs of input channels, [K, C / 2, O, 2]."""
    weight = F.pad(weight, (0, 0, 0, weight.shape[1] % 2))
    return weight.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    form: Form,
    out: Tensor,
    *,
    first: int = 0,
    styles: Tensor | None = None,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve images into `out` [N, H', W', O], whose first row is row `first` of the outputs; returns `out`.

    Args:
        weight: prepared, for bfloat16 in `pairs`.
        styles: [N, C], by which images are multiplied.
        bias: [O].
        added: what is added to the outputs, of out's strides.
        relu: whether a ReLU follows.
    """
    if out.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        styles = None if styles is None else styles.contiguous()
        load("cpp", "tiles").convolve_tiles(x, weight, form, styles, bias, added, relu, first, out)
    return out


def convolve_transposed(gradient: Tensor, weight: Tensor, form: Form, out: Tensor) -> Tensor:
    """Gradient of a convolution with respect to its images, into `out` [N, H', W', C]; weight [K, C, O] as prepared."""
    _, channels, outputs = weight.shape
    count = out.shape[:3].numel() // {"winograd adjoint": 16, "differences adjoint": 4}[form]
    weight = weight.transpose(1, 2)
    if count * (channels + outputs) > channels * outputs:  # a copy of fewer numbers than the tiles', else transposed
        weight = pairs(weight) if weight.dtype == torch.bfloat16 else weight.contiguous()
    return convolve(gradient, weight, form, out)
