"""The area loader of `python -m bench`: its rows, and that both sides do the same work; no time is asserted."""

import pytest
import torch
from PIL import Image

from bench.areas import loader as area
from bench.baselines import loader as baselines
from copgen_fast import augmentations
from copgen_fast.pairs.read import dali

TINY = [area.Case(codec, alone, side=16, count=8, batch=4, workers=1) for codec in ("png", "raw") for alone in (0, 1)]


def test_the_command_writes_its_rows(monkeypatch, measured):
    monkeypatch.setattr(area, "CASES", TINY)
    # In this process: where others hold threads, as they do in tests, processes may not be forked.
    epoch = baselines.epoch
    monkeypatch.setattr(baselines, "epoch", lambda *arguments: epoch(*arguments[:-1], 0))
    rows = measured("loader")
    backends = {"plain", "dali"} if dali.available() else {"plain"}
    cases = {str(case) for case in TINY}
    assert cases == {"png 16px", "png 16px, decoded only", "raw 16px", "raw 16px, decoded only"}
    assert {(row["case"], row["backend"]) for row in rows} == {(case, name) for case in cases for name in backends}
    assert {row["direction"] for row in rows} == {"step"}
    assert {row["peer"] for row in rows} == {"reference form, png files, PIL, 1 processes"}


@pytest.mark.parametrize("codec", ["png", "jpeg", "raw"])
def test_the_peer_reads_the_same_pictures(codec, tmp_path):
    case = area.Case(codec, side=16, count=5)
    pairs = area.write(case, tmp_path / "shards")
    extension = "jpg" if codec == "jpeg" else "png"
    baselines.write_files(tmp_path / "files", pairs, extension, per_class=3)
    files = baselines.PairFiles(tmp_path / "files", extension, baselines.transforms.PILToTensor())
    assert len(files) == 5 and sorted(files.classes) == ["n00000000", "n00000001"]
    for index, path in enumerate(sorted(files.anchors)):
        anchor, neighbor, label = files[files.anchors.index(path)]
        assert label == files.classes[f"n{index // 3:08d}"]
        assert torch.equal(anchor, pairs[index][0]) and torch.equal(neighbor, pairs[index][1])
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
    assert not torch.equal(pairs[0][0], pairs[0][1]) and not torch.equal(pairs[0][0], pairs[1][0])


def test_both_sides_end_at_both_views_of_every_pair(tmp_path, monkeypatch):
    case = area.Case("png", side=16, count=8, batch=4, workers=0)
    pairs = area.write(case, tmp_path / "shards")
    made = []
    views = area.random_views
    monkeypatch.setattr(area, "random_views", lambda *arguments: made.append(views(*arguments)))
    for _, epoch in area.our_epochs(case, pairs, torch.device("cpu")):
        made.clear()
        epoch()
        assert [(len(batch), batch.dtype) for batch in made] == [(8, torch.float32)] * 2
    baselines.write_files(tmp_path / "files", pairs, "png")
    joined, cat = [], torch.cat
    monkeypatch.setattr(baselines.torch, "cat", lambda parts: joined.append(cat(parts)))
    baselines.epoch(tmp_path / "files", "png", 4, augmentations.get("simclr"), 16, 0)()
    assert [(tuple(batch.shape), batch.dtype) for batch in joined] == [((8, 3, 16, 16), torch.float32)] * 2
    assert joined[0].min() < -1, "normalised"
