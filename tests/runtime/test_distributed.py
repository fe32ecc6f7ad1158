"""Several processes compute what one does on the same batch, and end together when one of them can't go on."""

import dataclasses
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from copgen_fast import train
from copgen_fast.errors import UsageError
from copgen_fast.presets import PRESETS
from copgen_fast.record import identity
from copgen_fast.runtime import distributed
from copgen_fast.runtime.artifacts import read_json
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.training.metrics import read_rows
from tests.helpers import distributed_ranks, killed_ranks, processes
from tests.helpers.distributed_ranks import CPU, STEPS, TINY, N

SEVERAL = ("several positives", "several positives of classes", "one of several positives")
CASES = ("alternating", "simultaneous", "pretrain", "supervised, checkpointed", "steering", *SEVERAL)
CASES += (*distributed_ranks.METHODS,)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank computed, and the folder it did it in."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = processes.run_ranks(distributed_ranks.rank_main, request.param, processes.free_ports(3), folder)
    assert not any("unused_parameters" in rank.stderr for rank in ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)], folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([*TINY, "--out", str(folder / "run")]) == 0
    results = distributed_ranks.everything(Ranks(), folder)
    torch.set_num_threads(threads)
    return results, folder


@pytest.mark.parametrize("case", CASES)
def test_curve_and_weights_are_those_of_one_process(ranks, whole, case):
    curve, weights = whole[0][case]
    assert curve.shape[0] == STEPS
    for other_curve, other_weights in (rank[case] for rank in ranks[0]):
        torch.testing.assert_close(other_curve, curve, rtol=1e-6, atol=1e-9)
        assert list(other_weights) == list(weights), "state dicts keep their names"
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_bit_equal(ranks, case):
    first, *others = (rank[case][1] for rank in ranks[0])
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


def test_gradient_over_one_processs_is_one(ranks, whole):
    """Norm of each parameter's gradient, distributed / single, in float64."""
    expected = whole[0]["gradients"]
    for rank in ranks[0]:
        for name, gradient in rank["gradients"].items():
            assert gradient.norm() / expected[name].norm() == pytest.approx(1, abs=1e-6)
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-10)


def test_gradient_in_parts_over_one_processs_is_one(ranks, whole):
    expected = whole[0]["gradients, in parts"]
    for rank in ranks[0]:
        torch.testing.assert_close(rank["gradients, in parts"], expected, rtol=1e-9, atol=1e-12)


def test_a_head_with_batch_norm_over_rows_is_that_of_one_process(ranks, whole):
    expected, world = whole[0]["head"], len(ranks[0])
    for rank, found in enumerate(result["head"] for result in ranks[0]):
        own = expected["outputs"][Ranks(rank, world).joint_rows(N)]
        torch.testing.assert_close(found, expected | {"outputs": own}, rtol=1e-9, atol=1e-12)


def test_per_rank_batch_norm_has_each_ranks_own_statistics(ranks, whole):
    mean = "encoder.bn1.running_mean"
    of_ranks = [rank["per-rank"][1][mean] for rank in ranks[0]]
    assert not torch.equal(of_ranks[0], of_ranks[1])
    assert all(not torch.allclose(own, whole[0]["alternating"][1][mean], rtol=1e-3) for own in of_ranks)
    weights = [rank["per-rank"][1]["encoder.conv1.weight"] for rank in ranks[0]]
    assert all(torch.equal(weight, weights[0]) for weight in weights), "weights are shared all the same"


def test_loss_scaling_overflows_on_all_ranks_or_none(ranks):
    for weight, scale in (rank["overflow"] for rank in ranks[0]):
        assert torch.equal(weight, torch.ones(3)) and scale == 2.0


def test_sigterm_on_one_rank_stops_all_after_the_same_step(ranks, whole):
    for rank in ranks[0]:
        assert rank["stopped"].startswith("Interrupted: test: stopped at step 10, state saved")
        assert rank["resumed"] == 20
        for name, value in rank["weights"].items():
            assert torch.equal(value, ranks[0][0]["weights"][name])


def test_a_nan_on_one_rank_stops_all_and_is_named(ranks):
    last = len(ranks[0]) - 1
    for rank in ranks[0]:
        assert rank["nan"].startswith(f"NonFiniteError: test: NaN or infinity in inputs at step 7 on rank {last};")


def test_folders_that_are_not_shared_are_noticed(ranks):
    steps = ", ".join(["0"] * (len(ranks[0]) - 1) + ["10"])
    for rank in ranks[0]:
        assert f"would go on from different steps ({steps}, by rank)" in rank["elsewhere"]


def rows_of(folder, stage):
    return read_rows(folder / stage / "metrics.jsonl")


def test_online_pairs_are_those_that_one_process_draws(ranks, whole):
    """Each rank draws its rows, and the encoder becomes that of one process."""
    expected = whole[0]["online"]
    assert len(expected) == 6
    for (numbers, images), *parts in zip(expected, *(rank["online"] for rank in ranks[0]), strict=True):
        assert torch.equal(torch.cat([own for own, _ in parts]), numbers)
        assert torch.equal(torch.cat([own.unflatten(0, (2, -1)) for _, own in parts], 1).flatten(0, 1), images)
    stage = "pretrain/gaussian/simclr"
    rows, others = (rows_of(of / "online", stage) for of in (whole[1], ranks[1]))
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-3)
    one, other = (load_file(of / "online" / stage / "encoder.safetensors") for of in (whole[1], ranks[1]))
    # Ranks add up losses in another order, and float32's gradients of few pairs are 1e-5 from the exact ones. Biases
    # began at 0 and are made by the steps alone: with a row of another pair they would have nothing in common.
    assert {name for name in one if name.endswith("bias")}
    for name, value in one.items():
        if value.is_floating_point():
            limit = 0.03 if name.endswith("bias") else 2e-3
            assert (other[name] - value).norm() <= limit * value.norm(), name
        else:
            assert other[name].equal(value), name


by_two = pytest.mark.parametrize("ranks", [2], indirect=True)  # who alone run the command


@by_two
def test_the_command_leaves_what_one_process_leaves(ranks, whole):
    results, folder = ranks
    assert [rank["exit codes"][0] for rank in results] == [0, 0]

    def files(of):
        return {str(path.relative_to(of)) for path in (of / "run").rglob("*") if "tensorboard" not in path.parts}

    assert files(folder) == files(whole[1])
    pairs = read_json(folder / "run" / "pairs" / "navigator" / "summary.json")
    assert (pairs["written"], pairs["count"]) == (48, 48), "each rank its own, and together all"
    for stage, loss in (("navigator", "loss_estimator"), ("pretrain/navigator/simclr", "loss")):
        rows, expected = (rows_of(of / "run", stage) for of in (folder, whole[1]))
        assert [row["samples"] for row in rows] == [row["samples"] for row in expected]
        assert [row[loss] for row in rows] == pytest.approx([row[loss] for row in expected], rel=1e-3)


@by_two
def test_a_run_of_two_processes_goes_on_with_one(ranks, whole, tmp_path):
    results, folder = ranks
    assert [rank["exit codes"][1] for rank in results] == [130, 130]
    run = tmp_path / "run"
    shutil.copytree(folder / "stopped", run)
    checkpoint = torch.load(run / "navigator" / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["step"] == 3, "stopped after the step in which it was asked to"
    assert train.main([*TINY, "--out", str(run), "--stages", "navigator"]) == 0
    rows, expected = rows_of(run, "navigator"), rows_of(whole[1] / "run", "navigator")
    assert rows[:3] == rows_of(folder / "run", "navigator")[:3]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)


@by_two
def test_a_killed_worker_is_started_again_to_the_same_result(ranks, tmp_path):
    """torchrun's agent: SIGKILL for rank 1 in an epoch; it starts both again, and they end bit-equal."""
    _, folder = ranks
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    child = processes.run(killed_ranks.launch, [*TINY, "--out", str(tmp_path / "run")])
    assert child.code == 0 and "unused_parameters" not in child.stderr, child.stderr
    assert "rank 1 gives no sign of life" in child.stderr
    for name in ("encoder.safetensors", "metrics.jsonl"):
        restarted, uninterrupted = (
            of / "run" / "pretrain" / "navigator" / "simclr" / name for of in (tmp_path, folder)
        )
        assert restarted.read_bytes() == uninterrupted.read_bytes()


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = PRESETS["quickstart"]
    with pytest.raises(UsageError, match="navigator.batch: 64 rows are not divisible by 3 processes: choose a mult"):
        train.validate(config)
    train.validate(dataclasses.replace(config, stages=("pairs", "probe")))


def test_per_rank_statistics_tie_a_run_to_its_number_of_processes(tmp_path):
    config = dataclasses.replace(PRESETS["quickstart"], bn="per-rank")
    train.record_run(config, tmp_path, CPU, Ranks(0, 2))
    (tmp_path / "navigator").mkdir()
    train.record_run(config, tmp_path, CPU, Ranks(0, 2))
    with pytest.raises(UsageError, match=r"processes \(2 there, 4 here\) \(batch norm's statistics depend on it"):
        train.record_run(config, tmp_path, CPU, Ranks(0, 4))
    synced = dataclasses.replace(config, bn="sync")
    in_parts = dataclasses.replace(synced, pretrain=dataclasses.replace(synced.pretrain, accumulate=2))
    assert identity(synced, 2) == identity(synced, 4)
    assert identity(in_parts, 2) != identity(in_parts, 4)


def test_a_process_that_is_not_told_who_it_is_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    assert "WORLD_SIZE is 2 and RANK is not set: start the processes by torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_of_several_leaves_after_any_exceptions_traceback(monkeypatch, capsys):
    """Rather than end the interpreter, which may wait for a collective; `leave` gets the exit code."""
    monkeypatch.setattr(train, "validate", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(TINY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(TINY) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_only_the_process_that_probes_needs_the_data(monkeypatch):
    config = PRESETS["cifar10"]
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    train.validate(config)
    with pytest.raises(UsageError, match="needs --data.root"):
        train.validate(dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, data="real")))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="needs --data.root"):
        train.validate(config)


def test_rows_are_the_ranks_part_of_both_views():
    joint = torch.cat([Ranks(rank, 4).joint_rows(N) for rank in range(4)])
    assert sorted(joint.tolist()) == list(range(2 * N))
    assert Ranks(1, 4).joint_rows(N).tolist() == [2, 3, N + 2, N + 3]
    assert Ranks().joint_rows(N) == slice(None)


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device("auto") == "auto"
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert distributed.local_device("auto") == distributed.local_device("cuda") == "cuda:1"
    assert distributed.local_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda:0 names one device for 2 processes"):
        distributed.local_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=re.escape("2 processes on this host need as many GPUs, it has 2")):
        distributed.local_device("auto")


@pytest.mark.parametrize(
    "message",
    [
        "Application timeout caused pair closure",  # out of DDP's backward, where gloo names no file
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1",
        "Connection reset by peer",
        "Timed out waiting 8000ms for recv operation to complete",
        "NCCL error: unhandled system error",
    ],
)
def test_a_collective_that_failed_is_told_from_other_errors(message):
    assert distributed.is_collective_error(RuntimeError(message))
    assert not distributed.is_collective_error(ValueError(message))
    assert not distributed.is_collective_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
