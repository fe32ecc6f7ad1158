"""Named augmentation policies, as data, and the views they make of a batch of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.profiler import record_function

from copgen_fast.errors import UsageError
from copgen_fast.ops import AugmentParams, AugmentPolicy, RandAugmentPolicy, augment

_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "gray": 0.2}


def simclr_paper(strength: float) -> AugmentPolicy:
    """SimCLR's own policy at a colour strength (arXiv:2002.05709, appendix A; 1 for ImageNet, 0.5 for CIFAR-10)."""
    return AugmentPolicy(
        crop_scale=(0.08, 1.0),
        flip=0.5,
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        jitter=0.8,
        gray=0.2,
        blur=0.5,
    )


_INFOMIN = replace(simclr_paper(1.0), crop_scale=(0.2, 1.0))

# The first four are the reference implementation's (navigator and pretraining); no-color also trains its probes.
POLICIES: dict[str, AugmentPolicy] = {
    "simclr": AugmentPolicy(crop_scale=(0.2, 1.0), flip=0.5, **_JITTER),
    "no-color": AugmentPolicy(crop_scale=(0.2, 1.0), flip=0.5),
    "no-crop": AugmentPolicy(flip=0.5, **_JITTER),
    "none": AugmentPolicy(),
    "simclr-paper": simclr_paper(1.0),
    # "What makes for good views" (arXiv:2005.10243, section 4.3); its jigsaw branch is an option of the methods.
    # Without RandAugment: infomin-basic.
    "infomin": replace(_INFOMIN, rand_augment=RandAugmentPolicy()),
    "infomin-basic": _INFOMIN,
    # The second of BYOL's two policies, the one that solarises (arXiv:2006.07733, appendix B).
    "byol": AugmentPolicy(
        crop_scale=(0.08, 1.0),
        flip=0.5,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter=0.8,
        gray=0.2,
        blur=0.1,
        solarize=0.2,
    ),
    # Small grey scans: a mirrored digit is another sign, and there is no colour to change.
    "digits": AugmentPolicy(
        crop_scale=(0.4, 1.0),
        brightness=0.4,
        contrast=0.4,
        jitter=0.8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}


def get(name: str) -> AugmentPolicy:
    """The policy called `name`.

    Raises:
        UsageError: no such policy; the message lists those there are.
    """
    if name not in POLICIES:
        raise UsageError(f"unknown augmentation {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name]


@record_function("augment")
def make_views(
    images: Tensor,
    params: AugmentParams,
    policy: AugmentPolicy,
    check_range: bool | None = None,
    out_size: int | None = None,
) -> Tensor:
    """One augmented, normalised view of every image, by parameters drawn from `policy`. Draws nothing.

    Args:
        images: [N, 3, H, W], uint8 or floating in [0, 1]; the views are differentiable with respect to them.
        params: N rows, on the images' device.
        check_range: as `augment` takes it.
        out_size: side of the views; None: they are as large as the images.

    Returns:
        [N, 3, h, w], channels last; float32, or float64 where the images are.
    """
    size = (images.shape[2], images.shape[3]) if out_size is None else (out_size, out_size)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    form = {"memory_format": torch.channels_last, "out_dtype": dtype, "check_range": check_range}
    return augment(images, params, size, mean=policy.mean, std=policy.std, **form)


def random_views(images: Tensor, policy: AugmentPolicy, generator: torch.Generator) -> Tensor:
    """`make_views` with parameters from `generator`, each image its own; a CPU one gives every device the same."""
    params = AugmentParams.sample(len(images), (images.shape[2], images.shape[3]), policy, generator=generator)
    return make_views(images, params.to(images.device), policy)


CELLS = 3
"""Pieces of a jigsaw view, along each side."""


@dataclass(frozen=True, eq=False)
class JigsawParams:
    """Random parameters of N jigsaw views: plain tensors on one device.

    Attributes:
        crop: of the views before they are cut.
        place: float32 [N, 9, 2], where in its cell a piece is taken, from 0 (top, left) to below 1.
        order: int64 [N, 9], the piece that each place of the result gets.
    """

    crop: AugmentParams
    place: Tensor
    order: Tensor

    @classmethod
    def sample(
        cls, batch: int, image_size: tuple[int, int], policy: AugmentPolicy, generator: torch.Generator
    ) -> JigsawParams:
        """Draw for `batch` images of `image_size` (H, W): crops of 60 to 100 % of them, flipped as `policy` says."""
        crop = AugmentParams.sample(
            batch, image_size, AugmentPolicy(crop_scale=(0.6, 1.0), flip=policy.flip), generator=generator
        )
        place, order = torch.rand(2, batch, CELLS**2, 2, generator=generator)
        return cls(crop, place, order[:, :, 0].argsort(1))

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.order.device

    def __getitem__(self, rows: slice) -> JigsawParams:
        """Parameters of some of the views."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> JigsawParams:
        """A copy with `change` applied to every tensor."""
        return JigsawParams(self.crop.map(change), change(self.place), change(self.order))


def piece_size(height: int, width: int) -> tuple[int, int]:
    """Size of a jigsaw view's pieces: 64 of the 85 pixels of each cell where the image has 255, as published."""
    return tuple(max(1, round(64 / 85 * (side // CELLS))) for side in (height, width))


@record_function("augment")
def jigsaw_views(images: Tensor, params: JigsawParams, policy: AugmentPolicy) -> Tensor:
    """Nine shuffled pieces of every image, normalised, for InfoMin's jigsaw branch (arXiv:2005.10243).

    The crop is divided into 3 x 3 cells, and a piece of three quarters of a cell is taken at random in each, so that
    edges don't tell which pieces were neighbours.

    Args:
        images: [N, 3, H, W], uint8 or floating in [0, 1], H and W 3 or more.
        policy: whose mean and standard deviation normalise.

    Returns:
        [N, 3, H, W], channels last: pieces of `piece_size` at the top left of the cells, zeros around them.
    """
    cropped = make_views(images, params.crop, policy)
    height, width = images.shape[2:]
    cell, piece = (height // CELLS, width // CELLS), piece_size(height, width)
    number = torch.arange(CELLS**2, device=images.device)
    row = torch.arange(len(images), device=images.device)[:, None, None, None]
    views, taken, given = torch.zeros_like(cropped), [], []
    for axis in range(2):
        corner = (number // CELLS, number % CELLS)[axis] * cell[axis]
        offset = corner + (params.place[..., axis] * (cell[axis] - piece[axis] + 1)).long()
        along = torch.arange(piece[axis], device=images.device)
        taken.append(offset.gather(1, params.order)[..., None] + along)
        given.append((corner[:, None] + along).expand(len(images), -1, -1))
    (y, x), (to_y, to_x) = ((rows[:, :, :, None], columns[:, :, None, :]) for rows, columns in (taken, given))
    views[row, :, to_y, to_x] = cropped[row, :, y, x]
    return views


def jigsaw_pieces(views: Tensor) -> Tensor:
    """The pieces of jigsaw views [N, 3, H, W], in their order: [9 N, 3, h, w], those of an image one after another."""
    height, width = views.shape[2:]
    cells = views[:, :, : height // CELLS * CELLS, : width // CELLS * CELLS]
    cells = cells.unflatten(3, (CELLS, -1)).unflatten(2, (CELLS, -1))
    h, w = piece_size(height, width)
    return (
        cells[:, :, :, :h, :, :w].permute(0, 2, 4, 1, 3, 5).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    )
