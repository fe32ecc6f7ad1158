"""Files of a finished run with flipped bits and swapped types: a clear error, or what the file says is the same.

Seeded and bounded: every kind of file that a run leaves and reads back, each by what reads it.
"""

import functools
import json
import random
from types import SimpleNamespace

import pytest
import torch

from copgen_fast import positives, train
from copgen_fast.errors import CopgenError
from copgen_fast.pairs.format import check_shards, read_complete_index
from copgen_fast.pairs.read.dataset import PairDataset
from copgen_fast.record import expect_valid, from_identity
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run, pretrain, probe, report
from copgen_fast.training import checkpoints
from copgen_fast.training.metrics import read_rows
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = train.parse(TINY)
FLIPS, SWAPS = 40, 60
STRANGE = (None, True, -1, 3, 2.5, 2**63, float("nan"), "text", "", [], {}, [[]], {"a": 1}, "x" * 10**4)


def run_of(folder):
    return Run(CONFIG, folder, CPU)


# What reads each kind of file; the value is what the file says.


def read_config(folder):
    values = artifacts.read_json(folder / "config.json")
    expect_valid(values, folder / "config.json")
    with train.open_run(from_identity(values), CPU):
        return from_identity(values)


def read_encoder(folder):
    return artifacts.tensors_digest(probe.open_encoder(run_of(folder), "gaussian").state_dict())


def read_navigator(folder):
    G = SimpleNamespace(latent_dim=64, latent_groups=())
    setting = run_of(folder).setting(G, None)
    return positives.build("navigator", setting)(torch.ones(1, 64), [0]).tolist()


@functools.cache
def learner_of_gaussian():
    return pretrain.make_learner(CONFIG, CPU)


def read_checkpoint(folder):
    learner = learner_of_gaussian()
    state = {"method": learner.method, "optimizer": learner.sgd, "scaler": learner.scaler}
    path = folder / "pretrain" / "gaussian" / "simclr" / "checkpoint.pt"
    position = checkpoints.restore(path, "pretrain gaussian", state, 6)
    momenta = {str(i): value["momentum_buffer"] for i, value in learner.sgd.state_dict()["state"].items()}
    return position, artifacts.tensors_digest(learner.method.state_dict() | momenta)


def read_pairs(folder):
    pairs = PairDataset(folder / "pairs" / "gaussian")
    index = read_complete_index(pairs.folder)
    check_shards([(pairs.folder, shard) for shard in index.shards])
    return index, sum(int(pair[0].sum()) for pair in pairs)


def read_unchecked_pairs(folder):
    pairs = PairDataset(folder / "pairs" / "gaussian", check=False)
    return [pairs.record(i) for i in range(16)], [pairs[i][2] for i in range(16)]


def read_results(folder):
    return report.read_results(run_of(folder))


def read_summaries(folder):
    run = run_of(folder)
    results = report.read_results(run)
    return report.collect_metrics(run, results), report.speeds(run, results)


def read_log(folder):
    return read_rows(folder / "navigator" / "metrics.jsonl")


CHECKED = {
    "config.json": read_config,
    "navigator/navigator.safetensors": read_navigator,
    "navigator/summary.json": read_summaries,
    "pairs/gaussian/index.json": read_pairs,
    "pairs/gaussian/shard-000001.tar": read_pairs,
    "pairs/gaussian/shard-000001.safetensors": read_pairs,
    "pairs/gaussian/summary.json": read_summaries,
    "pretrain/gaussian/simclr/checkpoint.pt": read_checkpoint,
    "pretrain/gaussian/simclr/encoder.safetensors": read_encoder,
    "pretrain/gaussian/simclr/summary.json": read_summaries,
    "probe/gaussian.json": read_results,
}
"""What can't be altered unseen, whatever bit flips."""
UNCHECKED = {"navigator/metrics.jsonl": read_log, "pairs/gaussian/shard-000000.tar": read_unchecked_pairs}
"""A log, which no result depends on, and shards that are read without comparing their digests."""


def harms(path, random, count):
    """The file's bytes with one to three flipped bits, sometimes cut short."""
    data = path.read_bytes()
    for number in range(count):
        harmed = bytearray(data[: random.randrange(len(data))] if number % 8 == 7 else data)
        for _ in range(random.randint(1, 3) if harmed else 0):
            # Half of them near an end, where the structure is.
            at = random.choice((random.randrange(len(harmed)), random.randrange(min(512, len(harmed)))))
            harmed[random.choice((at, -1 - at))] ^= 1 << random.randrange(8)
        yield bytes(harmed)


@pytest.mark.parametrize("name", [*CHECKED, *UNCHECKED])
def test_flipped_bits_end_in_a_clear_error_or_change_nothing(copied_run, name):
    path, read = copied_run / name, (CHECKED | UNCHECKED)[name]
    expected, errors, flips = read(copied_run), 0, FLIPS // 3 if name == "config.json" else FLIPS
    config = (copied_run / "config.json").read_bytes()
    for harmed in harms(path, random.Random(name), flips):
        path.write_bytes(harmed)
        try:
            found = read(copied_run)
        except CopgenError as error:
            errors += 1
            assert "\n" not in str(error) and len(str(error)) < 2000
        else:
            assert name in UNCHECKED or name == "config.json" or found == expected
        (copied_run / "config.json").write_bytes(config)
    assert errors > flips / 8


def swapped(values, random):
    """JSON values with another type or value, a missing or a further field, at one random place."""
    values = json.loads(json.dumps(values))
    parent, place = None, None
    here = values
    while isinstance(here, (dict, list)) and here and (parent is None or random.random() < 0.8):
        place = random.choice(list(here) if isinstance(here, dict) else range(len(here)))
        parent, here = here, here[place]
    if parent is None or random.random() < 0.05:
        return random.choice(STRANGE)
    change = random.random()
    if change < 0.15:
        del parent[place]
    elif change < 0.25 and isinstance(parent, dict):
        parent["further"] = random.choice(STRANGE)
    else:
        parent[place] = random.choice(STRANGE)
    return values


@pytest.mark.parametrize("name", [name for name in CHECKED if name.endswith(".json")])
def test_swapped_types_end_in_a_clear_error_or_are_read(copied_run, name):
    path, read, stream = copied_run / name, CHECKED[name], random.Random(name)
    values = json.loads(path.read_text())
    values.pop("record_sha256", None)  # as one who alters it on purpose would
    config, errors = (copied_run / "config.json").read_bytes(), 0
    swaps = SWAPS // 3 if name == "config.json" else SWAPS
    for _ in range(swaps):
        path.write_text(json.dumps(swapped(values, stream)))
        try:
            read(copied_run)
        except CopgenError as error:
            errors += 1
            assert "\n" not in str(error) and len(str(error)) < 2000
        (copied_run / "config.json").write_bytes(config)
    assert errors > swaps / 4


def test_swapped_types_in_checkpoints_end_in_a_clear_error_or_are_read(copied_run):
    path, stream, errors = copied_run / "pretrain/gaussian/simclr/checkpoint.pt", random.Random(0), 0
    content = artifacts.read_checkpoint(path)
    strange = (*STRANGE, torch.ones(2), torch.ones(1, dtype=torch.int64), (), (1, 2))
    for _ in range(SWAPS):
        here = altered = copy_of(content)
        while True:
            place = stream.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if not (isinstance(here[place], (dict, list)) and here[place]) or stream.random() < 0.2:
                break
            here = here[place]
        here[place] = stream.choice(strange)
        artifacts.write_checkpoint(path, altered)
        try:
            read_checkpoint(copied_run)
        except CopgenError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > SWAPS / 2


def copy_of(value):
    if isinstance(value, dict):
        return {name: copy_of(item) for name, item in value.items()}
    return [copy_of(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["config.json", "pairs/identity/index.json", "generator.json"])
def test_commands_end_in_one_line_and_an_exit_code(copied_run, name, capsys):
    path, stream = copied_run / name, random.Random(name)
    data = path.read_bytes()
    for harmed in harms(path, stream, 3):
        path.write_bytes(harmed)
        code = train.main([*TINY, "--out", str(copied_run), "--stages", "pretrain"])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("copgen_fast: ")]
        assert code in (0, 1, 2) and len(errors) == (code > 0)
        path.write_bytes(data)
