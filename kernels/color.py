"""Triton functions of the colour jitter and its gradient, shared by the augmentation's kernels.

A pixel is three tensors r, g, b in [0, 1]. Branches depend on the view alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl

BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(op) for op in range(4))


class Drawn(NamedTuple):
    """AugmentParams: pointers to tensors of one row a view."""

    crop: object
    flip: object
    order: object
    factors: object
    jitter: object
    gray: object
    solarize: object


class Jitter(NamedTuple):
    """The colour jitter of one view: pointers to its order and factors, and what is derived from them."""

    order: object
    factors: object
    hue_at: object
    contrast_at: object
    end: object  # 4, or 0 for a view without jitter: no place in its order is reached
    shift: object  # of the hue, in turns of [0, 1]; 0 for none
    contrast: object  # 1 - the contrast's factor, 0 for a view whose contrast does nothing


@triton.jit
def load_jitter(drawn, view, COMPUTE: tl.constexpr):
    """Jitter of `view`, and whether its order is a permutation."""
    order = drawn.order + 4 * view
    factors = drawn.factors + 4 * view
    hue_at = 0
    contrast_at = 0
    seen = 0
    for place in tl.static_range(4):
        op = tl.load(order + place)
        hue_at += tl.where(op == HUE, place, 0)
        contrast_at += tl.where(op == CONTRAST, place, 0)
        seen |= tl.where((op >= 0) & (op <= 3), 1 << (op & 3).to(tl.int32), 0)
    jitter = tl.load(drawn.jitter + view)
    shift = tl.load(factors + HUE).to(COMPUTE)
    contrast = 1 - tl.load(factors + CONTRAST).to(COMPUTE)
    end = tl.where(jitter, 4, 0)
    contrast = tl.where(jitter, contrast, 0.0)
    return Jitter(order, factors, hue_at, contrast_at, end, shift - tl.floor(shift), contrast), seen == 15


@triton.jit
def tie(x, ROUNDINGS: tl.constexpr = 8):
    """Values nearer to a threshold than this are at it, so that rounding does not decide; see the reference."""
    return ROUNDINGS * (2.0**-52 if x.dtype == tl.float64 else 2.0**-23)


@triton.jit
def luminance(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def apply_jitter(r, g, b, jitter, pivot, end):
    """Apply the ops at the places before `end`: the blends before the hue, the hue, the blends after it.

    Returns the pixel, the pixel before the hue, and bits 3 place + channel, set where no clamp was active.
    """
    kept = tl.zeros(r.shape, tl.int32)
    for place in range(0, tl.minimum(jitter.hue_at, end)):
        r, g, b, kept = _blend(r, g, b, kept, jitter, pivot, place)
    hue_r = r
    hue_g = g
    hue_b = b
    if (jitter.shift != 0) & (jitter.hue_at < end):
        r, g, b = _shift_hue(r, g, b, jitter.shift)
    for place in range(jitter.hue_at + 1, end):
        r, g, b, kept = _blend(r, g, b, kept, jitter, pivot, place)
    return r, g, b, hue_r, hue_g, hue_b, kept


@triton.jit
def jitter_vjp(gr, gg, gb, hue_r, hue_g, hue_b, kept, jitter, share, start, STRAIGHT: tl.constexpr):
    """Gradient of the input of the op at place `start` from the gradient of the last op's result.

    `share` is the gradient of the contrast's mean luminance with respect to one pixel's luminance.
    """
    for step in range(0, jitter.end - tl.maximum(jitter.hue_at + 1, start)):
        gr, gg, gb = _blend_vjp(gr, gg, gb, kept, jitter, share, jitter.end - 1 - step, STRAIGHT)
    if (jitter.shift != 0) & (jitter.hue_at < jitter.end) & (jitter.hue_at >= start):
        gr, gg, gb = _shift_hue_vjp(gr, gg, gb, hue_r, hue_g, hue_b, jitter.shift)
    for step in range(0, tl.minimum(jitter.hue_at, jitter.end) - start):
        gr, gg, gb = _blend_vjp(gr, gg, gb, kept, jitter, share, jitter.hue_at - 1 - step, STRAIGHT)
    return gr, gg, gb


@triton.jit
def masked_grad(gr, gg, gb, kept, place, STRAIGHT: tl.constexpr):
    """The gradient that passes the clamp of the blend at `place`."""
    if not STRAIGHT:
        bits = kept >> (3 * place)
        gr = tl.where((bits & 1) != 0, gr, 0.0)
        gg = tl.where((bits & 2) != 0, gg, 0.0)
        gb = tl.where((bits & 4) != 0, gb, 0.0)
    return gr, gg, gb


@triton.jit
def _blend(r, g, b, kept, jitter, pivot, place):
    """clamp(f x + (1 - f) pivot): the pivot is black, the view's mean luminance or the pixel's."""
    op = tl.load(jitter.order + place)
    factor = tl.load(jitter.factors + op).to(r.dtype)
    if factor != 1:
        rest = 1 - factor
        to_gray = tl.where(op == SATURATION, rest, 0.0)
        base = tl.where(op == CONTRAST, rest * pivot, 0.0) + to_gray * luminance(r, g, b)
        r, kept = _clamp(factor * r + base, kept, 1 << (3 * place))
        g, kept = _clamp(factor * g + base, kept, 2 << (3 * place))
        b, kept = _clamp(factor * b + base, kept, 4 << (3 * place))
    return r, g, b, kept


@triton.jit
def _clamp(x, kept, bit):
    # Comparisons rather than min and max, which drop NaN.
    bounded = tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))
    return bounded, kept | tl.where((x > tie(x)) & (x < 1 - tie(x)), bit, 0)


@triton.jit
def _blend_vjp(gr, gg, gb, kept, jitter, share, place, STRAIGHT: tl.constexpr):
    op = tl.load(jitter.order + place)
    factor = tl.load(jitter.factors + op).to(gr.dtype)
    if factor != 1:
        gr, gg, gb = masked_grad(gr, gg, gb, kept, place, STRAIGHT)
        to_gray = tl.where(op == SATURATION, 1 - factor, 0.0)
        gray = to_gray * (gr + gg + gb) + tl.where(op == CONTRAST, share, 0.0)
        gr = factor * gr + 0.2989 * gray
        gg = factor * gg + 0.587 * gray
        gb = factor * gb + 0.114 * gray
    return gr, gg, gb


@triton.jit
def _hue(r, g, b):
    """HSV's largest channel, spread, hue in sixths of a turn from that channel's, and masks of the extreme channels.

    Where channels tie the first counts. A gray pixel has hue 0.
    """
    is_r = (r >= g - tie(r)) & (r >= b - tie(r))
    is_g = (g >= b - tie(r)) & ~is_r
    high = tl.where(is_r, r, tl.where(is_g, g, b))
    low_r = (r <= g + tie(r)) & (r <= b + tie(r))
    low_g = (g <= b + tie(r)) & ~low_r
    spread = high - tl.where(low_r, r, tl.where(low_g, g, b))
    # A quotient for every spread, so that NaN stays NaN.
    sixths = tl.where(is_r, g - b, tl.where(is_g, b - r, r - g)) / tl.where(spread <= tie(r), float("inf"), spread)
    return high, spread, sixths, is_r, is_g, low_r, low_g


@triton.jit
def _ramp(sixths, is_r, is_g, shift, n: tl.constexpr):
    """Place of a channel (n = 5, 3, 1 for R, G, B) on the hue circle in [0, 6), and 2 - its distance from 2.

    Clamped to [0, 1], the latter is the share of the spread that the channel lies below the largest.
    """
    place = sixths + tl.where(is_r, 0.0, tl.where(is_g, 2.0, 4.0)) + 6 * shift + n
    place -= 6 * tl.floor(place * (1 / 6))
    return place, 2 - tl.abs(place - 2)


@triton.jit
def _unit(x):
    return tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))


@triton.jit
def _shift_hue(r, g, b, shift):
    high, spread, sixths, is_r, is_g, _, _ = _hue(r, g, b)
    _, v = _ramp(sixths, is_r, is_g, shift, 5)
    r = high - spread * _unit(v)
    _, v = _ramp(sixths, is_r, is_g, shift, 3)
    g = high - spread * _unit(v)
    _, v = _ramp(sixths, is_r, is_g, shift, 1)
    b = high - spread * _unit(v)
    return r, g, b


@triton.jit
def _shift_hue_vjp(gr, gg, gb, r, g, b, shift):
    high, spread, sixths, is_r, is_g, low_r, low_g = _hue(r, g, b)
    near = tie(r, 64) + tie(r) / tl.where(spread == 0, 1.0, spread)
    along, turning = _channel_vjp(gr, sixths, is_r, is_g, shift, near, 5)
    along_g, turning_g = _channel_vjp(gg, sixths, is_r, is_g, shift, near, 3)
    along_b, turning_b = _channel_vjp(gb, sixths, is_r, is_g, shift, near, 1)
    along += along_g + along_b
    # A gray pixel's hue does not move.
    turning = tl.where(spread > tie(r), turning + turning_g + turning_b, 0.0)
    to_spread = turning * sixths - along
    to_high = gr + gg + gb + to_spread
    is_b = ~(is_r | is_g)
    low_b = ~(low_r | low_g)
    gr = tl.where(is_r, to_high, tl.where(is_g, turning, -turning)) - tl.where(low_r, to_spread, 0.0)
    gg = tl.where(is_g, to_high, tl.where(is_b, turning, -turning)) - tl.where(low_g, to_spread, 0.0)
    gb = tl.where(is_b, to_high, tl.where(is_r, turning, -turning)) - tl.where(low_b, to_spread, 0.0)
    return gr, gg, gb


@triton.jit
def _channel_vjp(g, sixths, is_r, is_g, shift, near, n: tl.constexpr):
    """A channel's gradient times its share of the spread, and times the share's derivative by the hue.

    There is none within `near` of the ends of the share's ramps.
    """
    place, v = _ramp(sixths, is_r, is_g, shift, n)
    slope = tl.where(place < 2, g, -g)
    return g * _unit(v), tl.where((v > near) & (v < 1 - near), slope, 0.0)
