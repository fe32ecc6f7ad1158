"""One command for the seven transfer sets: its tables and file, going on where it stopped, what is missing."""

import json
import re

import pytest
import torch

from copgen_fast import evaluate
from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import Encoder
from copgen_fast.runtime.interrupts import Interrupted
from tests.helpers import transfer_layouts
from tests.helpers.transfer_layouts import NAMES

pytestmark = pytest.mark.filterwarnings("ignore:.*not comparable")
OPTIONS = "lbfgs.size=8 lbfgs.penalties=3 vissl.size=8 vissl.epochs=1".split()


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command that evaluates an untrained encoder on all seven sets."""
    transfer_layouts.trust(monkeypatch)
    for name in NAMES:
        transfer_layouts.write(tmp_path / "data", name)
    torch.manual_seed(0)
    torch.save(Encoder(EncoderConfig("resnet18", "cifar", 8)).state_dict(), tmp_path / "weights.pth")
    words = [str(tmp_path / "weights.pth"), "--device", "cpu", "--data.root", str(tmp_path / "data")]
    return [
        *words,
        "--data.image-size",
        "8",
        "--sets",
        *NAMES,
        "--evals",
        "vissl",
        "lbfgs",
        "--evals.options",
        *OPTIONS,
    ]


def test_one_command_prints_a_row_of_all_seven_sets(words, tmp_path, capsys):
    assert evaluate.main(words) == 0
    found = json.loads((tmp_path / "weights.sets.json").read_text())
    assert list(found["results"]) == list(NAMES) and "name" not in found["data"]
    assert {name for name, digest in found["split_sha256"].items() if digest} == {"sun397", "caltech101"}
    output = capsys.readouterr().out
    (row,) = re.findall(r"^weights, vissl .*", output, re.MULTILINE)
    assert [float(value) for value in row.split()[2:]] == pytest.approx(
        [100 * found["results"][name]["vissl_top1"] for name in NAMES], abs=0.051
    )
    header = output.splitlines()[output.splitlines().index(row) + 2]
    assert re.findall(r"(\w+) top1 per class %", header) == ["oxfordiiitpet", "caltech101", "flowers102"]


def test_the_same_command_goes_on_where_it_stopped(words, tmp_path, monkeypatch, capsys):
    words = [word for word in words if word not in NAMES[3:]]
    measured = []
    measure = evaluate.measure

    def stopping(encoder, run, title):
        if len(measured) == 2:
            raise Interrupted("stopped")
        measured.append(run.config.data.name)
        return measure(encoder, run, title)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure", stopping)
        assert evaluate.main(words) == 130
    assert list(json.loads((tmp_path / "weights.sets.json").read_text())["results"]) == list(NAMES[:2])
    monkeypatch.setattr(evaluate, "measure", lambda *key: measured.append(key[1].config.data.name) or measure(*key))
    assert evaluate.main(words) == 0 and measured == list(NAMES[:3])
    assert evaluate.main([*words, "--seed", "1"]) == 2
    assert "is of another encoder or other options" in capsys.readouterr().err


def test_sets_that_are_missing_are_all_named_before_any_is_evaluated(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("evaluated"))
    for name in ("SUN397", "food-101"):
        (tmp_path / "data" / name).rename(tmp_path / name)
    assert evaluate.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for cls in ("SUN397", "Food101"):
        assert f"put there what torchvision.datasets.{cls}(" in line
    assert not (tmp_path / "weights.sets.json").exists()
