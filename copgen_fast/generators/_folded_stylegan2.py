"""The exact rewrite of StyleGAN2: the same function of its latents in fewer operations.

A modulated convolution's weights are made for every image in the published form, and its gradient goes through them.
Here one weight serves all: inputs are multiplied by their styles, and outputs by the norms' inverses, a product of the
squared styles with the squared weights (Karras et al. 2020, equations 1 to 3). The leaky ReLU's gain joins them, as it
is homogeneous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.generators import _folding, _strips
from copgen_fast.generators._convolutions import Method
from copgen_fast.generators._interface import copy_attributes, expect_labels
from copgen_fast.generators._rewrites import Rewrites
from copgen_fast.generators._stylegan2_layers import (
    EPSILON,
    GAIN,
    SLOPE,
    Mapping,
    StyledConv,
    ToRGB,
    clamped,
    leaky,
    second_moment_normalised,
    upsampled,
)
from copgen_fast.ops import winograd
from copgen_fast.ops.checks import expect_finite, expect_tensor

FEW = 24
"""Input channels up to which a filter is merged into the convolution that it follows."""

TILED, TILED_SIDE = 128, 16
"""Channels and pixels a side from which large tiles by PyTorch's operators are faster than other convolutions."""


def activate_(y: Tensor, limit: float | None) -> Tensor:
    """clamp(leaky_relu(y)) in place."""
    F.leaky_relu_(y, SLOPE)
    return y if limit is None else y.clamp_(-limit, limit)


class Activation(torch.autograd.Function):
    """clamp(leaky_relu(x * scale + shift)), with gradients of x and of scale [N, C, 1, 1]."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, limit: float | None) -> Tensor:  # noqa: ANN001
        y = activate_(torch.addcmul(shift, x, scale), limit)
        ctx.save_for_backward(x, scale, y)
        ctx.limit = limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        x, scale, y = ctx.saved_tensors
        gradient = torch.ops.aten.leaky_relu_backward(gradient, y, SLOPE, True)
        if ctx.limit is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, y, -ctx.limit, ctx.limit)
        return gradient * scale, (gradient * x).sum((2, 3), keepdim=True), None, None


class FoldedConv(nn.Module):
    """A convolution by fixed weights, of one or two `Method`s, in place of a `StyledConv`."""

    def __init__(self, conv: StyledConv, rewrites: Rewrites) -> None:
        super().__init__()
        out, channels = conv.weight.shape[:2]
        self.clamp, self.lean, self.is_half = conv.clamp, rewrites.lean, False
        self.strips = rewrites.strips
        taps = 4 * conv.resample_filter
        self.methods: tuple[Method, ...]
        if not conv.up:
            self.methods, weights = (_plain(min(out, channels), conv.side, rewrites),), (conv.weight,)
        elif rewrites.upsampling and channels <= FEW:
            both = F.conv2d(conv.weight.flatten(0, 1)[:, None], taps.flip(0, 1)[None, None], padding=3)
            self.methods, weights = (convolutions.MERGED,), (both.view(out, channels, 6, 6).transpose(0, 1),)
        else:
            self.methods = (convolutions.FULL_TRANSPOSED, convolutions.SMOOTHED)
            weights = (conv.weight, taps.expand(out, 1, 4, 4))
        for i, (method, weight) in enumerate(zip(self.methods, weights, strict=True)):
            self.register_buffer(f"weight{i}", method.prepare(weight.detach()).clone())
        self.register_buffer("squares", conv.weight.detach().square().sum((2, 3)).T.contiguous())
        shift = conv.bias.detach()[None, :, None, None]
        if conv.noisy:
            shift = shift + conv.noise_const * conv.noise_strength
        self.register_buffer("shift", GAIN * shift)

    def forward(self, x: Tensor, styles: Tensor) -> Tensor:
        """x [N, C, H, W] and its styles [N, C] to the layer's outputs."""
        if self.is_half:  # demodulation takes the factor out again
            styles = styles / styles.abs().amax(1, keepdim=True)
        scale = GAIN * (styles.square() @ self.squares + EPSILON).rsqrt()
        differentiated = torch.is_grad_enabled() and (x.requires_grad or styles.requires_grad)
        if self.strips and not self.is_half and not differentiated:
            return self.sampled(x, styles, scale)
        x = x.to(self.shift.dtype) * styles[:, :, None, None].to(self.shift.dtype)
        for i, method in enumerate(self.methods):
            x = self.apply_method(method, x, getattr(self, f"weight{i}"))
        return Activation.apply(x, scale[:, :, None, None].to(x.dtype), self.shift, self.clamp)

    def sampled(self, x: Tensor, styles: Tensor, scale: Tensor) -> Tensor:
        """The layer's outputs without gradients, computed in place, and in strips of rows where that is faster."""
        x, every, scale = x.permute(0, 2, 3, 1), slice(None), scale[:, None, None]
        shift = self.shift.permute(0, 2, 3, 1)

        def finish(values: Tensor, out: Tensor, images: slice, rows: slice) -> None:
            torch.addcmul(shift[:, rows] if shift.shape[1] > 1 else shift, values, scale[images], out=out)
            activate_(out, self.clamp)

        if self.methods == (convolutions.LARGE_TILES,):
            y = winograd.styled(x, self.weight0, styles, finish)
        elif self.methods == (convolutions.FULL_TRANSPOSED, convolutions.SMOOTHED):
            y = _strips.upsampled(x, self.weight0, self.weight1, styles, finish)
        else:
            y = (x * styles[:, None, None]).permute(0, 3, 1, 2)
            for i, method in enumerate(self.methods):
                y = method.run(y, getattr(self, f"weight{i}"), None)
            y = y.permute(0, 2, 3, 1)
            finish(y, y, every, every)
        return y.permute(0, 3, 1, 2)

    def to_half(self, dtype: torch.dtype) -> None:
        """Convert the products to `dtype`, with inputs and weights scaled as the release does against overflows."""
        self.is_half = True
        size = math.sqrt(len(self.squares)) * 3
        factor = 1 / (size * self.squares.amax().sqrt())
        self.squares *= factor.square()
        self.weight0 *= factor
        if dtype == torch.bfloat16 and len(self.methods) == 1:
            method, self.weight0 = convolutions.in_bfloat16(self.methods[0], self.weight0)
            self.methods = (method,)
        for name, buffer in self.named_buffers():
            if name != "squares":
                setattr(self, name, buffer.to(dtype))

    def apply_method(self, method: Method, x: Tensor, weight: Tensor) -> Tensor:
        if self.lean and method.adjoint is not None and torch.is_grad_enabled() and x.requires_grad:
            return convolutions.ByConstant.apply(x, weight, None, method.run, method.adjoint)
        return method.run(x, weight, None)


def _plain(channels: int, side: int, rewrites: Rewrites) -> Method:
    """The method of a convolution without upsampling."""
    large = rewrites.strips and side >= TILED_SIDE and channels >= TILED
    tiled = side > winograd.SIDE and _folding.in_tiles(channels, rewrites)
    if side % winograd.SIDE == 0 and (large or tiled):
        return convolutions.LARGE_TILES
    many = rewrites.winograd and side % 2 == 0 and channels >= _folding.MANY
    return convolutions.WINOGRAD if many else convolutions.DIRECT


class FoldedToRGB(nn.Module):
    """A `ToRGB` whose weight is a matrix."""

    def __init__(self, layer: ToRGB) -> None:
        super().__init__()
        self.clamp = layer.clamp
        self.register_buffer("weight", layer.weight.detach().flatten(1).clone())
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor, styles: Tensor) -> Tensor:
        weight = (self.weight * styles[:, None]).to(x.dtype)
        y = x.permute(0, 2, 3, 1).flatten(1, 2) @ weight.transpose(
            1, 2
        )  # a copy unless channels are next to each other
        y = (y.to(styles.dtype) + self.bias).transpose(1, 2).unflatten(2, x.shape[2:])
        return clamped(y, self.clamp)


class FoldedBlock(nn.Module):
    """The layers of a `Block`, with their styles passed in."""

    def __init__(self, block: nn.Module, rewrites: Rewrites) -> None:
        super().__init__()
        self.convs = nn.ModuleList(FoldedConv(conv, rewrites) for conv in block.convs)
        self.torgb = FoldedToRGB(block.torgb)
        self.register_buffer("taps", block.resample_filter.detach().clone())

    def to_half(self, dtype: torch.dtype) -> None:
        """Convert its convolutions to `dtype`."""
        for conv in self.convs:
            conv.to_half(dtype)

    def forward(self, x: Tensor, image: Tensor | None, *styles: Tensor) -> tuple[Tensor, ...]:
        """Outputs of its convolutions, and the image so far."""
        outputs = []
        for conv, style in zip(self.convs, styles[:-1], strict=True):
            x = conv(x, style)
            outputs.append(x)
        added = self.torgb(x, styles[-1])
        return *outputs, added if image is None else upsampled(image, self.taps) + added


class FoldedMapping(nn.Module):
    """A `Mapping` with its gains in the weights, and the classes' embeddings normalised once."""

    def __init__(self, mapping: Mapping, psi: float) -> None:
        super().__init__()
        self.psi, self.layers = psi, mapping.layers
        for i in range(mapping.layers):
            weight, bias = getattr(mapping, f"fc{i}").scaled()
            self.register_buffer(f"weight{i}", weight.detach())
            self.register_buffer(f"bias{i}", bias.detach())
        self.register_buffer("w_avg", mapping.w_avg.detach().clone())
        table = None
        if hasattr(mapping, "embed"):
            weight, bias = mapping.embed.scaled()
            table = second_moment_normalised(weight.T + bias).detach()
        self.register_buffer("table", table)

    def forward(self, z: Tensor, labels: Tensor | None) -> Tensor:
        x = second_moment_normalised(z)
        if labels is not None:
            x = torch.cat([x, self.table[labels]], 1)
        for i in range(self.layers):
            x = leaky(F.linear(x, getattr(self, f"weight{i}"), getattr(self, f"bias{i}")))
        return x if self.psi == 1 else self.w_avg.lerp(x, self.psi)


class FoldedStyleGAN2(_folding.Rewritten):
    """Latents [N, L] to the images of a `StyleGAN2`, differentiable with respect to them alone."""

    def __init__(self, published: nn.Module, rewrites: Rewrites) -> None:
        super().__init__()
        copy_attributes(published, self)
        self.in_w, self.layers, self.w_dim = published.config.space == "w", published.layers, published.w_dim
        self.sides, self.half_blocks = published.synthesis.sides, published.shape.half_blocks
        self.mapping = None if self.in_w else FoldedMapping(published.mapping, published.config.psi)
        self.register_buffer("const", published.synthesis.b4.const.detach().clone()[None])
        blocks = published.synthesis.blocks
        self.blocks = nn.ModuleList(FoldedBlock(block, rewrites) for block in blocks)
        affine, self.styled_by = [], []
        for block in blocks:
            first = self.styled_by[-1] if self.styled_by else 0  # the w of the output before
            count = len(block.convs)
            self.styled_by += range(first, first + count + 1)
            for layer in (*block.convs, block.torgb):
                weight, bias = layer.affine.scaled()
                gain = 1 / math.sqrt(len(weight)) if layer is block.torgb else 1
                affine.append((gain * weight.detach(), gain * bias.detach()))
        self.counts = [len(block.convs) + 1 for block in blocks]
        self.sizes = [len(bias) for _, bias in affine]
        self.at_once = rewrites.modulation and not self.in_w
        self.register_buffer("affine_weight", torch.cat([weight for weight, _ in affine]))
        self.register_buffer("affine_bias", torch.cat([bias for _, bias in affine]))
        self.channels_last = rewrites.channels_last
        self.to(memory_format=self.layout)

    def in_precision(self, dtype: torch.dtype) -> FoldedStyleGAN2:
        """Convert the last blocks to `dtype`, those that the release trains in half precision; images keep theirs."""
        for block in self.blocks[max(1, len(self.blocks) - self.half_blocks) :]:
            block.to_half(dtype)
        return self

    def steps(self, z: Tensor, labels: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """The published form's steps, by the same names."""
        expect_tensor("z", z, ("N", self.latent_dim), {self.const.dtype})
        expect_finite("z", z)
        labels = expect_labels(labels, len(z), self.classes)
        w = z.unflatten(1, (self.layers, self.w_dim)) if self.in_w else self.mapping(z, labels)
        yield "mapping", w if self.in_w else w[:, None].expand(-1, self.layers, -1)
        styles = iter(self.styles(w))
        x, image = self.const.expand(len(z), -1, -1, -1).contiguous(memory_format=self.layout), None
        for side, block, count in zip(self.sides, self.blocks, self.counts, strict=True):
            *outputs, image = self.run(block, x, image, *(next(styles) for _ in range(count)))
            for i, x in enumerate(outputs, 3 - count):
                yield f"b{side}.conv{i}", x
            yield f"b{side}.torgb", image
        yield "images", image.clamp(-1, 1).expand(-1, 3, -1, -1)

    def styles(self, w: Tensor) -> tuple[Tensor, ...]:
        """Styles of every layer: of one product, where all have the same w."""
        if self.at_once:
            return F.linear(w, self.affine_weight, self.affine_bias).split(self.sizes, 1)
        weights, biases = self.affine_weight.split(self.sizes), self.affine_bias.split(self.sizes)
        of = [w[:, i] if self.in_w else w for i in self.styled_by]
        return tuple(F.linear(*layer) for layer in zip(of, weights, biases, strict=True))
