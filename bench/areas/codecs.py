"""Area codecs: encoding and decoding of image files on one core, beside Pillow's default PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from bench.harness import Call
from bench.limits import copies
from bench.rows import Candidate, Options, Row, compare
from copgen_fast.config import Codec
from copgen_fast.images.codecs import CODECS

# The size of the paper's data set (COP-Gen, Li et al. 2022).
_PAIRS = 1_300_000
_LATENT_DIM = 120
_BLOCK = 512
_BACKENDS = {
    "png": {"encode": "zlib", "decode": "zlib"},
    "jpeg": {"encode": "pillow", "decode": "pillow"},
    "raw": {"encode": "numpy", "decode": "numpy"},
}


@dataclass(frozen=True)
class Case:
    """Batches of `batch` photographs of `size` pixels a side."""

    codec: Codec
    batch: int = 32
    size: int = 128

    def __str__(self) -> str:
        return f"{self.codec} B={self.batch} {self.size}px"


CASES = (Case("png"), Case("jpeg"), Case("raw"))


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case, encoding and decoding, on the CPU whatever the device."""
    for case in CASES:
        if options.only in str(case):
            images = photographs(case.batch, case.size)
            for direction in ("encode", "decode"):
                yield from _rows(case, direction, images, options)


def photographs(count: int, size: int) -> np.ndarray:
    """Crops of scikit-learn's two photographs, a third to all of their height, resized: uint8 [N, size, size, 3]."""
    from sklearn.datasets import load_sample_images

    random, photos = np.random.RandomState(0), [Image.fromarray(image) for image in load_sample_images().images]
    crops = []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = random.randint(photo.height // 3, photo.height + 1)
        left, top = random.randint(photo.width - side + 1), random.randint(photo.height - side + 1)
        crops.append(photo.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC))
    return np.stack([np.asarray(crop) for crop in crops])


def stored_bytes(file_bytes: float, pairs: int = _PAIRS) -> float:
    """Size on disk of pairs of such files: tar blocks and headers, records and latents included."""
    blocks = 2 * (1 + file_bytes / _BLOCK + 0.5) + 2  # of a file, half of the last block is empty on average
    return pairs * (blocks * _BLOCK + 2 * 4 * _LATENT_DIM)


def core_hours(ms_an_image: float, pairs: int = _PAIRS) -> float:
    """Hours of one core for all images of that many pairs."""
    return 2 * pairs * ms_an_image / 3.6e6


def _rows(case: Case, direction: str, images: np.ndarray, options: Options) -> Iterator[Row]:
    codec, shape = CODECS[case.codec], (3, case.size, case.size)
    files = [codec.encode(image) for image in images]
    default = [_default_png(image) for image in images]
    calls: dict[str, tuple[Call, Call]] = {
        "encode": (
            lambda: [codec.encode(image) for image in images],
            lambda: [_default_png(image) for image in images],
        ),
        "decode": (lambda: [codec.decode(file, shape, case.codec) for file in files], lambda: [*map(_read, default)]),
    }
    ours, peer = calls[direction]
    pixels = torch.from_numpy(images)
    bound = copies("the pixels", [(torch.empty_like(pixels), pixels)])
    mine = Candidate("codecs", str(case), _BACKENDS[case.codec][direction], "uint8", direction, ours, bound)
    mean = sum(map(len, files)) / len(files)
    for row in compare([mine], {"Pillow, its default PNG": peer}, options, pixels.device):
        gigabytes, hours = stored_bytes(mean) / 1e9, core_hours(row.ours_ms / case.batch)
        words = f"{mean:.0f} bytes an image; {_PAIRS / 1e6:.1f}M pairs: {gigabytes:.0f} GB, {hours:.2g} h of a core"
        yield replace(row, limit=f"{row.limit} ({words})")


def _default_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def _read(file: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1)
