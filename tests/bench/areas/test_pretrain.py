"""The area pretrain of `python -m bench`: its rows, and that the reference form takes our step; no time is asserted."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.areas import _steps
from bench.areas import pretrain as area
from bench.baselines import pretrain as baselines
from copgen_fast import augmentations
from copgen_fast.config import EncoderConfig, PretrainConfig
from copgen_fast.stages.pretrain import make_batch, make_learner, pretrain_step

OPTIONS = PretrainConfig(encoder=EncoderConfig("resnet18", "half", 8), lr=0.1, augmentation="none")
TINY = area.Case(4, 16, OPTIONS, workers=0)
CPU = torch.device("cpu")


def test_the_command_writes_its_rows(monkeypatch, measured):
    case = replace(TINY, options=replace(OPTIONS, augmentation="simclr"))
    monkeypatch.setattr(area, "CASES", (case,))
    monkeypatch.setattr(area, "READING", (area.Reading(case, steps=3, epoch=2),))
    monkeypatch.setattr(_steps, "precisions", lambda device, of_gpus: ("fp32", "bf16"))
    *rows, waiting = measured("pretrain", "--repeats", "3")
    assert {(row["case"], row["direction"]) for row in rows} == {("resnet18/8 B=4 16px", "step")}
    assert {row["precision"] for row in rows} == {"fp32", "bf16"}
    assert waiting["case"] == "resnet18/8 B=4 16px, 3 steps, pairs read"
    assert (waiting["backend"], waiting["precision"], waiting["peer"]) == ("plain", "fp32", "same steps, batch at hand")
    work = [float(row["limit"].split()[0]) for row in (rows[0], waiting)]
    assert work[1] == pytest.approx(3 * work[0], rel=0.02), "it is of all its steps"
    peers = {"reference form, fp32, PIL views by 0 processes", "reference form, fp32, views at hand"}
    assert {row["peer"] for row in rows} == peers and len(rows) == 4


def test_the_reference_form_takes_our_step():
    """In float64, on the same views: one is what the other is compared with."""
    config = TINY.config("fp32")
    learner = make_learner(config, CPU)
    learner.method.double()
    for state in learner.sgd.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    batch = make_batch(config, 0, TINY.pairs(), 0.1, CPU)
    batch = replace(batch, images=batch.images.double() / 255)
    views = augmentations.make_views(batch.images, batch.params, learner.policy)
    model = nn.Sequential(learner.method.encoder, learner.method.head)
    theirs = baselines.ReferencePretraining(model, lambda: views, OPTIONS, learner.method.config)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        ours = pretrain_step(learner, batch).metrics["loss"]
        torch.testing.assert_close(theirs.step(), ours)
    for mine, other, before in zip(model.parameters(), theirs.model.parameters(), start, strict=True):
        torch.testing.assert_close(other, mine)
        assert not torch.equal(mine, before)


def test_pictures_are_views_of_the_same_images():
    pairs, none = TINY.pairs(), augmentations.get("none")
    batch = make_batch(TINY.config("fp32"), 0, pairs, 0.1, CPU)
    ours = augmentations.make_views(batch.images, batch.params, none)
    torch.testing.assert_close(baselines.pictures_loader(pairs.images, none, 0)(), ours.contiguous())


def test_pictures_are_augmented_each_for_itself():
    pairs = TINY.pairs()
    views = baselines.pictures_loader(torch.cat([pairs.anchors] * 2), augmentations.get("simclr"), 0)()
    assert views.shape == (8, 3, 16, 16) and views.isfinite().all()
    assert (views[:4] != views[4:]).flatten(1).any(1).all(), "two views of an image are drawn apart"
