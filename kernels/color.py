"""Triton functions of the colour jitter and its gradient, shared by the augmentation's kernels.

A pixel is three tensors r, g, b in [0, 1]. Branches depend on the view alone. What a view's jitter needs is computed
once a program: each of the three blends has a slot, in their order, and the hue a place among them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(op) for op in range(4))


class Drawn(NamedTuple):
    """Parameters of AugmentParams, in the order of the operators: pointers to tensors of one row a view."""

    crop: object
    flip: object
    order: object
    factors: object
    jitter: object
    gray: object
    solarize: object


class Jitter(NamedTuple):
    """The colour jitter of one view: the ops that change nothing are neutral, as all are without jitter."""

    active: object
    factors: object  # of the three blends, in their order
    to_gray: object  # of each blend: 1 - its factor where it is the saturation, else 0
    hue_at: object  # the blends before the hue
    contrast_at: object  # the contrast's slot
    contrast: object  # 1 - its factor
    turned: object  # whether the hue is shifted
    places: object  # of red, green and blue on the hue circle after the shift, in sixths of a turn in [-3, 3)


@triton.jit
def load_jitter(drawn, view, COMPUTE: tl.constexpr):
    """Jitter of `view`, and whether its order is a permutation."""
    order = drawn.order + 4 * view
    every = tl.load(order)
    seen = 0
    hue_at = 0
    contrast_at = 0
    for place in tl.static_range(4):
        op = tl.load(order + place)
        every |= op
        op = op.to(tl.int32) & 3
        seen |= 1 << op
        hue_at += tl.where(op == HUE, place, 0)
        contrast_at += tl.where(op == CONTRAST, place, 0)
    valid = (every >= 0) & (every <= 3) & (seen == 15)
    active = tl.load(drawn.jitter + view) & valid
    factor_0, gray_0 = _slot(drawn, view, hue_at, active, 0, COMPUTE)
    factor_1, gray_1 = _slot(drawn, view, hue_at, active, 1, COMPUTE)
    factor_2, gray_2 = _slot(drawn, view, hue_at, active, 2, COMPUTE)
    contrast_at -= tl.where(hue_at < contrast_at, 1, 0)
    contrast = tl.where(active, 1 - tl.load(drawn.factors + 4 * view + CONTRAST).to(COMPUTE), 0.0)
    shift = tl.load(drawn.factors + 4 * view + HUE).to(COMPUTE)
    shift -= tl.floor(shift)
    places = (_wrapped(6 * shift), _wrapped(6 * shift + 2), _wrapped(6 * shift - 2))
    factors, to_gray = (factor_0, factor_1, factor_2), (gray_0, gray_1, gray_2)
    return Jitter(active, factors, to_gray, hue_at, contrast_at, contrast, active & (shift != 0), places), valid


@triton.jit
def _slot(drawn, view, hue_at, active, SLOT: tl.constexpr, COMPUTE: tl.constexpr):
    """Factor of a blend, and its share of the pixel's luminance."""
    op = tl.load(drawn.order + 4 * view + SLOT + tl.where(hue_at <= SLOT, 1, 0)).to(tl.int32) & 3
    factor = tl.where(active, tl.load(drawn.factors + 4 * view + op).to(COMPUTE), 1.0)
    return factor, tl.where(op == SATURATION, 1 - factor, 0.0)


@triton.jit
def _wrapped(place):
    return place - 6 * tl.floor((place + 3) * (1 / 6))


@triton.jit
def tie(x, ROUNDINGS: tl.constexpr = 8):
    """Values nearer to a threshold than this are at it, so that rounding does not decide; see the reference."""
    return ROUNDINGS * (2.0**-52 if x.dtype == tl.float64 else 2.0**-23)


@triton.jit
def luminance(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def before_contrast(jitter):
    """The jitter up to its contrast."""
    at = jitter.contrast_at
    factor_0 = tl.where(at > 0, jitter.factors[0], 1.0)
    factor_1 = tl.where(at > 1, jitter.factors[1], 1.0)
    factors = (factor_0, factor_1, tl.where(at > 2, jitter.factors[2], 1.0))
    turned = jitter.turned & (jitter.hue_at <= at)
    return Jitter(jitter.active, factors, jitter.to_gray, jitter.hue_at, at, jitter.contrast, turned, jitter.places)


@triton.jit
def poison(r, g, b, jitter):
    """0, or NaN where a jittered pixel has one: clamps and the hue's comparisons lose it, which saves instructions."""
    total = r + g + b
    return tl.where(jitter.active, total - total, 0.0)


@triton.jit
def apply_jitter(r, g, b, jitter, pivot):
    """The blends before the hue, the hue, the blends after it.

    Returns the pixel, the pixel before the hue, and the pixels after each blend that is not neutral.
    """
    after_0 = (r, g, b)
    after_1 = (r, g, b)
    after_2 = (r, g, b)
    if (jitter.factors[0] != 1) & (jitter.hue_at > 0):
        r, g, b = _blend(r, g, b, jitter, pivot, 0)
        after_0 = (r, g, b)
    if (jitter.factors[1] != 1) & (jitter.hue_at > 1):
        r, g, b = _blend(r, g, b, jitter, pivot, 1)
        after_1 = (r, g, b)
    if (jitter.factors[2] != 1) & (jitter.hue_at > 2):
        r, g, b = _blend(r, g, b, jitter, pivot, 2)
        after_2 = (r, g, b)
    before_hue = (r, g, b)
    if jitter.turned:
        r, g, b = _shift_hue(r, g, b, jitter.places)
    if (jitter.factors[0] != 1) & (jitter.hue_at <= 0):
        r, g, b = _blend(r, g, b, jitter, pivot, 0)
        after_0 = (r, g, b)
    if (jitter.factors[1] != 1) & (jitter.hue_at <= 1):
        r, g, b = _blend(r, g, b, jitter, pivot, 1)
        after_1 = (r, g, b)
    if (jitter.factors[2] != 1) & (jitter.hue_at <= 2):
        r, g, b = _blend(r, g, b, jitter, pivot, 2)
        after_2 = (r, g, b)
    return r, g, b, before_hue, (after_0, after_1, after_2)


@triton.jit
def _blend(r, g, b, jitter, pivot, SLOT: tl.constexpr):
    """clamp(f x + (1 - f) pivot): the pivot is black, the view's mean luminance or the pixel's."""
    factor = jitter.factors[SLOT]
    base = tl.zeros(r.shape, r.dtype) + tl.where(jitter.contrast_at == SLOT, jitter.contrast * pivot, 0.0)
    if jitter.to_gray[SLOT] != 0:
        base = jitter.to_gray[SLOT] * luminance(r, g, b)
    return _unit(factor * r + base), _unit(factor * g + base), _unit(factor * b + base)


@triton.jit
def _unit(x):
    return tl.clamp(x, 0.0, 1.0)


@triton.jit
def _shift_hue(r, g, b, places):
    """HSV's hue turned: a channel lies between the smallest and the largest by its distance on the hue circle.

    Where channels tie, all choices of the largest give the same.
    """
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    spread = high - low
    is_r = r == high
    is_g = g == high
    ahead = tl.where(is_r, g - b, tl.where(is_g, b - r, r - g))
    place = tl.where(is_r, places[0], tl.where(is_g, places[1], places[2]))
    # A gray pixel's spread of 0 divides 0.
    place += ahead * (1 / tl.maximum(spread, 1e-30))
    r = low + spread * _unit(tl.abs(tl.abs(place) - 3) - 1)
    g = low + spread * _unit(tl.abs(tl.abs(place - 2) - 3) - 1)
    b = low + spread * _unit(tl.abs(tl.abs(place + 2) - 3) - 1)
    return r, g, b


@triton.jit
def jitter_vjp(gr, gg, gb, before_hue, after, jitter, STRAIGHT: tl.constexpr):
    """Gradient of the jitter's pixels from that of its result, through all but the contrast's mean.

    Returns the gradient; what to add to it for each unit of gradient of the mean of all luminances, times the count;
    and the contrast's gradient, summed over the channels, whose sum over the view is the mean's but for a factor.
    """
    of_mean = (tl.zeros(gr.shape, gr.dtype), tl.zeros(gr.shape, gr.dtype), tl.zeros(gr.shape, gr.dtype))
    total = tl.zeros(gr.shape, gr.dtype)
    grad = (gr, gg, gb)
    if (jitter.factors[2] != 1) & (jitter.hue_at <= 2):
        grad, of_mean, total = _blend_vjp(grad, of_mean, total, after[2], jitter, 2, STRAIGHT)
    if (jitter.factors[1] != 1) & (jitter.hue_at <= 1):
        grad, of_mean, total = _blend_vjp(grad, of_mean, total, after[1], jitter, 1, STRAIGHT)
    if (jitter.factors[0] != 1) & (jitter.hue_at <= 0):
        grad, of_mean, total = _blend_vjp(grad, of_mean, total, after[0], jitter, 0, STRAIGHT)
    if jitter.turned:
        hue = _hue(before_hue[0], before_hue[1], before_hue[2], jitter.places)
        grad = _shift_hue_vjp(grad, hue)
        if (jitter.contrast != 0) & (jitter.contrast_at >= jitter.hue_at):
            of_mean = _shift_hue_vjp(of_mean, hue)
    if (jitter.factors[2] != 1) & (jitter.hue_at > 2):
        grad, of_mean, total = _blend_vjp(grad, of_mean, total, after[2], jitter, 2, STRAIGHT)
    if (jitter.factors[1] != 1) & (jitter.hue_at > 1):
        grad, of_mean, total = _blend_vjp(grad, of_mean, total, after[1], jitter, 1, STRAIGHT)
    if (jitter.factors[0] != 1) & (jitter.hue_at > 0):
        grad, of_mean, total = _blend_vjp(grad, of_mean, total, after[0], jitter, 0, STRAIGHT)
    return grad, of_mean, total


@triton.jit
def _blend_vjp(grad, of_mean, total, after, jitter, SLOT: tl.constexpr, STRAIGHT: tl.constexpr):
    factor = jitter.factors[SLOT]
    to_gray = jitter.to_gray[SLOT]
    grad = _masked(grad, after, STRAIGHT)
    added = grad[0] + grad[1] + grad[2]
    if jitter.contrast_at == SLOT:
        total = added
        of_mean = (of_mean[0] * 0 + 0.2989, of_mean[1] * 0 + 0.587, of_mean[2] * 0 + 0.114)
    elif (jitter.contrast != 0) & (jitter.contrast_at > SLOT):
        of_mean = _masked(of_mean, after, STRAIGHT)
        of_mean = _blended(of_mean, factor, to_gray * (of_mean[0] + of_mean[1] + of_mean[2]))
    return _blended(grad, factor, to_gray * added), of_mean, total


@triton.jit
def _blended(grad, factor, gray):
    return factor * grad[0] + 0.2989 * gray, factor * grad[1] + 0.587 * gray, factor * grad[2] + 0.114 * gray


@triton.jit
def _masked(grad, after, STRAIGHT: tl.constexpr):
    """The gradient that passes the clamp whose result is `after`."""
    if STRAIGHT:
        return grad
    else:
        return _inside(after[0], grad[0]), _inside(after[1], grad[1]), _inside(after[2], grad[2])


@triton.jit
def _inside(x, grad):
    return tl.where(tl.abs(x - 0.5) < 0.5 - tie(x), grad, 0.0)


@triton.jit
def _hue(r, g, b, places):
    """The hue's linear part at a pixel, as numbers: masks of 0 and 1 take fewer instructions than branches.

    Where channels tie the first counts, and a gray pixel has hue 0. Returns the lead of the largest channel in sixths
    of a turn; masks of the largest and of the smallest; the lead's derivative by each channel, times the spread; and
    each channel's share of the spread below the largest, and its slope.
    """
    high = tl.maximum(g, b)
    low = tl.minimum(g, b)
    is_r = tl.where(r >= high - tie(r), 1.0, 0.0).to(r.dtype)
    is_g = tl.where(g >= b - tie(r), 1 - is_r, 0.0)
    is_b = 1 - is_r - is_g
    low_r = tl.where(r <= low + tie(r), 1.0, 0.0).to(r.dtype)
    low_g = tl.where(g <= b + tie(r), 1 - low_r, 0.0)
    spread = tl.maximum(r, high) - tl.minimum(r, low)
    coloured = spread > tie(r)
    inverse = 1 / tl.where(coloured, spread, float("inf"))
    along_r = is_b - is_g
    along_g = is_r - is_b
    along_b = is_g - is_r
    lead = (r * along_r + g * along_g + b * along_b) * inverse
    place = lead + (is_r * places[0] + is_g * places[1] + is_b * places[2])
    # No slope is as near to the ends of a ramp as rounding may reach, and none of a gray pixel's: its hue stays.
    reach = tl.where(coloured, 0.5 - tie(r, 64) - tie(r) * inverse, 0.0)
    largest = (is_r, is_g, is_b)
    smallest = (low_r, low_g, 1 - low_r - low_g)
    ramps = (_ramp(place, reach), _ramp(place - 2, reach), _ramp(place + 2, reach))
    return lead, largest, smallest, (along_r, along_g, along_b), ramps


@triton.jit
def _ramp(place, reach):
    from_far = tl.abs(place) - 3
    share = 2 - tl.abs(from_far)
    slope = tl.where(place * from_far < 0, 1.0, -1.0).to(place.dtype)
    return _unit(share), tl.where(tl.abs(share - 0.5) < reach, slope, 0.0)


@triton.jit
def _shift_hue_vjp(grad, hue):
    gr, gg, gb = grad
    lead, largest, smallest, along, ramps = hue
    turning = gr * ramps[0][1] + gg * ramps[1][1] + gb * ramps[2][1]
    to_spread = turning * lead - (gr * ramps[0][0] + gg * ramps[1][0] + gb * ramps[2][0])
    to_high = gr + gg + gb + to_spread
    gr = largest[0] * to_high - along[0] * turning - smallest[0] * to_spread
    gg = largest[1] * to_high - along[1] * turning - smallest[1] * to_spread
    gb = largest[2] * to_high - along[2] * turning - smallest[2] * to_spread
    return gr, gg, gb
