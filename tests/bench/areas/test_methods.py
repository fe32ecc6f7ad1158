"""The area methods of `python -m bench`: its rows, and that lightly's steps are our methods'; no time is asserted."""

import copy
from dataclasses import replace

import pytest
import torch

from bench.areas import methods as area
from bench.baselines.methods import LightlySteps
from copgen_fast import methods
from copgen_fast.config import EncoderConfig, PretrainConfig
from copgen_fast.encoders import Encoder

SMALL = EncoderConfig("resnet18", "half", 8)


def test_the_command_writes_its_rows(monkeypatch, measured):
    cases = [replace(case, batch=4, side=16, encoder=SMALL) for case in area.CASES[1:3]]
    monkeypatch.setattr(area, "CASES", tuple(cases))
    rows = measured("methods", "--repeats", "2")
    lightly = "lightly's modules, our encoder and views"
    assert [(row["case"], row["peer"]) for row in rows] == [
        ("moco B=4 16px", "simclr here"),
        ("moco B=4 16px", lightly),
        ("negft B=4 16px", "simclr here"),
    ]


@pytest.mark.parametrize("method", ["moco", "simsiam", "byol"])
def test_the_first_losses_of_lightlys_steps_are_ours(method):
    """NNCLR's is another loss: lightly's compares neighbours with each other, too."""
    torch.manual_seed(0)
    v, encoder = torch.randn(8, 3, 16, 16, dtype=torch.float64), Encoder(SMALL).double()
    words = ("queue=16",) if method == "moco" else ()
    theirs = LightlySteps(method, encoder, lambda: v, PretrainConfig(), 16)
    ours = methods.build(method, copy.deepcopy(theirs.encoder), words).double()
    head, predictor = getattr(ours, "projector", None) or ours.head, getattr(ours, "predictor", None)
    for mine, other in ((head, theirs.head), (predictor, theirs.predictor)):
        if other is not None:
            mine.load_state_dict(other.layers.double().state_dict())
    if theirs.target is not None:
        theirs.target.double()
        getattr(ours, "key", getattr(ours, "target", None)).update(0.0, ours.encoder, head)
    if method == "moco":
        theirs.criterion.memory_bank.bank = ours.queue.rows.clone()
    with torch.no_grad():
        targets = ours.targets(v)
    loss = ours.loss(ours(v), targets, None, None)
    expected = theirs.step()
    torch.testing.assert_close(loss.detach(), 4 + expected if method == "byol" else expected)
