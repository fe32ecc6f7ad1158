"""Seeds derived from keys: (seed, name, index) gives an independent random stream.

No generator state lives across steps, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

Key = int | str
_OF_THREAD = threading.local()
Seed = int | Sequence[int]
"""Of NumPy's generators: an int in [0, 2**32), or a sequence of them for an independent stream."""


def derive(*key: Key) -> int:
    """A 63-bit seed that depends on every part of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derive32(*key: Key) -> int:
    """A 32-bit seed, for numpy.random.RandomState."""
    return derive(*key) & 0xFFFFFFFF


def generator(*key: Key) -> torch.Generator:
    """A CPU torch.Generator seeded by `key`."""
    return torch.Generator().manual_seed(derive(*key))


def random_states(seeds: Iterable[Seed]) -> Iterator[np.random.RandomState]:
    """RandomState(seed) of each seed; use one before the next, as it is one object a thread, seeded anew.

    Making an object takes ten times as long as drawing a latent.
    """
    for seed in seeds:
        if not hasattr(_OF_THREAD, "random"):
            _OF_THREAD.random = np.random.RandomState(0)
        _OF_THREAD.random.seed(seed)
        yield _OF_THREAD.random


@contextlib.contextmanager
def seeded(*key: Key) -> Iterator[None]:
    """Seed torch's global CPU generator by `key` for a block (building a module, say), then restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(*key))
        yield
