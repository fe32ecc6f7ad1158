"""Building blocks of the exact rewrite of GANs of residual blocks, by algebra on the published weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.generators._convolutions import Method
from copgen_fast.generators._interface import copy_attributes, expect_labels
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.generators._spectral import normalised_weight
from copgen_fast.ops import add_upsampled, cond_norm, tiles
from copgen_fast.ops.backend import resolve
from copgen_fast.ops.checks import expect_finite, expect_tensor

# Channels from which saved multiplications outweigh the copies around them, on a CPU: by PyTorch's operators, and in
# the C++ extension's tiles.
MANY, TILED = 384, 32


class Derived(nn.Module):
    """A tensor derived from published layers, once or at every call."""

    def __init__(self, make: Callable[..., Tensor], layers: tuple[nn.Module, ...], once: bool) -> None:
        super().__init__()
        self.make = None if once else make
        self.layers = nn.ModuleList([] if once else layers)
        self.register_buffer("value", make(*layers).detach() if once else None)

    def forward(self) -> Tensor:
        return self.value if self.make is None else self.make(*self.layers).detach()


class FoldedConv(nn.Module):
    """A convolution by a `Method`; `bias` [outputs] may include that of another layer.

    Args:
        outputs: number of output channels to compute, the first ones; None: all.
    """

    def __init__(
        self, conv: nn.Module, method: Method, once: bool, bias: Tensor | None = None, outputs: int | None = None
    ) -> None:
        super().__init__()
        self.weight = Derived(lambda layer: method.prepare(normalised_weight(layer)[:outputs]), (conv,), once)
        self.method, self.lean = method, False
        self.register_buffer("bias", None if bias is None else bias[:outputs].detach().clone())

    def to_bfloat16(self) -> None:
        """Convert what is computed to bfloat16, by the method that is fastest there."""
        if self.weight.value is not None:
            self.method, self.weight.value = convolutions.in_bfloat16(self.method, self.weight.value)
        self.bfloat16()

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """The convolution of x [N, C, H, W]; unless `biased`, without its bias."""
        arguments = x, self.weight(), self.bias if biased else None
        lean = self.lean and self.method.adjoint is not None and torch.is_grad_enabled() and x.requires_grad
        if lean:
            return convolutions.ByConstant.apply(*arguments, self.method.run, self.method.adjoint)
        return self.method.run(*arguments)


def conv_add_upsampled(conv: FoldedConv, x: Tensor, small: Tensor) -> Tensor:
    """conv(x) + small, upsampled by nearest 2 x: the end of a residual block.

    cuDNN would add the bias in a pass of its own; the fused addition adds it in the pass that it makes anyway.
    """
    fused = resolve("add_upsampled", x.device) != "reference"
    return add_upsampled(conv(x, not fused), small, conv.bias if fused else None, inplace=True)


def three_by_three(channels: int, out: int, upsampled: bool, rewrites: Rewrites) -> Method:
    """The method of a 3 x 3 convolution, plain or after nearest upsampling by 2."""
    tiled = in_tiles(min(channels, out), rewrites)
    if not upsampled:
        if rewrites.winograd and tiled:
            return convolutions.LARGE_TILES
        return convolutions.WINOGRAD if rewrites.winograd and out >= MANY else convolutions.DIRECT
    if not rewrites.upsampling:
        return convolutions.UPSAMPLED_DIRECT
    if rewrites.differences and tiled:
        return convolutions.TILED_DIFFERENCES
    many = rewrites.differences and min(channels, out) >= MANY
    return convolutions.DIFFERENCES if many else convolutions.TRANSPOSED


def in_tiles(channels: int, rewrites: Rewrites) -> bool:
    """Whether the C++ extension convolves that many channels, in tiles that stay in a processor's cache."""
    return rewrites.strips and channels >= TILED and tiles.built()


class Normalisation(nn.Module):
    """A published conditional normalisation and its ReLU, with folded weights.

    Args:
        layers: its gain and its bias, linear in a condition.
        place: turns their normalised weights [C, C'] into [K + 1, C], to be multiplied by [condition [N, K], 1].
        statistics: mean [C], variance [C] and epsilon.
        before: the bias [C] of the convolution before it, which `scale_shift` adds; None: there is none.
    """

    def __init__(
        self,
        layers: tuple[nn.Module, nn.Module],
        place: Callable[[Tensor], Tensor],
        statistics: tuple[Tensor, Tensor, float],
        before: Tensor | None,
        once: bool,
    ) -> None:
        super().__init__()
        self.gain, self.bias = (
            Derived(lambda layer: place(normalised_weight(layer)), (layer,), once) for layer in layers
        )
        mean, var, self.epsilon = statistics
        before = torch.zeros_like(mean) if before is None else before
        for name, value in (("mean", mean), ("var", var), ("before", before)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, x: Tensor, condition: Tensor, inplace: bool = False) -> Tensor:
        """relu(normalised x [N, C, H, W]) by [condition, 1] [N, K + 1]; x is never overwritten, even with `inplace`."""
        gain, bias = ((condition @ matrix()).to(x.dtype)[:, :, None, None] for matrix in (self.gain, self.bias))
        return (F.batch_norm(x, self.mean, self.var, eps=self.epsilon) * (1 + gain) + bias).relu()

    def scale_shift(self) -> Tensor:
        """[K + 1, 2 C], which times [condition, 1] gives equivalent scales and shifts; they also add `before` to x."""
        scale = self.gain().clone()
        scale[-1] += 1
        scale *= (self.var + self.epsilon).rsqrt()
        return torch.cat([scale, self.bias() + scale * (self.before - self.mean)], 1)


class FoldedAttention(nn.Module):
    """Attention with one convolution for queries, keys and values, and gamma folded into the last one.

    Args:
        inward: the published 1 x 1 convolutions to queries, keys and values.
        outward, gamma: of the residual x + gamma outward(...).
    """

    normalisations = 0

    def __init__(
        self, inward: tuple[nn.Module, nn.Module, nn.Module], outward: nn.Module, gamma: Tensor, rewrites: Rewrites
    ) -> None:
        super().__init__()
        self.sizes = [layer.out_channels for layer in inward]
        self.fused = rewrites.attention
        once, gamma = rewrites.spectral, gamma.detach().clone()
        self.inward = Derived(lambda *three: torch.cat([normalised_weight(x) for x in three]), inward, once)
        self.outward = Derived(lambda layer: scaled(normalised_weight(layer), gamma), (outward,), once)

    def forward(self, x: Tensor) -> Tensor:
        own, _, width = self.sizes
        queries, pooled = SplitPooled.apply(F.conv2d(x, self.inward()), own, width if self.fused else own)
        queries, keys, values = (y.flatten(2).transpose(1, 2) for y in (queries, *pooled.split(self.sizes[1:], 1)))
        if self.fused:
            # A kernel that keeps no matrix of weights, as the CPU's, takes one width for all three, and heads: one.
            # What queries have beyond their own channels is multiplied by zeros.
            keys = F.pad(keys, (0, width - own))
            three = (_aligned(y)[:, None] for y in (queries, keys, values))
            found = F.scaled_dot_product_attention(*three, scale=1.0).squeeze(1)
        else:
            found = (queries @ keys.transpose(1, 2)).softmax(2) @ values
        outward, rows = self.outward(), x.permute(0, 2, 3, 1)
        if rows.is_contiguous() and not (torch.is_grad_enabled() and x.requires_grad):
            rows.view(-1, rows.shape[3]).addmm_(found.flatten(0, 1), outward.flatten(1).T)  # one pass over x
            return x
        return x + F.conv2d(found.transpose(1, 2).unflatten(2, x.shape[2:]), outward)


class SplitPooled(torch.autograd.Function):
    """Some channels of [N, C, H, W], a view, and those from `own` on, max-pooled over 2 x 2.

    All are pooled, as pooling copies slices. The gradient of the view counts only up to `own`, and is put in the place
    of the gradient that pooling leaves there: no two of all channels are added.
    """

    @staticmethod
    def forward(ctx, x: Tensor, own: int, width: int) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
        ctx.save_for_backward(x, indices)
        ctx.own = own
        return x[:, :width], pooled[:, own:]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_view: Tensor, of_pooled: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        of_pooled = F.pad(of_pooled, (0, 0, 0, 0, ctx.own, 0))
        x, indices = ctx.saved_tensors
        window = [2, 2], [2, 2], [0, 0], [1, 1], False
        gradient = torch.ops.aten.max_pool2d_with_indices_backward(of_pooled, x, *window, indices)
        gradient[:, : ctx.own] = of_view[:, : ctx.own]
        return gradient, None, None


def _aligned(rows: Tensor) -> Tensor:
    """[N, L, C], copied unless all rows start at multiples of 16 bytes, as GPUs' kernels of attention expect."""
    if torch.compiler.is_compiling():  # which can't look at offsets
        return rows.contiguous()
    step = 16 // rows.element_size()
    return rows if rows.stride(1) % step == 0 and rows.storage_offset() % step == 0 else rows.contiguous()


class Rewritten(nn.Module):
    """Base class of exact rewrites: `steps` computes the published form's steps, the last one the images."""

    channels_last: bool
    checkpointed = False

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of images; no attribute, as pickle's protocol 2 knows none."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images of latents [N, L] (and labels), equal to the published generator's; autocast does not apply."""
        with torch.autocast(z.device.type, enabled=False):
            return deque(self.steps(z, labels), maxlen=1).pop()[1]

    def steps(self, z: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """The published form's steps, by the same names."""
        raise NotImplementedError

    def run(self, layer: nn.Module, *inputs: Any) -> Any:
        """Call a layer; with checkpointing its activations are computed again in the backward."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)


class Folded(Rewritten):
    """Latents [N, L] (and labels) to a published generator's images, differentiable with respect to z alone.

    Args:
        seed: the published linear layer before the first block.
        layers: folded blocks and attentions by their names in `steps`. Each takes x, which it may overwrite, and
            `normalisations` functions, which normalise their argument and may overwrite it with `inplace=True`.
        norms: the blocks' `Normalisation`s, in order.
        last: the last convolution, and scale [C] and shift [C] of the normalisation before it.
    """

    def __init__(
        self,
        published: nn.Module,
        rewrites: Rewrites,
        seed: nn.Module,
        layers: dict[str, nn.Module],
        norms: list[Normalisation],
        last: tuple[nn.Module, Tensor, Tensor],
    ) -> None:
        super().__init__()
        copy_attributes(published, self)
        self.channels_last = rewrites.channels_last
        once = rewrites.spectral
        self.seed = Derived(normalised_weight, (seed,), once)
        self.register_buffer("seed_bias", seed.bias.detach().clone())
        self.names, self.layers = list(layers), nn.ModuleList(layers.values())
        self.sizes = [2 * len(norm.mean) for norm in norms]
        self.affine_relu = cond_norm if rewrites.fused_norm else scale_shift_relu
        self.at_once = rewrites.modulation
        if self.at_once:
            self.modulation = Derived(lambda *of: torch.cat([x.scale_shift() for x in of], 1), tuple(norms), once)
        else:
            self.norms = nn.ModuleList(norms)
        conv, scale, shift = last
        self.register_buffer("last_scale", scale.detach())
        self.register_buffer("last_shift", shift.detach())
        self.last = FoldedConv(conv, convolutions.DIRECT, once, conv.bias, self.image_shape[0])
        self.to(memory_format=self.layout)
        for module in self.modules():
            if isinstance(module, FoldedConv):
                module.lean = rewrites.lean

    def condition(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """The vectors [N, K] in which seed and normalisations are linear."""
        raise NotImplementedError

    def seed_image(self, condition: Tensor) -> Tensor:
        """The first block's input [N, C, 4, 4]."""
        raise NotImplementedError

    def in_precision(self, dtype: torch.dtype) -> Folded:
        """Convert convolutions and attention to `dtype`; what is linear in z keeps its dtype, and so do images."""
        if dtype == torch.bfloat16:
            for module in self.layers.modules():
                if isinstance(module, FoldedConv):
                    module.to_bfloat16()
        self.layers.to(dtype)
        self.last.to(dtype)
        return self

    def steps(self, z: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """The published form's steps, by the same names; the next step may overwrite a value."""
        expect_tensor("z", z, ("N", self.latent_dim), {self.seed_bias.dtype})
        expect_finite("z", z)
        condition = self.condition(z, expect_labels(labels, len(z), self.classes))
        x = self.seed_image(condition).to(self.last.bias.dtype, memory_format=self.layout)
        yield "seed", x
        normalise = self.normalise(torch.cat([condition, torch.ones_like(z[:, :1])], 1))
        for name, layer in zip(self.names, self.layers, strict=True):
            x = self.run(layer, x, *islice(normalise, layer.normalisations))
            yield name, x
        x = self.affine_relu(x, self.last_scale[None], self.last_shift[None], inplace=True)
        if x.dtype == z.dtype:
            yield "images", self.last(x).tanh()
        else:  # images are converted as the bias is added
            yield "images", (self.last(x, False) + self.last.bias.to(z.dtype)[:, None, None]).tanh()

    def normalise(self, condition: Tensor) -> Iterator[Callable[..., Tensor]]:
        """The blocks' conditional normalisations with their ReLUs, in order, for [condition, 1] [N, K + 1]."""
        if not self.at_once:
            yield from (partial(norm, condition=condition) for norm in self.norms)
            return
        for part in (condition @ self.modulation()).split(self.sizes, 1):
            scale, shift = part.chunk(2, 1)
            yield partial(self.affine_relu, scale=scale, shift=shift)


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """weight times a scalar tensor of any device and dtype."""
    return weight * factor.to(weight)


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor, inplace: bool = False) -> Tensor:
    """`cond_norm` in two passes of PyTorch's operators, in x's dtype; x is never overwritten, even with `inplace`."""
    scale, shift = (y.to(x.dtype)[:, :, None, None] for y in (scale, shift))
    return torch.addcmul(shift, x, scale).relu_()
