"""Pretraining on pairs that it draws itself: the same weights as on shards, resumed too."""

import json
import shutil

import pytest
import torch

from copgen_fast import verify
from copgen_fast.stages import Run, pretrain
from copgen_fast.train import main, parse, wanted_stages
from copgen_fast.training import loop
from copgen_fast.training.metrics import read_rows
from tests.conftest import TINY
from tests.helpers import waves


@pytest.fixture
def words():
    return [*TINY, "--generator.name", waves.__file__, "--pretrain.epochs", "3"]


def left_by(folder, source="gaussian", method="simclr"):
    of = folder / "pretrain" / source / method
    return (of / "encoder.safetensors").read_bytes(), read_rows(of / "metrics.jsonl")


@pytest.mark.parametrize(("source", "several"), [("navigator", 1), ("gaussian", 3)])
def test_three_epochs_leave_the_weights_of_a_run_on_shards(words, tmp_path, source, several):
    words += [
        "--pairs.positives",
        source,
        "--pairs.positives-per-anchor",
        str(several),
        "--stages",
        "pairs",
        "pretrain",
    ]
    words += ["navigator"] if source == "navigator" else []
    assert main([*words, "--out", str(tmp_path / "shards")]) == 0
    assert main([*words, "--out", str(tmp_path / "online"), "--pretrain.data", "online"]) == 0
    assert left_by(tmp_path / "online", source) == left_by(tmp_path / "shards", source)
    assert not (tmp_path / "online" / "pairs").exists()
    summary, pairs = (
        json.loads((tmp_path / path / "summary.json").read_text())
        for path in (f"online/pretrain/{source}/simclr", f"shards/pairs/{source}")
    )
    assert summary["displacement_mean"] == pytest.approx(pairs["displacement_mean"])


@pytest.mark.parametrize("endless", [False, True])
def test_a_stopped_run_ends_in_the_same_bits(words, tmp_path, monkeypatch, endless):
    words += ["--pretrain.data", "online", "--pairs.positives", "gaussian", "--stages", "pretrain", "--method", "moco"]
    words += ["--method.options", "queue=20", "--pairs.positives-per-anchor", "2"] + ["--pairs.endless"] * endless
    whole, parted = ([*words, "--out", str(tmp_path / name)] for name in ("whole", "parted"))
    assert main(whole) == 0
    for _ in range(2):  # four steps each time, where an epoch has three
        calls = iter(range(99))
        monkeypatch.setattr(loop, "stop_requested", lambda calls=calls: next(calls) >= 6)
        assert main(parted) == 130
    monkeypatch.undo()
    assert main(parted) == 0
    assert left_by(tmp_path / "parted", method="moco") == left_by(tmp_path / "whole", method="moco")


def test_the_pairs_stage_is_left_out_where_pretraining_draws_them():
    words = ["quickstart", "--pairs.positives", "navigator", "--pretrain.data", "online"]
    assert wanted_stages(parse(words)) == ["navigator", "pretrain", "probe", "report"]
    assert wanted_stages(parse([*words, "--stages", "pairs"])) == ["pairs"], "asked for alone, shards are written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs.endless"], "pairs.endless: new pairs in each epoch go with --pretrain.data online only"),
        (["--pretrain.data", "online", "--pretrain.batch", "64"], "pretrain.batch: expected at most pairs.count 48"),
        (["--pretrain.data", "online", "--pretrain.loader", "dali"], "online pairs are in none: choose plain"),
        (["--pretrain.data", "online", "--pretrain.shuffle-shards", "2"], "online pairs are in no shards"),
        (
            ["--pretrain.data", "online", "--pairs.endless", "--pairs.start-seed", "4294967200"],
            "pairs.start_seed: seeds must stay below 2**32, got up to 4294967200 + 144 pairs",
        ),
        (["--pairs.positives-per-anchor", "0"], "positives"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(words, tmp_path, capsys, options, message):
    assert main([*words, *options, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "run").exists()


def test_a_missing_navigator_and_a_method_without_classes_are_named_before_a_step(words, tmp_path, capsys):
    words += ["--pretrain.data", "online", "--stages", "pretrain"]
    for options, message in (
        (["--pairs.positives", "navigator"], "--stages navigator"),
        (["--method", "supcon"], "cla"),
    ):
        out = tmp_path / options[-1]
        assert main([*words, *options, "--out", str(out)]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in line and not (out / "pretrain").exists()


def test_other_pairs_are_refused_on_the_way_and_there_are_none_to_verify(words, tmp_path, capsys):
    words += ["--pretrain.data", "online", "--pairs.positives", "gaussian", "navigator", "--pretrain.epochs", "1"]
    words += ["--out", str(tmp_path / "run")]
    assert main([*words, "--stages", "navigator", "pretrain"]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    (run / "pretrain" / "navigator" / "simclr" / "encoder.safetensors").unlink()
    shutil.copy(run / "navigator" / "kept" / "0000000000.safetensors", run / "navigator" / "navigator.safetensors")
    assert main([*words, "--stages", "pretrain"]) == 2, capsys.readouterr().err
    what = "pretrain/navigator/simclr was pretrained on other pairs: navigator_digest ("
    assert what in capsys.readouterr().err
    assert verify.main([str(run)]) == 2
    assert "drawn while training: there are no shards to verify" in capsys.readouterr().err


def test_queues_may_be_longer_than_an_epoch_of_endless_pairs(tmp_path):
    words = [*TINY, "--method", "nnclr", "--pairs.endless", "--pretrain.data", "online", "--method.options", "queue=96"]
    run = Run(parse(words), tmp_path, torch.device("cpu"))
    assert pretrain.make_learner(run.config, run.device).method.queue.rows.shape[0] == 96
