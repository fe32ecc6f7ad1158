"""Real images as pairs for pretraining: each is its own positive, as in SimCLR."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast.errors import CorruptItemError
from copgen_fast.images.codecs import CODECS, Encoded
from copgen_fast.images.split import ArraySplit, Split, UnreadableImageError
from copgen_fast.images.store import PackedSplit
from copgen_fast.images.views import Centre, View


class RealPairs(Dataset):
    """The images of a split, each decoded when it is read.

    Args:
        view: what is taken of each image.
        labelled: whether labels are returned, too, for a supervised loss.

    Attributes:
        in_memory: whether the images lie in memory already, so that no loader need keep them.
        small: whether one thread is known to read them in less time than two.
    """

    skip_option = "--data.on-corrupt"

    def __init__(self, split: Split, view: View, labelled: bool = False) -> None:
        self.split, self.view = split, view
        # Where an array's labels were not requested there are none; files always tell theirs as they are read.
        self.labelled = labelled and (split.labels is not None or not isinstance(split, ArraySplit))
        self.in_memory = isinstance(split, ArraySplit)
        self.small = getattr(split, "small", False)

    def __len__(self) -> int:
        return self.split.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """The same image twice, uint8 [3, S, S], and its label, or -1.

        Raises:
            CorruptItemError: it can't be decoded; the message names it.
        """
        try:
            image, label = self.split.read(index, self.view)
        except UnreadableImageError as error:
            raise CorruptItemError(error.fault.remedy) from error
        return image, image, label if self.labelled else -1


class PackedPairs(RealPairs):
    """The images of a packed split as identical pairs, which DALI can decode, too.

    Attributes:
        views: images of an item; its positive is the same as its anchor.
        checks: reads shards, by which processes share the comparison with their digests.
        image_shape: (3, S, S), of what `view` takes.
    """

    views = 1

    def __init__(self, split: PackedSplit, view: Centre, labelled: bool = False) -> None:
        super().__init__(split, view, labelled)
        self.checks, self.shard_of, self.codec = split.checks, split.shard_of, split.codec
        self.image_shape = 3, view.size, view.size

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all images when decoded."""
        return len(self) * int(np.prod(self.image_shape))

    def encoded(self, index: int, shard: bytes | None = None) -> Encoded:
        """An image as it is stored, of which `view` takes the part from `corner` on.

        One that has to be resized, as it was smaller than its store's size, is decoded and comes as `view` takes it,
        as raw images do, too: in PNG where others are encoded.

        Args:
            shard: images are read one by one, not from whole shards.

        Raises:
            CorruptItemError: it is of another size than the index says, or can't be decoded; the message names it.
        """
        corner = None if self.codec == "raw" else self.view.corner(self.split.shape(index))
        if corner is None:
            image, _, label = self[index]
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            return Encoded(index, (CODECS["raw" if self.codec == "raw" else "png"].encode(pixels),), label)
        data, where = self.split.file(index), self.split.where(index)
        CODECS[self.codec].expect_size(data, (3, *self.split.shape(index)), where)
        return Encoded(index, (data,), int(self.split.labels[index]) if self.labelled else -1, corner)


def real_pairs(split: Split, view: Centre, labelled: bool = False) -> RealPairs:
    """The images of a split as identical pairs: `PackedPairs` of a packed split, `RealPairs` of any other."""
    return (PackedPairs if isinstance(split, PackedSplit) else RealPairs)(split, view, labelled)
