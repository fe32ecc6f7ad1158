"""The step as a CUDA graph: on the CPU everything but the graph itself, whose replay is there the step again."""

import contextlib
import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from copgen_fast.errors import CopgenError
from copgen_fast.generators import _optimize
from copgen_fast.presets import PRESETS
from copgen_fast.stages import Run, pretrain
from copgen_fast.stages import navigator as stage
from copgen_fast.training import cuda_graph, optimizers
from copgen_fast.training.loop import StepResult
from tests.helpers.host_reads import HostReads
from tests.helpers.on_gpu import needs_gpu, no_waiting
from tests.helpers.operators import Operators
from tests.stages.test_navigator import STEPS, make_players, state_of
from tests.stages.test_pretrain import make_learner

CPU = torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch):
    """Replays by running again; counts warm-ups and captures."""
    calls = []

    def warm_up(call, times):
        calls.append(times)
        for _ in range(times):
            call()

    def record(call):
        calls.append("capture")
        return call

    monkeypatch.setattr(cuda_graph, "warm_up", warm_up)
    monkeypatch.setattr(cuda_graph, "record", record)
    return calls


def graphed(players, update):
    step = lambda batch: STEPS[update](players, batch)  # noqa: E731
    return cuda_graph.GraphedStep(step, (players.f, players.T_z), (players.adam_f, players.adam_T), players.scaler)


def states(players):
    return {name: copy.deepcopy(holder.state_dict()) for name, holder in state_of(players).items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("update", STEPS)
@pytest.mark.parametrize("resumed", [False, True])
def test_it_is_the_step_whatever_the_warm_up_did(tmp_path, recorded, update, precision, resumed):
    plain, batches = make_players(tmp_path, precision, update=update, lr=1e-2, estimator_lr=1e-2)
    players, _ = make_players(tmp_path, precision, update=update, lr=1e-2, estimator_lr=1e-2)
    if resumed:
        STEPS[update](plain, batches[1])
        for name, holder in state_of(players).items():
            holder.load_state_dict(copy.deepcopy(state_of(plain)[name].state_dict()))
    step, random = graphed(players, update), torch.random.get_rng_state()
    for batch in (*batches, *batches):
        ours, theirs = step(batch), STEPS[update](plain, batch)
        assert {name: value.item() for name, value in ours.metrics.items()} == {
            name: value.item() for name, value in theirs.metrics.items()
        }
        torch.testing.assert_close(ours.watched, {k: v.detach() for k, v in theirs.watched.items()}, rtol=0, atol=0)
    torch.testing.assert_close(states(players), states(plain), rtol=0, atol=0)
    assert recorded == [cuda_graph.WARM_UP, "capture"]
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_capture_changes_nothing_and_moves_no_tensor(tmp_path, recorded):
    players, batches = make_players(tmp_path, "fp16", update="alternating", lr=1e-2, estimator_lr=1e-2)
    stage.alternating_step(players, batches[0])
    before = states(players)
    addresses = {id(p): p.data_ptr() for p in (*players.f.parameters(), *players.T_z.parameters())}
    averages = [value.data_ptr() for value in players.adam_T.state[next(players.T_z.parameters())].values()]
    graphed(players, "alternating").capture(batches[1])
    torch.testing.assert_close(states(players), before, rtol=0, atol=0)
    assert addresses == {id(p): p.data_ptr() for p in (*players.f.parameters(), *players.T_z.parameters())}
    assert averages == [value.data_ptr() for value in players.adam_T.state[next(players.T_z.parameters())].values()]
    groups = (*players.adam_T.param_groups, *players.adam_f.param_groups)
    assert not any(group["capturable"] for group in groups), "so that no step without a graph warns"


def test_metrics_of_a_step_outlive_the_next(tmp_path, recorded):
    players, batches = make_players(tmp_path, update="alternating", lr=1e-2, estimator_lr=1e-2)
    step = graphed(players, "alternating")
    first = step(batches[0]).metrics["loss_estimator"]
    value = first.item()
    static = step.numbers
    step.replay = lambda: static.fill_(7.0)  # as a graph does: into the same memory
    step(batches[1])
    assert first.item() == value


def test_it_copies_into_its_own_buffers_without_a_look_at_them(tmp_path, recorded):
    players, batches = make_players(tmp_path, update="alternating")
    step = graphed(players, "alternating")
    step(batches[0])
    addresses = [value.data_ptr() for value in cuda_graph.tensors(step.inputs)]
    assert not set(addresses) & {value.data_ptr() for value in cuda_graph.tensors(batches[0])}
    with HostReads() as reads:
        step(batches[1])
    assert reads.count == 0
    assert addresses == [value.data_ptr() for value in cuda_graph.tensors(step.inputs)]
    assert all(map(torch.equal, cuda_graph.tensors(step.inputs), cuda_graph.tensors(batches[1])))
    assert len(addresses) == 1 + 2 * len(list(cuda_graph.tensors(batches[0].params))), (
        "z, and the draws of t_x and t_x'"
    )


def test_tensors_of_a_dtype_are_copied_together(tmp_path):
    _, batches = make_players(tmp_path, update="alternating")
    static = cuda_graph.copied(batches[0])
    with Operators() as seen:
        cuda_graph.copy_into(static, batches[1])
    assert seen.names == {"_foreach_copy_": len({value.dtype for value in cuda_graph.tensors(static)})}
    assert all(map(torch.equal, cuda_graph.tensors(static), cuda_graph.tensors(batches[1])))


def test_another_shape_is_stepped_without_it_and_said_once(tmp_path, recorded, capsys):
    players, (batch, _) = make_players(tmp_path, update="alternating")
    step = graphed(players, "alternating")
    step(batch)
    n = len(batch.z)
    rows = slice(0, n - 1)
    params = {name: getattr(batch, name)[rows] for name in ("params", "params_prime")}
    shorter = dataclasses.replace(batch, z=batch.z[rows], **params)
    replayed = []
    step.replay = lambda: replayed.append(True)
    for _ in range(2):
        assert torch.isfinite(step(shorter).metrics["loss_estimator"])
    assert not replayed
    assert capsys.readouterr().out.splitlines() == [
        "graph: a batch of another shape than the captured one is stepped without it"
    ]


def test_a_step_that_no_graph_can_hold_is_named(tmp_path, monkeypatch):
    players, (batch, _) = make_players(tmp_path)

    def record(call):
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:  # as torch.cuda.graph ends a capture that failed
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graph, "warm_up", lambda call, times: call())
    monkeypatch.setattr(cuda_graph, "record", record)
    message = r"can't be captured as a CUDA graph \(CUDA error: operation not permitted .*\): run without it"
    with pytest.raises(CopgenError, match=message):
        graphed(players, "alternating")(batch)


def test_memory_that_is_too_small_is_said_to_be_that(tmp_path, monkeypatch):
    players, (batch, _) = make_players(tmp_path)

    def record(call):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:  # as torch.cuda.graph ends a capture that failed
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graph, "warm_up", lambda call, times: call())
    monkeypatch.setattr(cuda_graph, "record", record)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        graphed(players, "alternating")(batch)


@pytest.mark.parametrize(
    "capture",
    [cuda_graph.record, lambda call: _optimize.capture(lambda *_: call(), torch.ones(1, device="meta"), None)],
)
def test_a_capture_leaves_other_threads_alone(monkeypatch, capture):
    """Those that load batches: CUDA would refuse them memory and events, and the capture would fail."""
    modes = []

    def begin(graph, stream=None, capture_error_mode="global"):
        modes.append(capture_error_mode)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", begin)
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    capture(lambda: None)
    assert modes == ["thread_local"]


def test_what_stands_in_its_way_is_said(monkeypatch):
    weight = [torch.nn.Parameter(torch.ones(2))]
    fused, listed = (optimizers.adam(weight, 1e-3, (0.5, 0.999), impl, CPU) for impl in ("fused", "foreach"))
    cuda = torch.device("cuda")
    assert cuda_graph.obstacle(CPU, (fused,)) == "the run is on the CPU"
    assert cuda_graph.obstacle(cuda, (fused, listed)) == "it takes --optimizer.impl fused or auto"
    assert cuda_graph.obstacle(cuda, (fused,)) is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert cuda_graph.obstacle(cuda, (fused,)) == "the run has several processes"


def test_a_run_on_the_cpu_says_so_and_goes_on(tmp_path, capsys):
    options = {"batch": 16, "samples": 32, "delta": None, "graph": True}
    navigator = dataclasses.replace(PRESETS["quickstart"].navigator, **options)
    config = dataclasses.replace(PRESETS["quickstart"], navigator=navigator, out=str(tmp_path))
    stage.run(Run(config, tmp_path, CPU))
    assert "navigator.graph: not used, the run is on the CPU" in capsys.readouterr().out
    assert (tmp_path / "navigator" / "navigator.safetensors").exists()


@pytest.mark.parametrize(("method", "precision"), [("simclr", "fp16"), ("moco", "fp32"), ("byol", "fp32")])
def test_pretraining_by_a_graph_is_its_step(monkeypatch, recorded, method, precision):
    monkeypatch.setattr(cuda_graph, "obstacle", lambda *_: None)
    (plain, batches), (learner, _) = (make_learner(precision, method=method, batch=8) for _ in range(2))
    step = pretrain.make_step(learner, True, CPU)
    # Rates that a float32 holds, as the graph's does.
    for rate, batch in zip((0.125, 0.25, 0.0625), (*batches, batches[0]), strict=True):
        batch = dataclasses.replace(batch, lr=rate, progress=rate)
        ours, theirs = step(batch), pretrain.pretrain_step(plain, batch)
        torch.testing.assert_close(ours.metrics, theirs.metrics, rtol=0, atol=0)
        assert ours.watched.keys() == theirs.watched.keys()
    torch.testing.assert_close(learner.method.state_dict(), plain.method.state_dict(), rtol=0, atol=0)
    assert learner.sgd.param_groups[0]["lr"] == 0.0625 and isinstance(learner.sgd.param_groups[0]["lr"], float)
    assert recorded == [cuda_graph.WARM_UP, "capture"]


def test_what_keeps_pretraining_from_a_graph_is_said(monkeypatch, capsys):
    learner, _ = make_learner(method="negft", batch=8)
    pretrain.make_step(learner, True, CPU)
    monkeypatch.setattr(cuda_graph, "obstacle", lambda *_: None)
    pretrain.make_step(learner, True, CPU)
    assert capsys.readouterr().out.splitlines() == [
        "pretrain.graph: not used, the run is on the CPU",
        "pretrain.graph: not used, the method draws at random in each step",
    ]


@needs_gpu
def test_on_a_gpu_a_capture_goes_on_beside_a_thread_that_loads():
    x, started, done = torch.zeros(8, device="cuda"), threading.Event(), threading.Event()

    def load():
        kept = []
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.wait(1e-3):
                host = torch.ones(1 << 18, pin_memory=True)
                kept.append(host.to("cuda", non_blocking=True))  # more memory each time
                started.set()
        torch.cuda.synchronize()
        return sum(part.sum().item() for part in kept) == len(kept) << 18

    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load)
        started.wait()

        def call():
            for _ in range(200):
                x.add_(1)

        try:
            replay = cuda_graph.record(call)
        finally:
            done.set()
        assert loaded.result()
    replay()
    assert x.tolist() == [200.0] * 8


@needs_gpu
@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_pretraining_by_a_graph_on_a_gpu(monkeypatch, method):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    (plain, batches), (learner, _) = (make_learner("fp32", "cuda", method, batch=8) for _ in range(2))
    step = pretrain.make_step(learner, True, torch.device("cuda"))
    for batch in (*batches, *batches):
        ours, theirs = step(batch), pretrain.pretrain_step(plain, batch)
        torch.testing.assert_close(ours.metrics, theirs.metrics, rtol=1e-2, atol=1e-3)
    with no_waiting():
        step(batches[0])


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize("update", STEPS)
def test_a_graph_of_the_whole_step_on_a_gpu(tmp_path, monkeypatch, update, precision):
    # Sums in any order make gradients near 0 of either sign, of which Adam's first steps are as long as of any other.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    plain, batches = make_players(tmp_path, precision, device, update=update)
    players, _ = make_players(tmp_path, precision, device, update=update)
    step, random = graphed(players, update), torch.cuda.get_rng_state()
    for batch in (*batches, *batches, *batches):
        ours, theirs = step(batch), STEPS[update](plain, batch)
        assert isinstance(ours, StepResult)
        for name, value in theirs.metrics.items():
            torch.testing.assert_close(ours.metrics[name], value.detach().float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert players.scaler.get_scale() == plain.scaler.get_scale()
    torch.testing.assert_close(players.T_z.state_dict(), plain.T_z.state_dict(), rtol=1e-3, atol=1e-4)
    with no_waiting():
        step(batches[0])


@needs_gpu
def test_on_a_gpu_an_overflow_within_the_graph_moves_no_player(tmp_path):
    players, batches = make_players(tmp_path, "fp16", torch.device("cuda"), update="alternating")
    step = graphed(players, "alternating")
    step(batches[0])
    players.scaler.load_state_dict(players.scaler.state_dict() | {"scale": 2.0**40})
    before = [value.clone() for value in (*players.T_z.parameters(), *players.f.parameters())]
    step(batches[1])
    assert players.scaler.get_scale() == 2.0**38
    assert all(map(torch.equal, (*players.T_z.parameters(), *players.f.parameters()), before))
