"""Switches for the exact rewrites of a generator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewrites:
    """Which exact rewrites to make: each changes rounding only.

    Attributes:
        spectral: divide weights by their spectral norms once, not at every forward.
        modulation: normalisation and condition as one scale and one shift a channel and sample, those of all layers
            from one product with z.
        shortcut: the shortcut's 1 x 1 convolution before its upsampling, a quarter of the work; where it has none, it
            is added without being upsampled first.
        upsampling: nearest upsampling and 3 x 3 convolution as one transposed 4 x 4 convolution (16 products in place
            of 36).
        differences: where channels are many, by differences of neighbours (9) instead.
        winograd: 3 x 3 convolutions by F(2 x 2, 3 x 3) (16 products in place of 36) where channels are many.
        strips: layers in parts, whose intermediate values stay in a processor's cache: StyleGAN2's large ones in strips
            of rows, and in tiles 3 x 3 convolutions by F(4 x 4, 3 x 3) (36 products in place of 144), which need
            float32's digits, and differences, from fewer channels on.
        attention: PyTorch's fused attention.
        fused_norm: a normalisation's scale, shift and ReLU in one pass over the values, in place without gradients
            (`ops.cond_norm`), and its gradient in one.
        lean: convolutions keep no activations for the backward, as their weights take no gradient: the same products,
            in less memory.
        channels_last: pixels' channels next to each other.
    """

    spectral: bool = True
    modulation: bool = True
    shortcut: bool = True
    upsampling: bool = True
    differences: bool = True
    winograd: bool = True
    strips: bool = True
    attention: bool = True
    fused_norm: bool = True
    lean: bool = True
    channels_last: bool = True


ALL = Rewrites()
# Direct and transposed convolutions: more products, and fewer launches and copies.
FEW_LAUNCHES = Rewrites(differences=False, winograd=False, strips=False)
# For GPUs, and for half precision that the extension's tiles don't know.
FEW_PRODUCTS = Rewrites(strips=False)
