"""Features of the pairs that an encoder was pretrained on, or of other ones, computed once for all evaluations."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from copgen_fast.config import RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.evals._frozen import EvalRun, FrozenEncoder
from copgen_fast.images.views import resize_and_crop
from copgen_fast.pairs.format import read_complete_index
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.registry import label
from copgen_fast.runtime import seeds


class PairFeatures(NamedTuple):
    """Features float32 [N, D] of anchors and of their positives, on the CPU."""

    anchors: Tensor
    positives: Tensor


_known: WeakKeyDictionary[FrozenEncoder, dict[Path, PairFeatures]] = WeakKeyDictionary()


def expect_pairs(name: str, folder: str | None, config: RunConfig) -> None:
    """Check, before any stage runs, that evaluation `name` will have pairs.

    Args:
        folder: as its options say.

    Raises:
        UsageError: the folder lacks pairs, or there is none and the run writes none.
    """
    if folder is not None:
        read_complete_index(Path(folder))
    elif config.pretrain.data != "pairs":
        raise _no_pairs(name, f"--pretrain.data {config.pretrain.data} writes none")


def pair_features(frozen: FrozenEncoder, name: str, folder: str | None, most: int, run: EvalRun) -> PairFeatures:
    """Features of `most` pairs drawn at random, or of all: of each anchor and its first positive.

    Images of another size are resized to `--data.image-size`, as photographs are.

    Args:
        name: of the evaluation, for the message.
        folder: of the pairs; None: of those that the encoder was pretrained on.

    Raises:
        UsageError: there are no pairs.
        CorruptArtifactError: a pair can't be decoded.
        NonFiniteError, Interrupted: as `FrozenEncoder.features`.
    """
    path = frozen.pairs if folder is None else Path(folder)
    if path is None:
        raise _no_pairs(name, "this encoder comes without")
    pairs = PairDataset(path, check=False)
    order = torch.randperm(len(pairs), generator=seeds.generator(run.config.seed, "pairs to evaluate"))[:most]
    known = _known.setdefault(frozen, {})
    if path not in known or len(known[path].anchors) < len(order):
        known[path] = _encode(frozen, pairs, order, run.config.data.image_size)
    return PairFeatures(*(features[: len(order)] for features in known[path]))


def _encode(frozen: FrozenEncoder, pairs: PairDataset, order: Tensor, size: int) -> PairFeatures:
    parts = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chosen in order.split(frozen.batch):
            anchors, positives, _ = zip(*pool.map(pairs.__getitem__, chosen.tolist()), strict=True)
            firsts = (positive if positive.ndim == 3 else positive[0] for positive in positives)
            images = torch.stack([*anchors, *firsts])
            if images.shape[2:] != (size, size):
                images = resize_and_crop(images, size)
            parts.append(frozen.features(images, f"pairs of {pairs.folder}").chunk(2))
    return PairFeatures(*map(torch.cat, zip(*parts, strict=True)))


def _no_pairs(name: str, why: str) -> UsageError:
    return UsageError(
        f"evaluation {name} needs pairs, and {why}: name a folder of them by --evals.options {label(name)}.folder=PATH"
    )
