"""The area images of `python -m bench`: its rows, and that both sides see the same photographs; no time is asserted."""

import numpy as np
import torch
from PIL import Image

from bench.areas import images as area
from bench.baselines import images as baselines
from copgen_fast.config import DataConfig
from copgen_fast.images import sets
from copgen_fast.images.pack import PackConfig, pack


def test_the_command_writes_its_rows(monkeypatch, measured):
    cases = (area.Case("raw", count=4, batch=2, workers=1), area.Case("jpeg", packing=True, count=4, workers=1))
    monkeypatch.setattr(area, "CASES", cases)
    rows = measured("images")
    assert [row["case"] for row in rows] == ["raw 128px read, B=2", "jpeg 128px packed"]
    assert rows[0]["peer"].startswith("torchvision's ImageFolder") and "a loop of Pillow" in rows[1]["peer"]


def test_photographs_are_of_imagenets_size_and_both_sides_resize_them_alike(tmp_path):
    paths = area.write_photographs(tmp_path / "source/train", 2)
    assert [Image.open(path).size for path in paths] == [area.PHOTOGRAPH] * 2
    pack(PackConfig(tmp_path / "source", tmp_path / "out", 128, "raw", splits=("train",)))
    split = sets.open_set(DataConfig("packed", str(tmp_path / "out"), 128), ("train",)).splits["train"]
    baselines.resize_all(paths, tmp_path, 128)
    for index, path in enumerate(paths):
        theirs = torch.from_numpy(np.array(Image.open(tmp_path / path.name))).movedim(2, 0)
        ours = split.read(index, lambda pixels, index: torch.from_numpy(pixels).movedim(2, 0))[0]
        assert (ours.float() - theirs.float()).abs().mean() < 3, "JPEG's own loss"
