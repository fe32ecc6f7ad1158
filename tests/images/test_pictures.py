import io

import numpy as np
import torch
from PIL import Image

from copgen_fast.images import pictures
from copgen_fast.images.pictures import grid_png, write_grid


def test_images_stand_row_by_row_in_the_range_of_the_generator():
    images = torch.full((4, 3, 5, 7), -1.0)
    images[1] = 1.0
    images[2] = 9.0  # clipped
    pixels = np.array(Image.open(io.BytesIO(grid_png(images, columns=2))))
    assert pixels.shape == (2 * (5 + 2) + 2, 2 * (7 + 2) + 2, 3)
    assert [int(pixels[4, 4, 0]), int(pixels[4, 13, 0]), int(pixels[11, 4, 0]), int(pixels[11, 13, 0])] == [
        0,
        255,
        255,
        0,
    ]


def test_the_smaller_file_is_taken_and_a_limit_lowers_its_quality():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[..., :32, :] = 0  # smooth above
    drawn = pictures.grid(noise, 1, padding=0)
    good = pictures.smallest(drawn)
    less = pictures.smallest(drawn, limit=len(good) // 2)
    assert good[:2] == less[:2] == b"\xff\xd8" and len(less) <= len(good) // 2
    assert len(pictures.smallest(drawn, quality=75)) < len(good)
    flat = pictures.smallest(pictures.grid(torch.zeros(1, 3, 64, 64), 1), limit=10**6)
    assert flat[1:4] == b"PNG" and Image.open(io.BytesIO(flat)).mode == "L", "grey in one channel"
    assert (np.asarray(Image.open(io.BytesIO(flat))) == 128).all()


def test_a_grid_is_written_whole(tmp_path):
    write_grid(tmp_path / "grids" / "g.png", torch.zeros(2, 3, 4, 4), columns=2)
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["g.png"]


def test_noise_which_hardly_compresses_is_a_picture_too():
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pictures.smallest(pictures.grid(noise, 16))
    assert Image.open(io.BytesIO(found)).size == (16 * 34 + 2, 4 * 34 + 2)
