"""PNG files decoded without Pillow: its pixels to the bit, and whatever a file holds beside is left to it."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from copgen_fast.images import png
from copgen_fast.images.codecs import CODECS


def noise(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def pillows(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", **options)
    return file.getvalue()


def with_data(file, data):
    """The file with other compressed data and their own checksum."""
    start, end = file.index(b"IDAT"), file.index(b"IEND") - 8
    body = b"IDAT" + data
    return (
        file[: start - 4] + struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body)) + file[end + 4 :]
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_pixels_are_pillows(count, height, width, seed):
    images = noise(count, height, width, seed)
    files = [png.encode(image) for image in images]
    together = np.zeros_like(images)
    assert png.rgb_rows(files, together) == []
    for file, image, alone in zip(files, together, (png.rgb(file, height, width) for file in files), strict=True):
        np.testing.assert_array_equal(image, np.array(Image.open(io.BytesIO(file))))
        np.testing.assert_array_equal(image, alone)


def test_more_images_than_are_summed_at_once():
    images = noise(50, 64, 48)
    together = np.zeros_like(images)
    assert png.rgb_rows([memoryview(png.encode(image)) for image in images], together) == []
    np.testing.assert_array_equal(together, images)


SOUND = png.encode(noise(1, 9, 7)[0])
LINES = zlib.decompress(SOUND[SOUND.index(b"IDAT") + 4 : -16])


@pytest.mark.parametrize(
    "file",
    [
        b"",
        SOUND[:-1],
        SOUND + b"\0",
        SOUND[:40],
        png.encode(noise(1, 7, 9)[0]),
        pillows(noise(1, 9, 7)[0]),
        pillows(noise(1, 9, 7)[0][..., 0]),
        with_data(SOUND, zlib.compress(LINES[:-1])),
        with_data(SOUND, zlib.compress(LINES + b"\0")),
        with_data(SOUND, zlib.compress(LINES)[:-3]),
        with_data(SOUND, zlib.compress(b"\1" + LINES[1:])),
        with_data(SOUND, b""),
    ],
    ids="empty cut longer header size Pillow grey short long unfinished filter nothing".split(),
)
def test_other_files_are_left_to_pillow(file):
    assert png.rgb(file, 9, 7) is None and png.rgb(SOUND, 9, 7) is not None
    images = np.zeros((3, 9, 7, 3), np.uint8)
    assert png.rgb_rows([SOUND, file, SOUND], images) == [1]
    np.testing.assert_array_equal(images[::2], noise(1, 9, 7).repeat(2, 0))


def test_no_more_is_inflated_than_the_image_holds():
    bomb = with_data(SOUND, zlib.compress(LINES + bytes(10**9 // 4), 1))
    assert len(bomb) < 2 * 10**6
    tracemalloc.start()
    assert png.rgb(bomb, 9, 7) is None
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_no_altered_byte_gives_other_pixels():
    left = 0
    for place in range(len(SOUND)):
        found = png.rgb(SOUND[:place] + bytes([SOUND[place] ^ 0x10]) + SOUND[place + 1 :], 9, 7)
        if found is None:
            left += 1
        else:
            np.testing.assert_array_equal(found, noise(1, 9, 7)[0])
    assert left == len(SOUND), "the checksum covers all"


@pytest.mark.parametrize("codec", list(CODECS))
def test_rows_are_what_the_codec_decodes_one_by_one(codec):
    images = noise(6, 16, 12)
    files = [CODECS[codec].encode(image) for image in images]
    if codec != "raw":
        file = io.BytesIO()  # what only Pillow decodes: another filter, several scans
        Image.fromarray(images[1]).save(file, codec, **({"progressive": True} if codec == "jpeg" else {}))
        files[1] = file.getvalue()
    files[2] = files[2][: len(files[2]) // 2]
    files[4] = CODECS[codec].encode(noise(1, 12, 12)[0])
    rows = np.zeros_like(images)
    assert CODECS[codec].decode_rows(files, rows) == [2, 4]
    for row in (0, 1, 3, 5):
        alone = CODECS[codec].decode(files[row], (3, 16, 12), "").permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(rows[row], alone)
