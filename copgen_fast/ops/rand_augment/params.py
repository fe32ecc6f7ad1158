"""RandAugment's policy, and the random operations of a batch that are drawn from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real

import torch
from torch import Tensor

from copgen_fast.ops.checks import as_count, expect_tensor

# The operations of InfoMin's RandAugment; an operation's number is its place here.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
NONE = -1
"""The number of no operation."""
FILL = (124, 116, 104)
"""What an affine operation shows beyond the image's border: ImageNet's mean, in levels."""
_MOST = 10.0

# The argument of an operation of magnitude m in [0, 10]; of those in AFFINE, with a random sign.
_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "Rotate": lambda m: 3 * m,  # degrees
    "Posterize": lambda m: (m / _MOST * 4).floor(),  # bits kept
    "Solarize": lambda m: (m / _MOST * 256).floor(),  # level from which a channel is inverted
    "SolarizeAdd": lambda m: (m / _MOST * 110).floor(),  # levels added to channels below 128
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), lambda m: m / _MOST * 1.8 + 0.1),
    **dict.fromkeys(("ShearX", "ShearY"), lambda m: 0.03 * m),
    **dict.fromkeys(("TranslateX", "TranslateY"), lambda m: 0.045 * m),  # share of the side
}


@dataclass(frozen=True, kw_only=True)
class RandAugmentPolicy:
    """Which operations RandAugment draws, how many and how strong; the defaults are InfoMin's.

    Attributes:
        steps: operations drawn for each view, one after the other, with replacement.
        probability: that a drawn operation is applied.
        magnitude, magnitude_std: mean and standard deviation of an operation's magnitude, clipped to [0, 10].
        operations: names from `OPERATIONS`, equally likely.

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    steps: int = 2
    probability: float = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.5
    operations: tuple[str, ...] = OPERATIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", as_count("steps", self.steps, lowest=1))
        for name, highest in (("probability", 1.0), ("magnitude", _MOST), ("magnitude_std", 1e6)):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= highest:
                raise ValueError(f"{name}: expected a number from 0 to {highest:g}, got {value!r}")
        if not self.operations or set(self.operations) - set(OPERATIONS):
            raise ValueError(f"operations: expected some of {', '.join(OPERATIONS)}, got {self.operations}")


@dataclass(frozen=True, eq=False)
class RandAugmentParams:
    """Random operations of N views, K one after the other: plain tensors on one device.

    Attributes:
        operation: int64 [N, K], numbers of `OPERATIONS`, or `NONE`.
        argument: float32 [N, K]: degrees counter-clockwise (Rotate), bits kept (Posterize), a level (Solarize), levels
            to add (SolarizeAdd), a factor (Color, Contrast, Brightness, Sharpness), a slope (Shear), a share of the
            side (Translate); 0 for the others.
        cubic: bool [N, K], whether an affine operation interpolates with a cubic kernel instead of a linear one.

    Raises:
        TypeError, ValueError: a tensor of another dtype or shape; the message names it.
    """

    operation: Tensor
    argument: Tensor
    cubic: Tensor

    def __post_init__(self) -> None:
        expect_tensor("operation", self.operation, ("N", "K"), (torch.int64,))
        shape = tuple(self.operation.shape)
        expect_tensor("argument", self.argument, shape, (torch.float32,))
        expect_tensor("cubic", self.cubic, shape, (torch.bool,))

    @classmethod
    def from_uniform(cls, uniform: Tensor, policy: RandAugmentPolicy) -> RandAugmentParams:
        """Parameters from uniform numbers in [0, 1), float64 [N, 5 K], K = policy.steps."""
        which, applied, strength, sign, kernel = uniform.unflatten(1, (policy.steps, 5)).unbind(2)
        numbers = [OPERATIONS.index(name) for name in policy.operations]
        chosen = (which * len(numbers)).long()
        operation = sum((chosen == i) * number for i, number in enumerate(numbers))
        magnitude = policy.magnitude
        if policy.magnitude_std:
            magnitude = magnitude + policy.magnitude_std * torch.special.ndtri(strength)
        magnitude = torch.zeros_like(strength).add(magnitude).clamp(0, _MOST)
        argument = torch.zeros_like(magnitude)
        for name, of in _ARGUMENTS.items():
            value = of(magnitude)
            if name in AFFINE:
                value = torch.where(sign < 0.5, -value, value)
            argument = torch.where(operation == OPERATIONS.index(name), value, argument)
        operation = torch.where(applied < policy.probability, operation, NONE)
        return cls(operation, argument.float(), kernel < 0.5)

    @classmethod
    def cat(cls, parts: Sequence[RandAugmentParams]) -> RandAugmentParams:
        """Concatenate the parameters of several batches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def map(self, change: Callable[[Tensor], Tensor]) -> RandAugmentParams:
        """A copy with `change` applied to every tensor."""
        return RandAugmentParams(*(change(getattr(self, field.name)) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.operation)


def matrices(params: RandAugmentParams, height: int, width: int) -> Tensor:
    """Where affine operations take their pixels from, float64 [N, K, 6].

    Output pixel (x, y) shows the image at (a x + b y + c, d x + e y + f), coordinates of pixel centres being 1/2, 3/2,
    ...; the identity for other operations. Pillow's rotation is about the centre, its shears about the corner.
    """
    operation, argument = params.operation, params.argument.double()

    def of(name: str) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), argument, 0)

    angle = -of("Rotate") * (math.pi / 180)
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    a, b, c = cos, sin + of("ShearX"), x - cos * x - sin * y + width * of("TranslateX")
    d, e, f = of("ShearY") - sin, cos, y + sin * x - cos * y + height * of("TranslateY")
    return torch.stack([a, b, c, d, e, f], dim=2)
