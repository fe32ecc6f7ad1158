"""Real images as pairs for pretraining: each is its own positive, as in SimCLR."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from copgen_fast.errors import CorruptItemError
from copgen_fast.images.split import ArraySplit, Split, UnreadableImageError
from copgen_fast.images.store import PackedSplit
from copgen_fast.images.views import View


class RealPairs(Dataset):
    """The images of a split, each decoded when it is read.

    Args:
        view: what is taken of each image.
        labelled: whether labels are returned, too, for a supervised loss.

    Attributes:
        in_memory: whether the images lie in memory already, so that no loader need keep them.
    """

    skip_option = "--data.on-corrupt"

    def __init__(self, split: Split, view: View, labelled: bool = False) -> None:
        self.split, self.view = split, view
        # Where an array's labels were not requested there are none; files always tell theirs as they are read.
        self.labelled = labelled and (split.labels is not None or not isinstance(split, ArraySplit))
        self.in_memory = isinstance(split, ArraySplit)
        if isinstance(split, PackedSplit):  # by which processes share the comparison of shards with their digests
            self.checks, self.shard_of = split.checks, split.shard_of

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
