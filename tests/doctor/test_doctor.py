"""The doctor: its report, the faults it finds, and its estimates for a tiny generator and encoder."""

import json
import math
import re

import pytest
import torch

from copgen_fast.config import EncoderConfig
from copgen_fast.doctor import __main__, accuracy, estimates, machine
from copgen_fast.doctor.estimates import Estimate, Work
from copgen_fast.generators.bigbigan import BigBiGAN
from copgen_fast.ops.backend import INSTALLED, backends, launcher_lacks, reason

CPU = torch.device("cpu")
TINY = EncoderConfig("resnet18", "half", width=8)


def test_the_quick_look_says_and_writes_what_it_found(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    assert __main__.main(["--quick", "--device", "cpu", "--json", str(file)]) == 0
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert set(found) == {"device", "machine", "backends", "accuracy"} and found["device"] == "cpu"
    assert set(found["backends"]) == set(backends())
    for op, choice in found["backends"].items():
        assert choice["backend"] == backends()[op]["cpu"] and choice["why"] in said
    assert {(check["op"], check["of"]) for check in found["accuracy"]} == {
        (op, of) for op in backends() for of in ("values", "gradients")
    }
    names = [fact["name"] for fact in found["machine"]]
    assert {"processor", "memory", "C++ compiler", "nvcc", "Triton", "DALI", "PNG", "JPEG", "simplejpeg"} <= set(names)
    assert all(name in said for name in names) and torch.__version__ in said


def test_an_unusable_device_is_refused(capsys):
    assert __main__.main(["--quick", "--device", "abacus"]) == 2
    assert "--device abacus is not usable here" in capsys.readouterr().err


def test_an_op_that_is_wrong_is_noticed(monkeypatch, capsys):
    right = accuracy.op_cases(CPU)["l2_normalize"]

    def wrong(x, backend):
        y = right.run(x, "reference")
        return y if backend == "reference" else y * (1 + 1e-5)

    monkeypatch.setattr(accuracy, "op_cases", lambda device: {"cond_norm": accuracy.OpCase(right.inputs, wrong)})
    monkeypatch.setattr(accuracy, "resolve", lambda *_, **__: "fused")
    assert __main__.main(["--quick", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("more than 2 times PyTorch's: report this") == 2


def test_errors_are_relative_and_as_large_as_they_are():
    def run(x, backend):
        return x[0] * (1 if x[0].dtype == torch.float64 else 1 + (3e-4 if backend == "ours" else 1e-4))

    case = accuracy.OpCase([torch.linspace(1, 2, 10, dtype=torch.float64)], run)
    for check in accuracy.compare("op", case, "ours", torch.float32):
        assert check.error == pytest.approx(3e-4, rel=1e-2) and check.pytorch == pytest.approx(1e-4, rel=1e-2)
        assert check.ratio == pytest.approx(3, rel=1e-2) and not check.passed


def test_pytorch_is_as_exact_as_its_precision_in_every_check():
    """An error beyond that comes of a value at a kink, and would hide errors of ours that are as large."""
    checks = list(accuracy.checks(CPU))
    assert {check.op for check in checks} == set(backends())
    for check in checks:
        assert check.pytorch < 10 * torch.finfo(torch.float32).eps, check


@pytest.mark.parametrize("op", ["augment", "rand_augment"])
def test_a_small_fault_of_one_picture_is_noticed(op):
    case = accuracy.op_cases(CPU)[op]

    def wrong(x, backend):
        y = case.run(x, "reference")
        if backend == "wrong":
            y = torch.cat([y[:1] * (1 + 1e-4), y[1:]])
        return y

    assert not any(x.passed for x in accuracy.compare(op, accuracy.OpCase(case.inputs, wrong), "wrong", torch.float32))


def test_pictures_at_a_kink_are_found():
    """At a clamp's bound, and where two channels are nearly equal."""
    pictures = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)[:, None, None].repeat(4, 1, 2, 2)
    pictures[1, 0, 0, 0] = 1 - 1e-6
    pictures[2, 0, 0, 0] = 1 - 1e-4
    pictures[3, 1, 1, 1] = 0.3 + 1e-6
    assert accuracy.away_from_kinks(pictures, lambda x: x.clamp(0, 1)).tolist() == [True, False, True, True]
    assert accuracy.away_from_kinks(pictures, lambda x: x.amin(1)).tolist() == [True, True, True, False]


def test_what_is_missing_says_what_it_is_for():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.shutil, "which", lambda name: None)
        launcher_lacks.cache_clear()
        facts = {fact.name: fact for fact in machine.facts(CPU)}
    launcher_lacks.cache_clear()
    assert facts["nvcc"].found is None and str(facts["nvcc"]).startswith("missing: set CUDA_HOME")
    assert "GB available" in str(facts["memory"])


def test_the_reason_names_what_would_be_faster(monkeypatch):
    assert "the fastest" in reason("l2_normalize", "cpu")
    assert reason("cond_norm", "meta") == "there is no faster one for meta"
    monkeypatch.setattr("copgen_fast.ops.backend.INSTALLED", {"reference", "chunked"})
    assert reason("cond_norm", "cpu").startswith("not cpp: the C++ extension is not built")
    monkeypatch.setattr("copgen_fast.ops.backend.INSTALLED", {"triton", "cuda", "chunked", "reference"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert "not triton: sm_80 and newer" in reason("info_nce", "cuda")
    assert reason("info_nce", "cuda", dtype=torch.float16).startswith("not triton: sm_80")


# Estimates.


def works():
    torch.manual_seed(0)
    G = BigBiGAN(2, 16).eval().requires_grad_(False).rewritten().eval()
    yield estimates.navigator_work_of(G, TINY, "tiny", CPU)
    yield estimates.pretrain_work_of(TINY, "tiny", 16, CPU)
    yield estimates.probe_work_of(TINY, "tiny", 16, CPU)


STAGES = (("navigator", 200_000), ("pretrain", 130_000_000), ("linear-augmented", 76_870_020))


@pytest.mark.parametrize("index", range(3), ids=[name for name, _ in STAGES])
def test_a_tiny_run_is_estimated(index):
    work = list(works())[index]
    found = estimates.estimate(work, CPU, seconds=0)
    assert (found.name, found.samples) == STAGES[index]
    assert found.steps == 2 and found.batch == estimates.BATCHES["cpu"][1]
    assert 0 < found.fastest <= found.seconds <= found.slowest
    assert found.hours == pytest.approx(found.seconds * found.samples / 3600)
    assert found.what == "tiny, fp32" and f"{found.samples:,} samples" in str(found)
    assert (index < 2) or re.search("preset imagenet100: .* for 7,601,340 samples", str(found))


def test_steps_train_on_something_new_each_time():
    game_work, *_ = works()
    step = game_work.step(2)
    first, second = step(), step()
    assert first.metrics["loss_estimator"] != second.metrics["loss_estimator"]
    assert not torch.equal(first.watched["latents"], second.watched["latents"])


def test_steps_fill_the_time_there_is(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: next(clock))
    assert estimates.timed(lambda: None, CPU, 5.5) == [1] * 5
    assert estimates.timed(lambda: None, CPU, 0.0) == [1] * 2


def test_the_largest_batch_is_on_the_line_through_two():
    assert estimates.largest_batch({2: 30.0, 6: 70.0}, 1010.0) == 100
    assert estimates.largest_batch({6: 70.0, 2: 30.0}, 1009.0) == 99
    assert estimates.largest_batch({2: 50.0, 6: 50.0}, 1000.0) is None


def test_the_batch_that_fits_is_what_a_batch_takes(monkeypatch):
    """A step that holds 80 MB a sample beside 160, where 8200 MB are available; a process's peak is a few MB off."""
    monkeypatch.setattr(estimates, "available_memory", lambda device: 8200.0)

    def step(batch):
        return lambda: torch.ones(40_000_000 + 20_000_000 * batch)

    found = estimates.estimate(Work("memory", "ones", 1000, 10, step), CPU, seconds=0)
    assert math.isclose(found.largest_batch, (0.95 * 8200 - 160) / 80, rel_tol=0.1)
    assert "largest batch: about" in str(found)
    monkeypatch.setattr(estimates, "available_memory", lambda device: None)
    found = estimates.estimate(Work("memory", "ones", 1000, 10, step), CPU, seconds=0)
    assert found.largest_batch is None and "memory cannot be measured here" in str(found)


def test_durations_are_given_in_readable_units():
    made = {"name": "n", "what": "w", "samples": 3600, "batch": 2, "steps": 3, "peak_mb": {}, "available_mb": None}
    for seconds, text in ((0.5, "30 min for 3,600"), (5, "5.0 h for"), (100, "4.2 days for"), (1e5, "4,167 days for")):
        found = Estimate(**made, seconds=seconds, fastest=seconds, slowest=seconds, hours=seconds, largest_batch=None)
        assert text in str(found)


@pytest.mark.skipif("cpp" not in INSTALLED, reason="the C++ extension is not built")
def test_every_op_here_is_accurate():
    assert all(check.passed for check in accuracy.checks(CPU))
