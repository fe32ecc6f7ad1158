"""Classes that a supervised loss can compare, before any pair is made."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from copgen_fast.config import MethodConfig, PairsConfig, PretrainConfig, RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.stages import Run
from copgen_fast.train import main
from tests.conftest import TINY


def expect_classes(classes, method="supcon", **changes):
    pairs = PairsConfig(count=100, samples_per_class=20)
    config = replace(RunConfig(method=MethodConfig(method), pairs=pairs), **changes)
    Run(config, Path("."), torch.device("cpu")).expect_classes(classes)


@pytest.mark.parametrize(
    ("classes", "pairs", "message"),
    [
        (0, {}, "--method supcon needs classes, and generator digits has none"),
        (1, {}, "all 100 samples have one class, so none is a negative"),
        (5, {"samples_per_class": 100}, "all 100 samples have one class.*see --pairs.samples-per-class"),
        (100, {"samples_per_class": 1}, "no two samples share a class, so none is a positive"),
    ],
)
def test_a_supervised_loss_without_negatives_or_positives_is_refused(classes, pairs, message):
    with pytest.raises(UsageError, match=message):
        expect_classes(classes, pairs=replace(PairsConfig(count=100, samples_per_class=20), **pairs))


def test_what_can_be_compared_is_taken():
    expect_classes(2)
    expect_classes(99, pairs=PairsConfig(count=100, samples_per_class=1))
    expect_classes(0, method="simclr")
    expect_classes(0, stages=("navigator", "pairs"))
    expect_classes(0, pretrain=PretrainConfig(data="real"))


def test_a_generator_of_anything_but_images_is_refused_before_any_stage(tmp_path, capsys):
    (tmp_path / "two.py").write_text(
        "from copgen_fast.generators.digits import DigitsGenerator\n\n"
        "class Two(DigitsGenerator):\n    def forward(self, z, labels=None):\n"
        "        return {'mask': z, 'depth': z}\n\ndef build(weights, config):\n    return Two()\n"
    )
    for stage in ("navigator", "pairs"):
        out = tmp_path / stage
        arguments = [*TINY, "--generator.name", str(tmp_path / "two.py"), "--out", str(out), "--stages", stage]
        assert main([*arguments, "--pairs.positives", "identity"]) == 2
        assert (
            "a dict of ['mask', 'depth'], with 0 images: set image_key, or return the images alone"
            in capsys.readouterr().err
        )
        assert not (out / stage).exists()
