import dataclasses
import json
import math
import re
import shutil

import pytest
import torch

from copgen_fast.config import MethodConfig, PretrainConfig
from copgen_fast.errors import UsageError
from copgen_fast.pairs.read import dali
from copgen_fast.pairs.read.batch import PairBatch, as_batch
from copgen_fast.presets import PRESETS
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.stages import Run
from copgen_fast.stages import pretrain as stage
from copgen_fast.stages.pretrain import learning_rate
from copgen_fast.train import main
from copgen_fast.training import loop
from copgen_fast.training.metrics import read_rows
from tests.conftest import TINY
from tests.helpers.host_reads import HostReads
from tests.helpers.on_gpu import needs_gpu, no_waiting
from tests.helpers.pairs_fixtures import forge, update_digest


def test_the_learning_rate_follows_its_curve():
    config = PretrainConfig(epochs=4, batch=224)
    peak = 0.02625  # lr 0.03 x 224 / 256
    rates = [learning_rate(config, step, 10) for step in range(40)]
    assert rates[0] == pytest.approx(peak)
    assert rates[20] == pytest.approx(peak / 1000 + (peak - peak / 1000) / 2)
    assert all(one > other for one, other in zip(rates, rates[1:], strict=False))
    assert rates[-1] > peak / 1000


def test_the_references_rule_is_one_rate_per_epoch_counted_from_one():
    config = PretrainConfig(epochs=100, batch=224, schedule="reference")
    for epoch in (1, 37, 100):
        rates = {learning_rate(config, step, 7) for step in range(7 * (epoch - 1), 7 * epoch)}
        expected = 2.625e-5 + (0.02625 - 2.625e-5) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert len(rates) == 1 and rates.pop() == pytest.approx(expected)


def test_the_learning_rate_rises_in_its_warm_up():
    config = PretrainConfig(epochs=6, batch=256, lr=0.4, warmup=1 / 3)
    rates = [learning_rate(config, step, 5) for step in range(30)]
    assert rates[:10] == pytest.approx([0.04 * step for step in range(1, 11)])
    shorter = PretrainConfig(epochs=4, batch=256, lr=0.4)
    assert rates[10:] == pytest.approx([learning_rate(shorter, step, 5) for step in range(20)])


def test_all_sources_start_alike_and_differ_by_their_positives(finished_run):
    losses = {}
    for name in ("identity", "gaussian", "untrained-navigator", "navigator"):
        rows = read_rows(finished_run / "pretrain" / name / "simclr" / "metrics.jsonl")
        assert len(rows) == 6  # 2 epochs of 48 // 16
        losses[name] = rows[0]["loss"]
    assert len(set(losses.values())) == 4
    assert losses["identity"] == min(losses.values()), "two views of one image agree most"


@pytest.mark.parametrize(
    ("harm", "code", "message"),
    [
        ("swapped pairs", 2, r"pairs/identity holds other pairs: positive \(gaussian there, identity here\)"),
        ("another navigator", 2, r"pairs/navigator holds other pairs: navigator_digest \("),
        ("another generator", 2, r"holds other pairs: generator_digest \("),
        ("altered generator.json", 1, r"generator.json is altered"),
        ("swapped encoders", 1, r"identity/simclr/encoder.safetensors is of source gaussian, not identity"),
        ("altered encoder", 1, r"gaussian/simclr/encoder.safetensors is altered: its tensors are not"),
        ("altered summary", 1, r"gaussian/simclr/summary.json is altered"),
        ("altered results", 1, r"probe/gaussian.json is altered"),
    ],
)
def test_files_in_each_others_place_and_altered_ones_are_named(copied_run, capsys, harm, code, message):
    run, stage = copied_run, "pretrain"
    if harm.startswith("swapped"):
        folder = run / harm.removeprefix("swapped ").replace("encoders", "pretrain")
        for old, new in (("identity", "spare"), ("gaussian", "identity"), ("spare", "gaussian")):
            (folder / old).rename(folder / new)
    if harm == "another navigator":
        shutil.copy(run / "navigator" / "kept" / "0000000000.safetensors", run / "navigator" / "navigator.safetensors")
    elif harm == "another generator":
        forge(run / "generator.json", lambda record: record.update(digest="0" * 64))
    elif harm == "altered generator.json":
        path = run / "generator.json"
        path.write_text(path.read_text().replace("digits", "digitt"))
    elif harm == "altered encoder":
        path = run / "pretrain" / "gaussian" / "simclr" / "encoder.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x40")
    elif harm == "altered summary":
        path = run / "pretrain" / "gaussian" / "simclr" / "summary.json"
        path.write_text(path.read_text().replace('"loss": ', '"loss": 1'))
    elif harm == "altered results":
        path = run / "probe" / "gaussian.json"
        path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))
    if "encoder" in harm:
        shutil.rmtree(run / "probe")
        stage = "probe"
    elif "summary" in harm or "results" in harm:
        stage = "report"
    assert main([*TINY, "--out", str(run), "--stages", stage]) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line


def test_real_images_are_the_simclr_baseline(tmp_path):
    options = "--pretrain.data real --pretrain.epochs 1 --pretrain.batch 256".split()
    arguments = [*TINY, "--out", str(tmp_path), *options]
    assert main([*arguments, "--stages", "pretrain", "probe", "report"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["probe.real.linear_top1"] > 0.2
    assert not (tmp_path / "pairs").exists()


HEADS = ("hidden=8", "dim=6", "predictor_hidden=4")
METHODS = {
    "simsiam": HEADS,
    "byol": HEADS,
    "moco": ("queue=20",),
    "nnclr": (*HEADS, "queue=20"),
    "moco with jigsaw": ("queue=20", "jigsaw=0.5"),
    "simclr with jigsaw": ("jigsaw=0.5",),
    "negft": ("mix=dimension", "extrapolate=True"),
    "negft in a queue": ("negatives=queue", "queue=20"),
}
"""Small options of every method with heads, a queue or random numbers of its own; its name is the first word."""


def make_learner(precision="fp32", device="cpu", method="simclr", **options):
    words = METHODS.get(method, ())
    config = dataclasses.replace(PRESETS["quickstart"], precision=precision)
    config = dataclasses.replace(config, method=MethodConfig(method.partition(" ")[0], words))
    narrow = dataclasses.replace(config.pretrain.encoder, width=8)
    options = {"augmentation": "digits", "encoder": narrow} | options
    config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, **options))
    device = torch.device(device)
    images = torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pair = PairBatch(*images, labels=torch.arange(8) // 4)
    labelled = stage.takes_labels(config.method.name)
    batches = [stage.make_batch(config, index, pair, 0.1, device, labelled=labelled) for index in range(2)]
    return stage.make_learner(config, device), batches


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("fp16", {}),
        ("fp16", {"accumulate": 2, "checkpoint": True}),
        ("fp32", {"method": "supcon"}),
        ("fp16", {"optimizer": "lars"}),
        *(("fp16", {"method": method, "batch": 8}) for method in METHODS),
        *(("bf16", {"method": method, "batch": 8, "accumulate": 2}) for method in METHODS),
    ],
)
def test_a_step_never_looks_at_a_value(precision, options):
    learner, batches = make_learner(precision, **options)
    stage.pretrain_step(learner, batches[0])
    with HostReads() as reads:
        stage.pretrain_step(learner, batches[1])
    assert reads.count == 0
    with HostReads() as reads:
        assert learner.scaler.get_scale() > 0  # a look, where there is a scale
    assert reads.count == (precision == "fp16")


@needs_gpu
@pytest.mark.parametrize("method", ["simclr", *METHODS])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_gpu(precision, method):
    learner, batches = make_learner(precision, "cuda", method, batch=8)
    stage.pretrain_step(learner, batches[0])
    with no_waiting():
        stage.pretrain_step(learner, batches[1])


def test_an_overflow_in_fp16_changes_no_weight_and_halves_the_scale():
    learner, batches = make_learner("fp16")
    stage.pretrain_step(learner, batches[0])
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 2.0**40})
    weights = [value.detach().clone() for value in learner.method.parameters()]
    stage.pretrain_step(learner, batches[1])
    assert all(torch.equal(a, b) for a, b in zip(learner.method.parameters(), weights, strict=True))
    assert learner.scaler.get_scale() == 2.0**39


def test_the_learning_rate_is_the_batchs():
    learner, (batch, _) = make_learner()
    result = stage.pretrain_step(learner, dataclasses.replace(batch, lr=0.25))
    assert learner.sgd.param_groups[0]["lr"] == 0.25 == result.metrics["lr"].item()


def test_the_supervised_loss_takes_real_labels_and_needs_some(finished_run, tmp_path):
    supervised = ["--method", "supcon", "--pretrain.epochs", "1", "--pretrain.batch", "256"]
    arguments = [*TINY, "--out", str(tmp_path), "--pretrain.data", "real", *supervised, "--stages", "pretrain"]
    assert main(arguments) == 0
    first = read_rows(tmp_path / "pretrain" / "real" / "supcon" / "metrics.jsonl")[0]["loss"]
    # A tenth of the batch is as near as the other view: about log(10) above the loss of one positive, which starts low.
    assert first > 5
    config = dataclasses.replace(PRESETS["quickstart"], method=MethodConfig("supcon"))
    with pytest.raises(UsageError, match="--method supcon needs classes, and the pairs in .*identity have none"):
        stage.open_dataset(Run(config, finished_run, torch.device("cpu")), "identity")


def test_a_batch_in_parts_with_sparing_stages_trains_too(finished_run, tmp_path):
    arguments = [*TINY, "--out", str(tmp_path), "--pairs.positives", "identity", "--stages", "pairs", "pretrain"]
    assert main([*arguments, "--pretrain.accumulate", "2", "--pretrain.checkpoint"]) == 0
    parts = read_rows(tmp_path / "pretrain" / "identity" / "simclr" / "metrics.jsonl")
    whole = read_rows(finished_run / "pretrain" / "identity" / "simclr" / "metrics.jsonl")
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.2), "batch statistics are a part's"
    assert parts[0]["loss"] != whole[0]["loss"] and len(parts) == len(whole)


def test_sparing_activations_changes_no_bit():
    (plain, batches), (sparing, _) = make_learner(), make_learner(checkpoint=True)
    for batch in batches:
        for learner in (plain, sparing):
            stage.pretrain_step(learner, batch)
    torch.testing.assert_close(sparing.method.state_dict(), plain.method.state_dict(), rtol=0, atol=0)


def test_bf16_runs_on_the_cpu(finished_run, tmp_path):
    config = dataclasses.replace(PRESETS["quickstart"])
    assert config.precision == "auto", "fp32 on the CPU"
    arguments = [*TINY, "--out", str(tmp_path), "--precision", "bf16", "--pairs.positives", "identity"]
    assert main([*arguments, "--stages", "pairs", "pretrain"]) == 0
    half = read_rows(tmp_path / "pretrain" / "identity" / "simclr" / "metrics.jsonl")[0]["loss"]
    full = read_rows(finished_run / "pretrain" / "identity" / "simclr" / "metrics.jsonl")[0]["loss"]
    assert half == pytest.approx(full, rel=0.05) and half != full
    assert torch.isfinite(torch.tensor(half))


def unfinished(finished_run, folder):
    """A copy of the run with one source's pretraining still to do."""
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "pretrain" / "identity")
    return [*TINY, "--out", str(folder), "--stages", "pretrain", "--pretrain.cache-gib", "0"]


def encoder_of(folder):
    return (folder / "pretrain" / "identity" / "simclr" / "encoder.safetensors").read_bytes()


def test_the_loader_may_change_at_each_resume_and_no_bit_with_it(finished_run, tmp_path, monkeypatch):
    arguments = unfinished(finished_run, tmp_path / "run")
    lossless = "dali" if dali.available() else "plain"
    for moment, name, workers in ((2, lossless, 2), (3, "plain", 0)):  # within an epoch, and at its end
        calls = iter(range(99))
        monkeypatch.setattr(loop, "stop_requested", lambda moment=moment, calls=calls: next(calls) >= 2 * (moment - 1))
        assert main([*arguments, "--pretrain.loader", name, "--pretrain.workers", str(workers)]) == 130
    monkeypatch.undo()
    assert main([*arguments, "--pretrain.loader", lossless]) == 0
    assert encoder_of(tmp_path / "run") == encoder_of(finished_run)


def test_windows_of_shards_are_another_order_and_another_run(finished_run, tmp_path, capsys):
    arguments = unfinished(finished_run, tmp_path / "run")
    assert main([*arguments, "--pretrain.shuffle-shards", "2"]) == 2
    assert "pretrain.shuffle_shards (None there, 2 here)" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:corrupt pair 20 skipped")
@pytest.mark.parametrize("name", ["plain", "dali"])
def test_a_run_that_stopped_at_a_corrupt_pair_goes_on_without_it(name, finished_run, tmp_path, capsys):
    if name == "dali" and not dali.available():
        pytest.skip("DALI is not installed")
    arguments = [*unfinished(finished_run, tmp_path / "run"), "--pretrain.loader", name]
    pairs = tmp_path / "run" / "pairs" / "identity"
    shard = pairs / "shard-000001.tar"
    data = shard.read_bytes()
    start = data.index(b"00000020.positive.png") + 512
    shard.write_bytes(data[:start] + b"no image" + data[start + 8 :])
    update_digest(pairs, shard.name, "")
    assert main(arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "shard-000001.tar: 00000020.positive.png does not decode" in line and "--pretrain.on-corrupt skip" in line
    assert main([*arguments, "--pretrain.on-corrupt", "skip"]) == 0
    summary = json.loads((tmp_path / "run" / "pretrain" / "identity" / "simclr" / "summary.json").read_text())
    assert summary["corrupt_pairs"] == 1 and summary["samples"] == 2 * 48


@pytest.mark.parametrize(
    ("method", "several"), [*((method, 1) for method in METHODS), ("simclr with jigsaw", 3), ("moco", 2)]
)
def test_methods_resume_to_the_same_bits_whatever_they_keep(method, several, tmp_path, monkeypatch):
    name, words = method.partition(" ")[0], METHODS.get(method, ())
    options = ["--method", name, *(["--method.options", *words] if words else [])]
    options += ["--pairs.positives", "gaussian", "--pairs.positives-per-anchor", str(several)]
    lars = [*options, "--pretrain.optimizer", "lars", "--stages", "pairs", "pretrain"]
    whole, parted = ([*TINY, "--out", str(tmp_path / word), *lars] for word in ("whole", "parted"))
    assert main(whole) == 0
    for _ in range(2):  # two steps each time: within an epoch, and when the queue went round
        calls = iter(range(99))
        monkeypatch.setattr(loop, "stop_requested", lambda calls=calls: next(calls) >= 2)
        assert main(parted) == 130
    monkeypatch.undo()
    assert main(parted) == 0
    left = [torch.load(tmp_path / of / "pretrain" / "gaussian" / name / "checkpoint.pt") for of in ("whole", "parted")]
    for part in ("method", "optimizer"):
        torch.testing.assert_close(*(x["state"][part] for x in left), rtol=0, atol=0)
    rows = read_rows(tmp_path / "parted" / "pretrain" / "gaussian" / name / "metrics.jsonl")
    assert rows == read_rows(tmp_path / "whole" / "pretrain" / "gaussian" / name / "metrics.jsonl")


@pytest.mark.parametrize("ranks", [stage.ALONE, Ranks(1, 2)])
def test_methods_of_pairs_take_one_of_several_positives_drawn_in_each_step(ranks):
    config = dataclasses.replace(PRESETS["quickstart"], method=MethodConfig("simsiam"))
    images = torch.arange(4 * 12, dtype=torch.uint8).view(4, 12, 1, 1, 1).expand(4, 12, 3, 8, 8)
    rows, chosen = ranks.rows(12), []
    for step in (0, 1, 0):
        pair = as_batch(images[:, rows], torch.zeros(12, dtype=torch.int64)[rows])
        anchors, positives = stage.make_batch(config, step, pair, 0.1, torch.device("cpu"), ranks).images.chunk(2)
        assert torch.equal(anchors, images[0, rows])
        numbers = positives[:, 0, 0, 0].int() - anchors[:, 0, 0, 0].int()
        assert (numbers % 12 == 0).all() and (numbers >= 12).all()
        chosen.append(numbers.tolist())
    assert len(set(chosen[0])) > 1 and chosen[0] != chosen[1] and chosen[0] == chosen[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nnclr", "--method.options", "queue=49"], "--method nnclr: a queue of 49 rows is larger than the data set"),
        (["nnclr", "--method.options", "queue=1438", "--pretrain.data", "real"], "larger than the data set of 1437"),
        (["simsiam", "--pretrain.accumulate", "16"], "leaves batch norm the statistics of one pair"),
        (["byol", "--method.options", "predictor_hidden=0"], "predictor_hidden: expected 1 or more"),
    ],
)
def test_methods_that_do_not_go_with_the_run_are_refused_in_one_line(words, message, tmp_path, capsys):
    assert main([*TINY, "--out", str(tmp_path / "run"), "--method", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "run").exists()


def test_a_collapse_is_warned_of_once(capsys):
    watch = stage.CollapseWatch("identity", stage.ALONE)
    for step, std in enumerate((0.9, 0.05, 0.04)):
        assert watch({"step": step, "loss": -1.0, "embedding_std": std}) is False
    assert not watch({"step": 3, "loss": 1.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: pretrain identity: step 1: the embeddings collapse")


def test_neighbours_are_compared_by_class_where_the_data_has_some(finished_run):
    config = dataclasses.replace(PRESETS["quickstart"], method=MethodConfig("nnclr"))
    run = Run(config, finished_run, torch.device("cpu"))
    for source, known in (("real", True), ("identity", False)):
        assert stage.has_classes(run, stage.open_dataset(run, source)) is known
    simclr = dataclasses.replace(run, config=PRESETS["quickstart"])
    assert not stage.has_classes(simclr, stage.open_dataset(simclr, "real"))
