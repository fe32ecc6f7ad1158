import io

import numpy as np
import torch
from PIL import Image

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


def test_a_grid_is_written_whole(tmp_path):
    write_grid(tmp_path / "grids" / "g.png", torch.zeros(2, 3, 4, 4), columns=2)
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["g.png"]
