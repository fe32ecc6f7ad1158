"""What VISSL's evaluations share: crops, the order of images, learning rates in steps."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from copgen_fast.images.stream import shuffled
from copgen_fast.images.views import Centre, RandomCrop, Squash, View
from copgen_fast.runtime import seeds


def train_view(size: int, crop: bool, *key: seeds.Key) -> RandomCrop:
    """A random crop of 8 to 100 % of the area, or the whole image resized to a square; mirrored by chance.

    Args:
        key: seeds what is drawn; give every epoch its own.
    """
    return RandomCrop(size, key, crop=crop)


def test_view(size: int, crop: bool) -> View:
    """The centre of an image whose shorter side is 8/7 as long (256 for 224), or the whole one as a square."""
    return Centre(size, round(size * 8 / 7), "bilinear") if crop else Squash(size)


def epoch_order(rows: Tensor, batch: int, drop_last: bool, *key: seeds.Key) -> Iterator[Tensor]:
    """The rows in random order, in batches."""
    chosen = shuffled(len(rows), batch, seeds.generator(*key, "order"), drop_last)
    return (rows[places] for places in chosen)


def stepped(lr: float, batch: int, milestones: tuple[int, ...], epoch: int) -> float:
    """Learning rate of an epoch, counted from 0: lr x batch / 256, a tenth from each milestone on."""
    return lr * batch / 256 * 0.1 ** sum(epoch >= milestone for milestone in milestones)
