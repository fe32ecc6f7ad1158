"""A class-conditional generator through the stages, supervised: the paper's extension, in seconds."""

import json
from pathlib import Path

import pytest
import torch

from copgen_fast import generators
from copgen_fast.augmentations import make_views
from copgen_fast.files import sha256
from copgen_fast.ops import info_nce
from copgen_fast.pairs.format import to_uint8
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run, pretrain
from copgen_fast.train import main as train
from copgen_fast.train import parse
from copgen_fast.training.metrics import read_rows
from copgen_fast.verify import main as verify
from tests.conftest import TINY
from tests.helpers.biggan_fixtures import write_folder

pytest.importorskip("pytorch_pretrained_biggan")

OPTIONS = """--generator.name biggan-deep --generator.options truncation=0.4 --navigator.loss supcon
    --method supcon --pairs.samples-per-class 4 --pairs.positives navigator identity --pretrain.epochs 1
    --probe.evals knn""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    weights = write_folder(folder / "weights")
    arguments = [*TINY, *OPTIONS, "--generator.weights", str(weights), "--out", str(folder / "run")]
    assert train([*arguments, "--stages", "navigator", "pairs", "pretrain"]) == 0
    return folder / "run", arguments


def test_pair_i_is_of_its_pseudo_class(run):
    folder, arguments = run
    pairs = PairDataset(folder / "pairs" / "navigator")
    records = [pairs.record(index) for index in range(48)]
    assert [record["pseudo_class"] for record in records] == [index // 4 for index in range(48)]
    assert [record["label"] for record in records] == [index // 4 % 5 for index in range(48)]
    assert pairs.index.identity["classes"] == 5 and pairs.index.identity["truncation"] == 0.4
    z = artifacts.read_tensors(folder / "pairs" / "navigator" / "shard-000001.safetensors")
    weights = arguments[arguments.index("--generator.weights") + 1]
    generator = generators.build("biggan-deep", weights, ["truncation=0.4"])
    label = torch.tensor([records[20]["label"]])
    for name, image in zip(("z", "z_positive"), pairs[20][:2], strict=True):
        expected = to_uint8(generator(z[name][4:5], label))[0]
        assert (image.int() - expected.int()).abs().max() <= 1
        other = to_uint8(generator(z[name][4:5], (label + 1) % 5))[0]
        assert (image.int() - other.int()).abs().max() > 5


def test_they_are_made_again_from_their_seeds(run, capsys):
    assert verify([str(run[0]), "--samples", "20", "--device", "cpu"]) == 0
    assert "navigator: 3 shards as recorded; 20 pairs made again" in capsys.readouterr().out


def test_what_made_them_is_recorded(run):
    folder, arguments = run
    record = json.loads((folder / "generator.json").read_text())
    weights = arguments[arguments.index("--generator.weights") + 1]
    assert record["name"] == "biggan-deep" and record["weights"] == f"{weights}/pytorch_model.bin"
    assert record["sha256"] == sha256(Path(weights, "pytorch_model.bin"))
    index = json.loads((folder / "pairs" / "navigator" / "index.json").read_text())
    assert index["identity"]["generator_digest"] == record["digest"]


def test_the_supervised_loss_of_the_pairs_labels_is_what_was_minimised(run):
    folder, arguments = run
    config, device = parse(arguments), torch.device("cpu")
    dataset = pretrain.open_dataset(Run(config, folder, device), "navigator")
    pair = pretrain.open_batches(dataset, config.pretrain, config.seed, device)(0)
    assert len(set(pair.labels.tolist())) > 2
    learner = pretrain.make_learner(config, device)
    batch = pretrain.make_batch(config, 0, pair, 0.1, device)
    v = make_views(batch.images, batch.params, learner.policy)
    anchors, positives = learner.method(v)[0].detach().chunk(2)
    options = {"temperature": 0.1, "base_temperature": 0.07, "backend": "reference"}
    logged = read_rows(folder / "pretrain" / "navigator" / "supcon" / "metrics.jsonl")[0]["loss"]
    assert logged == pytest.approx(info_nce(anchors, positives, labels=pair.labels, **options).item(), rel=1e-5)
    assert logged != pytest.approx(info_nce(anchors, positives, **options).item(), rel=1e-3)


def test_the_report_draws_its_classes(run):
    folder, arguments = run
    assert train([*arguments, "--stages", "probe", "report"]) == 0
    assert "Samples of the generator" in (folder / "report.html").read_text()
