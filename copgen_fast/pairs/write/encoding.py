"""Encoding of batches of pairs in threads: zlib, and Pillow on a file descriptor, release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from copgen_fast.config import Codec
from copgen_fast.images.codecs import CODECS

Files = list[tuple[bytes, ...]]
"""The anchor's file of each pair, and its positives'."""

_PAIRS_PER_TASK = 16


class Encoder:
    """Encodes batches of pixels, in order.

    Args:
        workers: threads; 0 encodes in the calling thread, as does the codec `raw`, which only copies.
    """

    def __init__(self, codec: Codec, workers: int) -> None:
        self._encode = CODECS[codec].encode
        self._pool = ThreadPoolExecutor(workers, "encoder") if workers and codec != "raw" else None

    def submit(self, pixels: np.ndarray) -> Callable[[], Files]:
        """Start to encode uint8 [1 + K, n, H, W, 3], anchors first; calling the result waits for the files.

        The pixels must not change until then. An error of a thread is raised by that call.
        """
        pairs = list(zip(*pixels, strict=True))
        if self._pool is None:
            return lambda: self._files(pairs)
        starts = range(0, len(pairs), _PAIRS_PER_TASK)
        tasks = [self._pool.submit(self._files, pairs[start : start + _PAIRS_PER_TASK]) for start in starts]
        return lambda: [files for task in tasks for files in task.result()]

    def _files(self, pairs: list[tuple[np.ndarray, ...]]) -> Files:
        return [tuple(map(self._encode, images)) for images in pairs]

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
