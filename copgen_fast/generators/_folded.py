"""BigBiGAN in fewer operations: the same function of z, by algebra on its weights alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copgen_fast.checks import expect_finite, expect_tensor
from copgen_fast.generators import _convolutions as convolutions
from copgen_fast.generators._convolutions import Method
from copgen_fast.generators._tricks import Tricks

if TYPE_CHECKING:
    from copgen_fast.generators.bigbigan import Attention, BigBiGAN, Block, ConditionalBatchNorm

# Channels from which products saved are worth the copies around them, on a CPU.
MANY = 384


class Derived(nn.Module):
    """A tensor made from published layers: once, or at every call."""

    def __init__(self, make: Callable[..., Tensor], layers: tuple[nn.Module, ...], once: bool) -> None:
        super().__init__()
        self.make = None if once else make
        self.layers = nn.ModuleList([] if once else layers)
        self.register_buffer("value", make(*layers) if once else None)

    def forward(self) -> Tensor:
        return self.value if self.make is None else self.make(*self.layers)


class FoldedConv(nn.Module):
    """A convolution by some method; `bias` [out] may hold more than its own."""

    def __init__(self, conv: nn.Module, method: Method, once: bool, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = Derived(lambda layer: method.prepare(layer.normalised_weight()).detach(), (conv,), once)
        self.run = method.run
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight(), self.bias)


class Conditional(nn.Module):
    """`bigbigan.ConditionalBatchNorm` and its ReLU with folded weights, as one would write them."""

    def __init__(self, normalisation: ConditionalBatchNorm, shared: Tensor, once: bool) -> None:
        super().__init__()
        layers = (normalisation.gain, normalisation.bias)
        self.gain, self.bias = (Derived(lambda y: y.normalised_weight().detach(), (layer,), once) for layer in layers)
        for name, value in (("shared", shared), ("mean", normalisation.stored_mean), ("var", normalisation.stored_var)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, x: Tensor, chunk: Tensor) -> Tensor:
        condition = torch.cat([self.shared.expand(len(chunk), -1), chunk], 1)
        gain, bias = (F.linear(condition, weight)[:, :, None, None] for weight in (self.gain(), self.bias()))
        return (F.batch_norm(x, self.mean, self.var, eps=1e-4) * (1 + gain) + bias).relu()


class FoldedBlock(nn.Module):
    """`bigbigan.Block` between normalisations that are given."""

    def __init__(self, block: Block, tricks: Tricks) -> None:
        super().__init__()
        channels, out = block.conv1.in_channels, block.conv1.out_channels
        once = tricks.spectral
        upsampled = convolutions.UPSAMPLED_DIRECT
        if tricks.upsampling:
            upsampled = convolutions.DIFFERENCES if min(channels, out) >= MANY else convolutions.TRANSPOSED
        plain = convolutions.WINOGRAD if tricks.winograd and out >= MANY else convolutions.DIRECT
        # The second normalisation's shift holds conv1's bias.
        self.conv1 = FoldedConv(block.conv1, upsampled, once, None if tricks.modulation else block.conv1.bias)
        # A constant upsampled is that constant: the shortcut's bias can join the main branch's.
        self.conv2 = FoldedConv(block.conv2, plain, once, block.conv2.bias + block.conv_sc.bias)
        self.conv_sc = FoldedConv(block.conv_sc, convolutions.POINTWISE, once)
        self.shortcut_first = tricks.shortcut

    def forward(self, x: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        h = self.conv2(second(self.conv1(first(x))))
        if not self.shortcut_first:
            return h + self.conv_sc(F.interpolate(x, scale_factor=2))
        return add_upsampled(h, self.conv_sc(x))


class FoldedAttention(nn.Module):
    """`bigbigan.Attention` with one convolution for queries, keys and values, and gamma in the last one."""

    def __init__(self, attention: Attention, tricks: Tricks) -> None:
        super().__init__()
        layers = (attention.theta, attention.phi, attention.g)
        self.sizes = [layer.out_channels for layer in layers]
        self.fused = tricks.attention
        once = tricks.spectral
        self.inward = Derived(lambda *three: torch.cat([x.normalised_weight() for x in three]).detach(), layers, once)
        gamma = attention.gamma.detach().clone()
        self.outward = Derived(lambda o: (gamma.to(o.weight) * o.normalised_weight()).detach(), (attention.o,), once)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = F.conv2d(x, self.inward()).split(self.sizes, 1)
        keys, values = F.max_pool2d(keys, 2), F.max_pool2d(values, 2)
        queries, keys, values = (y.flatten(2).transpose(1, 2) for y in (queries, keys, values))
        if self.fused:
            found = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        else:
            found = (queries @ keys.transpose(1, 2)).softmax(2) @ values
        return x + F.conv2d(found.transpose(1, 2).unflatten(2, x.shape[2:]), self.outward())


class FoldedBigBiGAN(nn.Module):
    """Latents [N, L] to the images of a `BigBiGAN`, differentiable with respect to z alone."""

    def __init__(self, published: BigBiGAN, tricks: Tricks) -> None:
        super().__init__()
        self.latent_dim, self.image_shape, self.chunk = published.latent_dim, published.image_shape, published.chunk
        self.layout = torch.channels_last if tricks.channels_last else torch.contiguous_format
        once = tricks.spectral
        self.seed = Derived(lambda layer: layer.normalised_weight().detach(), (published.linear,), once)
        self.register_buffer("seed_bias", published.linear.bias.detach().clone())
        blocks = [layers[0] for layers in published.blocks]
        self.blocks = nn.ModuleList(FoldedBlock(block, tricks) for block in blocks)
        attentions = {str(i): layers[1] for i, layers in enumerate(published.blocks) if len(layers) > 1}
        self.attentions = nn.ModuleDict({i: FoldedAttention(layer, tricks) for i, layer in attentions.items()})
        normalisations = [norm for block in blocks for norm in (block.bn1, block.bn2)]
        self.sizes = [len(norm.stored_mean) for norm in normalisations]
        self.at_once = tricks.modulation
        if self.at_once:
            self.modulation = Derived(modulation, (published,), once)
        else:
            shared = published.shared.weight[0]
            self.conditionals = nn.ModuleList(Conditional(norm, shared, once) for norm in normalisations)
        last, _, conv = published.output_layer
        scale = last.gain * (last.stored_var + 1e-5).rsqrt()
        self.register_buffer("last_scale", scale.detach())
        self.register_buffer("last_shift", (last.bias - scale * last.stored_mean).detach())
        self.last = FoldedConv(conv, convolutions.DIRECT, once, conv.bias)
        self.to(memory_format=self.layout)
        self.checkpointed = False

    def in_precision(self, dtype: torch.dtype) -> FoldedBigBiGAN:
        """Convolutions and attention in `dtype`, from now on; what is linear in z stays as it is, and so do images."""
        for module in (self.blocks, self.attentions, self.last):
            module.to(dtype)
        self.last_scale, self.last_shift = self.last_scale.to(dtype), self.last_shift.to(dtype)
        return self

    def forward(self, z: Tensor) -> Tensor:
        """As `BigBiGAN.forward`."""
        return deque(self.steps(z), maxlen=1).pop()[1]

    def steps(self, z: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As `BigBiGAN.steps`, whose names it has."""
        expect_tensor("z", z, ("N", self.latent_dim), {self.seed_bias.dtype})
        expect_finite("z", z)
        x = F.linear(z[:, : self.chunk], self.seed(), self.seed_bias).unflatten(1, (-1, 4, 4))
        x = x.to(self.last_scale.dtype, memory_format=self.layout)
        yield "linear", x
        normalise = self.normalisations(z)
        for i, block in enumerate(self.blocks):
            x = self.run(block, x, next(normalise), next(normalise))
            if str(i) in self.attentions:
                x = self.run(self.attentions[str(i)], x)
            yield f"blocks.{i}", x
        x = scale_shift_relu(x, self.last_scale[None], self.last_shift[None])
        yield "output_layer", self.last(x).to(z.dtype).tanh()

    def run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """The layer; where checkpointed, its activations are computed again in the backward."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def normalisations(self, z: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """The blocks' conditional normalisations with their ReLUs, in order."""
        if not self.at_once:
            chunks = [chunk for chunk in z.split(self.chunk, 1)[1:] for _ in range(2)]
            yield from (partial(norm, chunk=chunk) for norm, chunk in zip(self.conditionals, chunks, strict=True))
            return
        scales_shifts = torch.cat([z, torch.ones_like(z[:, :1])], 1) @ self.modulation()
        for part in scales_shifts.split([2 * size for size in self.sizes], 1):
            scale, shift = part.to(self.last_scale.dtype).chunk(2, 1)
            yield partial(scale_shift_relu, scale=scale, shift=shift)


def modulation(published: BigBiGAN) -> Tensor:
    """[L + 1, sum of 2 C]: times [z, 1], every normalisation's scales and then its shifts."""
    chunk, shared = published.chunk, published.shared.weight[0]
    parts = []
    for i, (block, *_) in enumerate(published.blocks):
        rows = slice(chunk * (i + 1), chunk * (i + 2))
        for norm, bias in ((block.bn1, 0), (block.bn2, block.conv1.bias)):
            inverse = (norm.stored_var + 1e-4).rsqrt()
            affine = []
            for layer in (norm.gain, norm.bias):
                weight = layer.normalised_weight()
                both = weight.new_zeros(published.latent_dim + 1, len(weight))
                both[rows] = weight[:, len(shared) :].T
                both[-1] = weight[:, : len(shared)] @ shared
                affine.append(both)
            affine[0][-1] += 1
            scale = affine[0] * inverse
            parts += [scale, affine[1] + scale * (bias - norm.stored_mean)]
    return torch.cat(parts, 1).detach()


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(scale x + shift) of x [N, C, H, W], with scales and shifts [N, C] or [1, C]."""
    return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None]).relu_()


def add_upsampled(x: Tensor, small: Tensor) -> Tensor:
    """x [N, C, 2H, 2W] plus small [N, C, H, W] upsampled by nearest, into x, which nothing else reads."""
    by_four = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    by_four += small[:, :, :, None, :, None]
    return x
