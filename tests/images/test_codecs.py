import contextlib
import io
import struct
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from copgen_fast import config
from copgen_fast.errors import CorruptArtifactError
from copgen_fast.images.codecs import CODECS


def noise(height=8, width=8, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def decoded(codec, image):
    return CODECS[codec].decode(CODECS[codec].encode(image), (3, *image.shape[:2]), "here").permute(1, 2, 0).numpy()


def test_each_codec_of_the_configuration_is_there():
    assert set(CODECS) == set(get_args(config.Codec))


@pytest.mark.parametrize("codec", ["png", "raw"])
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_lossless_codecs_keep_every_pixel(codec, height, width, seed):
    image = noise(height, width, seed)
    np.testing.assert_array_equal(decoded(codec, image), image)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_jpeg_stays_near_and_keeps_the_resolution_of_colours(height, width, seed):
    coarse = noise(-(-height // 4), -(-width // 4), seed)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    assert np.abs(decoded("jpeg", image).astype(int) - image).max() <= 25
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)  # colour at half resolution would leave purple
    assert np.abs(decoded("jpeg", stripes).astype(int) - stripes).max() <= 30


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_gray_files_are_read_as_colours(codec, tmp_path):
    Image.fromarray(noise()[..., 0]).save(tmp_path / "gray", codec)
    image = CODECS[codec].decode((tmp_path / "gray").read_bytes(), (3, 8, 8), "here")
    assert image.dtype == torch.uint8 and torch.equal(image[0], image[2])


@pytest.mark.parametrize("codec", list(CODECS))
def test_broken_files_are_named(codec):
    data = CODECS[codec].encode(noise())
    for broken in (b"", b"no image", data[: len(data) // 2]):
        with pytest.raises(CorruptArtifactError, match="^shard x: key does not decode .*delete it"):
            CODECS[codec].decode(broken, (3, 8, 8), "shard x: key")


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_images_of_another_size_are_named(codec):
    with pytest.raises(CorruptArtifactError, match=r"^shard x: key is \[3, 8, 8\], the index says \[3, 8, 9\]"):
        CODECS[codec].decode(CODECS[codec].encode(noise()), (3, 8, 9), "shard x: key")


@pytest.mark.parametrize("codec", ["png", "jpeg"])
@pytest.mark.parametrize("check", ["decode", "expect_size"])
def test_a_size_that_a_header_claims_is_checked_before_decoding(codec, check):
    data = bytearray(CODECS[codec].encode(noise()))
    if codec == "png":
        place, claim = data.index(b"IHDR") + 4, struct.pack(">II", 65_000, 65_000)
    else:
        place, claim = data.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_000, 65_000)
    data[place : place + len(claim)] = claim
    for shape in ((3, 8, 8), (3, 65_000, 65_000)):  # an index may claim it, too
        with pytest.raises(CorruptArtifactError, match=r"^here is \[3, 65000, 65000\].*delete it"):
            getattr(CODECS[codec], check)(bytes(data), shape, "here")
    CODECS[codec].expect_size(CODECS[codec].encode(noise()), (3, 8, 8), "here")


def test_any_altered_jpeg_decodes_or_is_named():
    sound = CODECS["jpeg"].encode(noise())
    for place in range(len(sound)):
        data = bytearray(sound)
        data[place] ^= 0xFF
        with contextlib.suppress(CorruptArtifactError):
            assert CODECS["jpeg"].decode(bytes(data), (3, 8, 8), "here").shape == (3, 8, 8)


def test_grey_of_16_bits_is_scaled():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 128, 65535]], np.uint16)).save(file, "png")
    assert CODECS["png"].decode(file.getvalue(), (3, 1, 3), "here")[0].tolist() == [[0, 128, 255]]


def test_no_flipped_bit_of_a_png_alters_the_image_unseen():
    data, found = CODECS["png"].encode(noise()), 0
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1
        try:
            image = CODECS["png"].decode(bytes(broken), (3, 8, 8), "here")
        except CorruptArtifactError:
            found += 1
        else:
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), noise())
    assert found > 0.8 * len(data)


@pytest.mark.parametrize("size", [1, 8, 200])
def test_jpeg_files_are_pillows(size):
    """Written through a file descriptor here: the same bytes as in memory."""
    file = io.BytesIO()
    Image.fromarray(noise(size, size)).save(file, "jpeg", quality=95, subsampling=0)
    assert CODECS["jpeg"].encode(noise(size, size)) == file.getvalue()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_png_files_are_everybodys(height, width, seed):
    image = noise(height, width, seed)
    data = CODECS["png"].encode(image)
    with Image.open(io.BytesIO(data)) as file:
        file.verify()  # every chunk's checksum, which reading does not look at
        assert (file.format, file.mode, file.size) == ("PNG", "RGB", (width, height))


def test_png_files_are_about_as_small_as_pillows():
    smooth = np.asarray(Image.fromarray(noise(16, 16)).resize((128, 128), Image.BICUBIC))
    grainy = (smooth + noise(128, 128) // 32).astype(np.uint8)
    for image in (smooth, grainy):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=1)
        assert len(CODECS["png"].encode(image)) < 1.25 * len(file.getvalue())
