"""JPEG files by simplejpeg: Pillow's pixels to the bit, and for whatever else a file holds, Pillow's own answer."""

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from copgen_fast.images import decode, jpeg

simplejpeg = pytest.importorskip("simplejpeg")


ADOBE_RGB = b"\xff\xee\x00\x0eAdobe" + bytes((0, 100, 0, 0, 0, 0, 0))
"""A segment after which three components are red, green and blue."""


def photograph(height=40, width=33):
    random = np.random.default_rng(height * width)
    coarse = Image.fromarray(random.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.BICUBIC), np.int64)
    return np.clip(smooth + random.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def pillows(mode="RGB", size=(40, 33), **options):
    file = io.BytesIO()
    Image.fromarray(photograph(*size)).convert(mode).save(file, "jpeg", **options)
    return file.getvalue()


def decoded(data):
    """Pixels, or what is said about the file."""
    try:
        with decode.rgb(data) as pixels:
            return pixels.shape, pixels.tobytes()
    except decode.UndecodableImageError as error:
        return str(error)


def expect_pillows(monkeypatch, data):
    """The same answer with and without simplejpeg; returns it."""
    found = decoded(data)
    with monkeypatch.context() as without:
        without.setattr(jpeg, "available", lambda: False)
        assert decoded(data) == found
    return found


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (17, 15), (33, 70)])
def test_pixels_are_pillows_to_the_bit(size):
    files = [pillows("L", size, quality=60)]
    for quality in (5, 50, 92, 100):
        for subsampling in ("444", "422", "420", "440", "411"):
            files.append(simplejpeg.encode_jpeg(photograph(*size), quality, colorsubsampling=subsampling))
        for options in ({}, {"optimize": True}, {"restart_marker_blocks": 2}):
            files += (pillows("RGB", size, quality=quality, subsampling=sub, **options) for sub in (0, 1, 2))
    for data in files:
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(jpeg.rgb(data, *size), expected)


@pytest.mark.parametrize(
    "data",
    [
        pillows(progressive=True),
        pillows("CMYK"),
        pillows()[:2] + ADOBE_RGB + pillows()[20:],  # instead of JFIF's segment
        pillows()[:-2],
        pillows()[:-40],
        pillows().replace(b"\xff\xc0", b"\xff\xc9"),  # says that it is coded arithmetically
        pillows().replace(b"\x01\x22\x00", b"\x01\x44\x00"),  # a subsampling without a name
        b"",
        b"\xff\xd8\xff\xe0",
    ],
    ids=["progressive", "CMYK", "RGB", "no end", "truncated", "arithmetic", "subsampling", "empty", "no frame"],
)
def test_anything_else_is_left_to_pillow(data, monkeypatch):
    assert jpeg.rgb(data, 40, 33) is None
    expect_pillows(monkeypatch, data)


def test_a_header_of_another_size_is_left_to_pillow():
    assert jpeg.rgb(pillows(), 40, 33) is not None
    assert jpeg.rgb(pillows(), 33, 40) is None


@pytest.mark.parametrize("large", [0, 2**24])  # left on the disk, and in memory
def test_a_file_with_much_behind_its_image_is_read_in_part(monkeypatch, tmp_path, large):
    monkeypatch.setattr("copgen_fast.images.decode._LARGE", large)
    path, behind = tmp_path / "x.jpg", bytes(2 * jpeg.most_bytes(40, 33))
    path.write_bytes(pillows() + behind)
    assert expect_pillows(monkeypatch, path) == decoded(pillows())
    path.write_bytes(pillows(comment=b"x" * 60_000) + behind)
    assert expect_pillows(monkeypatch, path) == decoded(pillows())


@pytest.mark.filterwarnings("ignore")
def test_altered_files_give_the_same_pixels_or_message_as_without_simplejpeg(monkeypatch, capfd):
    drawn = random.Random(0)
    sound = [pillows(), pillows(progressive=True), pillows(restart_marker_blocks=1), pillows("L", subsampling=0)]
    answers = []
    for _ in range(250):
        data = bytearray(drawn.choice(sound))
        place = drawn.randrange(drawn.choice([len(data), 700]))
        data[place:] = drawn.choice([b"", bytes([drawn.randrange(256)]) + data[place + 1 :], data[place + 1 :]])
        answers.append(expect_pillows(monkeypatch, bytes(data)))
    assert 50 < sum(isinstance(answer, str) for answer in answers) < 200
    capfd.readouterr()  # what libjpeg says


def test_a_decoder_of_other_pixels_is_not_used(monkeypatch):
    def other(data):
        return simplejpeg.decode_jpeg(data) ^ 1

    assert jpeg.available()
    for installed in (SimpleNamespace(decode_jpeg=other, encode_jpeg=simplejpeg.encode_jpeg), None):
        with monkeypatch.context() as patched:
            patched.setattr(jpeg, "simplejpeg", installed)
            jpeg.available.cache_clear()
            assert not jpeg.available() and jpeg.rgb(pillows(), 40, 33) is None
            jpeg.available.cache_clear()
