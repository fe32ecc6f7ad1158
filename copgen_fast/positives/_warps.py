"""Transformations that walks imitate: their ranges, amounts drawn from them, and images transformed by all at once.

As in GenRep (Jahanian et al. 2022), in this order: colour, perspective rotation, rotation, zoom, shift. The geometric
ones are composed to one homography a sample, so that images are interpolated once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.config import SteeringConfig
from copgen_fast.errors import UsageError

COLOURS = ("red", "green", "blue")
NAMES = ("zoom", "shift_x", "shift_y", "rotate", "perspective", *COLOURS, "brightness")
PIXEL = 1 / 256
"""GenRep's ranges are in pixels of images with 256 a side."""
TOLERANCE = 1e-3  # of a pixel, for the rounding of coordinates at the image's border

Limits = dict[str, float]
"""How far each transformation goes, in the order of `NAMES`; see `SteeringConfig.limits` for the units."""

_TURNS = {"rotate": 30.0, "perspective": 60.0}
_COLOURS = dict.fromkeys((*COLOURS, "brightness"), 0.5)
RANGES: dict[str, Limits] = {
    "photographs": {"zoom": 4.0, "shift_x": 100 * PIXEL, "shift_y": 100 * PIXEL, **_TURNS, **_COLOURS},
    "digits": {"zoom": 2.0, "shift_x": 0.15, "shift_y": 0.15, **_TURNS, **_COLOURS},
}
DEFAULT: dict[str, tuple[str, ...]] = {
    "photographs": tuple(name for name in NAMES if name != "brightness"),
    "digits": ("zoom", "shift_x", "shift_y", "rotate", "brightness"),
}


def limits_of(config: SteeringConfig) -> Limits:
    """The transformations of a configuration, and how far each goes.

    Raises:
        UsageError: no such transformation, or one twice; a limit of another form, of none of them, or out of range.
    """
    for name in config.transformations:
        if name not in NAMES or config.transformations.count(name) > 1:
            known = ", ".join(NAMES)
            raise UsageError(f"steering.transformations: unknown or repeated {name!r}: choose from {known}, each once")
    chosen = config.transformations or DEFAULT[config.ranges]
    found = {name: limit for name, limit in RANGES[config.ranges].items() if name in chosen}
    for word in config.limits:
        name, _, text = word.partition("=")
        if name not in found:
            raise UsageError(f"steering.limits: {word!r}: write NAME=LIMIT, NAME one of {', '.join(found)}")
        try:
            found[name] = float(text)
        except ValueError:
            raise UsageError(f"steering.limits: {name}: expected a number, got {text!r}") from None
        low, high = {"zoom": (1, 100), "rotate": (0, 180), "perspective": (0, 80)}.get(name, (0, 2))
        if not low < found[name] <= high:
            raise UsageError(f"steering.limits: {name}: expected more than {low} and at most {high}, got {text}")
    return found


def words(limits: Limits) -> str:
    """Limits as one text, for the record of walks."""
    return " ".join(f"{name}={limit:g}" for name, limit in limits.items())


def amounts(uniform: Tensor, limits: Limits) -> Tensor:
    """Amounts [N, S] of S transformations, from numbers [N, len(NAMES)] uniform in [0, 1).

    Each transformation has its column, so that leaving one out does not change the others. A zoom is as often
    in as out, and uniform on each side; the others are uniform between -limit and limit.
    """
    found = []
    for name, limit in limits.items():
        u = uniform[:, NAMES.index(name)]
        out = 1 + (limit - 1) * (2 * u - 1)
        into = 1 / limit + (1 - 1 / limit) * 2 * u
        found.append(torch.where(u < 0.5, into, out) if name == "zoom" else limit * (2 * u - 1))
    return torch.stack(found, dim=1)


def between(name: str, limit: float, count: int) -> Tensor:
    """`count` amounts [count] from one end of a transformation's range to the other, at even step sizes."""
    even = torch.linspace(-1, 1, count, dtype=torch.float64)
    return limit**even if name == "zoom" else limit * even


def steps(amount: Tensor, limits: Limits) -> Tensor:
    """Step sizes alpha [N, S] of the walks: ln of zooms, colours as they are, others in units of their limit."""
    columns = zip(amount.unbind(1), limits.items(), strict=True)
    return torch.stack([_step(values, name, limit) for values, (name, limit) in columns], dim=1)


def _step(values: Tensor, name: str, limit: float) -> Tensor:
    if name == "zoom":
        return values.log()
    return values if name in _COLOURS else values / limit


def homographies(amount: Tensor, limits: Limits, size: tuple[int, int]) -> Tensor:
    """Matrices [N, 3, 3] from pixels of the transformed image to those of the original, counted from the centre.

    Args:
        amount: [N, S] of the transformations in `limits`.
        size: height and width.
    """
    height, width = size
    given = dict(zip(limits, amount.unbind(1), strict=True))
    zero, one = torch.zeros_like(amount[:, 0]), torch.ones_like(amount[:, 0])
    shift_x, shift_y = width * given.get("shift_x", zero), height * given.get("shift_y", zero)
    zoom, degrees, turn = given.get("zoom", one), given.get("rotate", zero), given.get("perspective", zero)
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    # A camera at the distance f of an image that turns about its vertical axis, and moves as it turns.
    f = (height**2 + width**2) ** 0.5
    away, aside = turn.deg2rad(), -turn / 5 * width * PIXEL
    shift = _matrix((one, zero, shift_x), (zero, one, shift_y), (zero, zero, one))
    scale = _matrix((1 / zoom, zero, zero), (zero, 1 / zoom, zero), (zero, zero, one))
    rotate = _matrix((cos, sin, zero), (-sin, cos, zero), (zero, zero, one))  # counter-clockwise, as y points down
    perspective = _matrix((away.cos(), zero, aside), (zero, one, zero), (away.sin() / f, zero, one))
    return torch.linalg.inv(shift @ scale @ rotate @ perspective)


def _matrix(*rows: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def colours(amount: Tensor, limits: Limits) -> Tensor:
    """What is added to the three channels, [N, 3]."""
    given = dict(zip(limits, amount.unbind(1), strict=True))
    zero = torch.zeros_like(amount[:, 0])
    return torch.stack([given.get(name, zero) for name in COLOURS], 1) + given.get("brightness", zero)[:, None]


def transform(images: Tensor, inverse: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] transformed, and the mask [N, 1, H, W] of pixels that come from within the image, 1 or 0.

    Bilinear, without antialiasing, as published. Pixels outside the mask are 0.

    Args:
        inverse: `homographies` [N, 3, 3] of the images' dtype.
        colour: `colours` [N, 3].
    """
    height, width = images.shape[2:]
    options = {"dtype": images.dtype, "device": images.device}
    x = torch.arange(width, **options) - (width - 1) / 2
    y = torch.arange(height, **options) - (height - 1) / 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    u, v, depth = (inverse @ points).unflatten(2, (height, width)).unbind(1)
    u, v = u / depth, v / depth
    within = (u.abs() <= (width - 1) / 2 + TOLERANCE) & (v.abs() <= (height - 1) / 2 + TOLERANCE) & (depth > 0)
    mask = within[:, None].to(images.dtype)
    grid = torch.stack([u * (2 / width), v * (2 / height)], dim=3)
    warped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (warped + colour[:, :, None, None]) * mask, mask
