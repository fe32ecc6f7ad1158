"""The area probes of `python -m bench`: its rows; no time is asserted."""

import pytest
import torch

from bench.areas import probes as area
from bench.baselines.probes import ReferenceProbe
from copgen_fast.config import EncoderConfig
from copgen_fast.evals.linear_grid import Config

TINY = EncoderConfig("resnet18", "half", 8)


def test_the_command_writes_its_rows(monkeypatch, measured):
    cases = (
        area.Case(TINY, 16, 20, (24, 20), batch=8),
        area.Case(TINY, 8, 40, (8, 8), grid=Config(passes=1, epochs=1), batch=16),
    )
    monkeypatch.setattr(area, "CASES", cases)
    monkeypatch.setattr(area.machine, "cores", lambda: 0)
    rows = measured("probes")
    assert [row["direction"] for row in rows if row["precision"] == "fp32"] == ["epoch", "answer"]
    assert all("an epoch of 5,000: " in row["limit"] for row in rows if row["direction"] == "epoch")
    grid = rows[-1]
    assert grid["peer"].endswith("60 epochs, estimated from single ones")
    assert grid["ratio"] == pytest.approx(grid["peer_ms"] / grid["ours_ms"])


def test_the_peer_is_the_same_protocol(tmp_path):
    case = area.Case(TINY, 16, 30, (24, 20), batch=10)
    area.write_files(case, tmp_path)
    probe = ReferenceProbe(tmp_path, case.make(), 64, case.side, case.batch, 0, torch.device("cpu"))
    before = probe.classifier.weight.clone()
    probe.epoch()
    assert (len(probe.train.dataset), len(probe.test.dataset), len(probe.train)) == (30, 10, 3)
    assert not probe.classifier.weight.equal(before)
    assert [t.__class__.__name__ for t in probe.train.dataset.transform.transforms[:2]] == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
    ]
