"""The area pretrain of `python -m bench`: its rows, and that the reference form takes our step; no time is asserted."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import limits
from bench.__main__ import main
from bench.areas import _reading, _steps
from bench.areas import pretrain as area
from bench.baselines import pretrain as baselines
from copgen_fast import augmentations
from copgen_fast.config import EncoderConfig, PretrainConfig
from copgen_fast.stages.pretrain import make_batch, make_learner, pretrain_step

OPTIONS = PretrainConfig(encoder=EncoderConfig("resnet18", "half", 8), lr=0.1, augmentation="none")
TINY = area.Case(4, 16, OPTIONS, workers=0)
CPU = torch.device("cpu")


def test_the_command_writes_its_rows(monkeypatch, tmp_path):
    case = replace(TINY, options=replace(OPTIONS, augmentation="simclr"))
    monkeypatch.setattr(area, "CASES", (case,))
    monkeypatch.setattr(area, "READING", (_reading.Reading(case, steps=3, epoch=2),))
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 16})
    monkeypatch.setattr(_steps, "precisions", lambda device, of_gpus: ("fp32", "bf16"))
    file = tmp_path / "results.json"
    assert main(["pretrain", "--device", "cpu", "--repeats", "3", "--min-seconds", "0", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    *rows, waiting = rows
    assert {(row["case"], row["direction"]) for row in rows} == {("resnet18/8 B=4 16px", "step")}
    assert {row["precision"] for row in rows} == {"fp32", "bf16"}
    assert waiting["case"] == "resnet18/8 B=4 16px, 3 steps, pairs read"
    assert (waiting["backend"], waiting["precision"], waiting["peer"]) == ("plain", "fp32", "same steps, batch at hand")
    work = [float(row["limit"].split()[0]) for row in (rows[0], waiting)]
    assert work[1] == pytest.approx(3 * work[0], rel=0.02), "it is of all its steps"
    peers = {"reference form, fp32, PIL views by 0 processes", "reference form, fp32, views at hand"}
    assert {row["peer"] for row in rows} == peers and len(rows) == 4


def test_the_reference_form_takes_our_step():
    config, pairs = TINY.config("fp32"), TINY.pairs()
    learner = make_learner(config, CPU)
    theirs = baselines.reference_training(
        nn.Sequential(learner.method.encoder, learner.method.head),
        baselines.pictures_loader(pairs.anchors, pairs.positives, augmentations.get("none"), 0),
        lr=0.1,
        momentum=OPTIONS.momentum,
        weight_decay=OPTIONS.weight_decay,
        temperature=0.1,
        base_temperature=0.07,
    )
    start = [p.detach().clone() for p in learner.method.parameters()]
    for index in range(2):
        ours = pretrain_step(learner, make_batch(config, index, pairs, 0.1, CPU)).metrics["loss"]
        torch.testing.assert_close(baselines.reference_step(theirs), ours.detach(), rtol=1e-3, atol=1e-4)
    for mine, other, before in zip(learner.method.parameters(), theirs.model.parameters(), start, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-2, atol=1e-2 * (mine - before).abs().max().item())


def test_pictures_are_augmented_each_for_itself():
    pairs = TINY.pairs()
    views = baselines.pictures_loader(pairs.anchors, pairs.anchors, augmentations.get("simclr"), 0)()
    assert views.shape == (8, 3, 16, 16) and views.isfinite().all()
    assert (views[:4] != views[4:]).flatten(1).any(1).all(), "two views of an image are drawn apart"
