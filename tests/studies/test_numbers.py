"""Numbers of a study's runs that are computed from their files."""

import dataclasses
import json
import math

import pytest
import torch

from copgen_fast.config import MethodConfig
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.studies._results import numbers_of


def trained(folder, losses, method=()):
    """A run whose pretraining of 4 epochs logged these losses, a step each."""
    name, *options = method or ("simclr",)
    quickstart = PRESETS["quickstart"]
    config = dataclasses.replace(
        quickstart,
        method=MethodConfig(name, tuple(options)),
        pretrain=dataclasses.replace(quickstart.pretrain, epochs=4, batch=64),
    )
    run = Run(config, folder, torch.device("cpu"))
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    artifacts.write_record(run.probe_file("identity"), {"linear_top1": 0.5, "seconds": 1.0})
    artifacts.write_record(run.pretrain_folder("identity") / "summary.json", {"loss": losses[-1], "seconds": 2.0})
    (run.pretrain_folder("identity") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.parametrize(
    ("options", "factor"), [((), 0.1 / 0.07), (("base_temperature=None",), 1), (("temperature=0.5",), 0.5 / 0.07)]
)
def test_the_bound_on_mutual_information_is_of_the_last_epochs_loss_in_nats(tmp_path, options, factor):
    run = trained(tmp_path, [factor * x for x in (9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 2.0, 3.0)], ("simclr", *options))
    found = numbers_of(run, "identity")
    assert found["mi_lower_bound"] == pytest.approx(math.log(2 * 64 - 1) - 2.5)
    assert found["seconds"] == 2.0, "of pretraining"


@pytest.mark.parametrize("method", [("byol",), ("simclr", "jigsaw=0.5")], ids=" ".join)
def test_other_losses_bound_no_mutual_information(tmp_path, method):
    assert "mi_lower_bound" not in numbers_of(trained(tmp_path, [1.0] * 8, method), "identity")
