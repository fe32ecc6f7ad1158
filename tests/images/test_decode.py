"""Image files as RGB: every mode in its range, upright, and nothing decoded that would take the machine's memory."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from copgen_fast.images import decode
from copgen_fast.images.views import resize_and_crop
from copgen_fast.runtime.memory import peak_memory

RAMP16 = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
RAMP8 = (RAMP16.astype(np.uint32) * 255 + 32767) // 65535


def read(path):
    with decode.rgb(path) as pixels:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        return pixels.copy()


def refusal(path):
    with pytest.raises(decode.UndecodableImageError) as caught, decode.rgb(path):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png(width, height, bits, data):
    """A PNG file of colours that claims this size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    parts = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.pgm", "ramp.tif"])
def test_grey_of_16_bits_is_scaled(name, tmp_path):
    if name == "ramp.pgm":
        (tmp_path / name).write_bytes(b"P5 64 64 65535\n" + RAMP16.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP16).save(tmp_path / name)
    pixels = read(tmp_path / name)
    assert pixels.mean() == pytest.approx(127.5, abs=0.1)
    np.testing.assert_array_equal(pixels, np.repeat(RAMP8[..., None], 3, 2))


def test_white_is_zero_and_big_endian_in_tiff(tmp_path):
    image = Image.fromarray(RAMP16)
    image.save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read(tmp_path / "inverted.tif")[..., 0], 255 - RAMP8)
    Image.frombytes("I;16B", (64, 64), RAMP16.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    np.testing.assert_array_equal(read(tmp_path / "big.tif")[..., 0], RAMP8)


def test_colours_of_16_bits_are_scaled(tmp_path):
    """A PNG of 16 bits a channel, which Pillow reads but doesn't write."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.repeat(RAMP16[..., None], 3, 2).astype(">u2"))
    (tmp_path / "x.png").write_bytes(png(64, 64, 16, zlib.compress(rows)))
    assert np.abs(read(tmp_path / "x.png")[..., 1].astype(int) - RAMP8).max() <= 1


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg"),
     ("LAB", "tif"), ("CMYK", "tif"), ("L", "webp"), ("RGBA", "tif")],
)  # fmt: skip
def test_modes_of_8_bits_keep_black_grey_and_white(mode, ending, tmp_path):
    levels = (0, 255) if mode == "1" else (0, 128, 255)
    grey = np.repeat(np.array(levels, np.uint8).repeat(16)[None], 16, 0)
    source = Image.fromarray(grey).convert("RGB")
    if mode == "P":
        image = source.quantize(4)
        image.info["transparency"] = 0
    else:
        image = source.convert(mode)
    image.save(tmp_path / f"x.{ending}")
    assert np.abs(read(tmp_path / f"x.{ending}").astype(int) - grey[..., None]).max() <= 3


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_values_without_a_defined_range_are_refused_by_name(values, tmp_path):
    Image.fromarray(RAMP16.astype(values)).save(tmp_path / "x.tif")
    mode = "F" if values is np.float32 else "I"
    assert f"mode {mode} has no defined range" in refusal(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", range(9))
def test_photographs_are_turned_upright(orientation, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.png", "x.tif", "x.webp", "x.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, lossless=True)
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(read(tmp_path / name), ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_beside_a_sound_image_are_no_fault(tmp_path):
    Image.fromarray(RAMP8.astype(np.uint8)).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read(tmp_path / "x.png").shape == (64, 64, 3)


@pytest.mark.parametrize("side", [65_000, 12_000, 9_500])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_too_large_are_refused_before_they_are_decoded(side, tmp_path):
    (tmp_path / "x.png").write_bytes(png(side, side, 8, b""))
    assert "pixels" in refusal(tmp_path / "x.png")
    with pytest.raises(decode.UndecodableImageError, match="pixels"):
        decode.rgb_of_bytes(png(side, side, 8, b""), "PNG", (3, side, side))


@pytest.mark.parametrize("name", ["x.webp", "x.png", "x.gif", "x.tif"])
def test_images_of_several_frames_are_refused(name, tmp_path):
    frames = [Image.new("RGB", (8, 8), (0, level, 255)) for level in (0, 80, 255)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert "several frames" in refusal(tmp_path / name)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    assert "no regular file" in refusal(tmp_path / "x.png")
    assert "no regular file" in refusal("/dev/zero")


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9])
def test_anything_else_is_refused_in_one_line(data, tmp_path):
    (tmp_path / "x.png").write_bytes(data)
    assert refusal(tmp_path / "x.png")


@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000)])
def test_the_narrowest_image_takes_little_memory(shape):
    images = torch.randint(0, 256, (1, 3, *shape), dtype=torch.uint8)
    resize_and_crop(images, 224)
    taken = peak_memory(lambda: resize_and_crop(images, 224))
    assert taken is None or taken < 20


def test_a_long_image_gives_its_centre():
    images = torch.arange(40, dtype=torch.uint8).view(1, 1, 1, 40).expand(1, 3, 4, 40)
    assert resize_and_crop(images, 4)[0, 0, 0].tolist() == [18, 19, 20, 21]
