"""InfoNCE on a GPU by every backend: values, launches, synchronisation, CUDA graphs."""

import pytest
import torch

from copgen_fast.ops import info_nce
from copgen_fast.ops.backend import INSTALLED, resolve
from tests.helpers.on_gpu import captured, needs_gpu, no_waiting

pytestmark = needs_gpu

BACKENDS = [name for name in ("triton", "cuda", "chunked") if name in INSTALLED]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def embeddings(n, d, dtype):
    rows = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0))
    return [x.to("cuda", dtype).requires_grad_() for x in rows]


def both_ways(inputs, **options):
    loss = info_nce(*inputs, **options)
    return [loss, *torch.autograd.grad(loss, inputs)]


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (97, 113), (224, 128), (2500, 64), (40, 2048)])
def test_equals_the_definition(backend, dtype, symmetric, temperature, n, d):
    if backend == "triton" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton has no matrix instruction here")
    inputs = embeddings(n, d, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    options = {"symmetric": symmetric, "temperature": temperature}
    ours = both_ways(inputs, **options, backend=backend)
    exact = both_ways(exact_inputs, **options, backend="reference")
    tolerance = TOLERANCE[torch.float16 if backend == "cuda" and dtype == torch.float32 else dtype] * 0.1 / temperature
    # A gradient of 0, of one pair, is a difference of equal terms of this size, each rounded by some 2^-22.
    terms = 1 / (n * temperature)
    for mine, truth in zip(ours, exact, strict=True):
        scale = max(truth.abs().max().item(), 1e-3)
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=tolerance * scale + 2**-21 * terms * (n == 1))


@every_backend
@pytest.mark.parametrize("options", [{"labels": True}, {"negatives": True}, {"temperature": True}], ids=str)
def test_every_form_equals_the_definition(backend, options):
    inputs = embeddings(150, 32, torch.float16)
    given = {
        "labels": torch.arange(150, device="cuda") % 7 - 1,
        "negatives": torch.randn(300, 32, device="cuda"),
        "temperature": torch.tensor(0.2, device="cuda"),
    }
    given = {name: given[name] for name in options}
    ours = both_ways(inputs, **given, backend=backend)
    exact = both_ways([x.detach().double().requires_grad_() for x in inputs], **given, backend="reference")
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=4e-3 * truth.abs().max().item())


def test_four_launches_each_way_at_the_papers_batch():
    inputs = embeddings(224, 128, torch.float16)
    both_ways(inputs)

    def launches(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = call()
            torch.cuda.synchronize()
        return result, sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    loss, forward = launches(lambda: info_nce(*inputs))
    one = torch.ones_like(loss)
    _, backward = launches(lambda: torch.autograd.grad(loss, inputs, one))
    assert forward <= 4 and backward <= 4, (forward, backward)


@every_backend
@pytest.mark.parametrize("n", [224, 2500])
def test_nothing_waits_for_the_device(backend, n):
    inputs = embeddings(n, 128, torch.float16)
    labels = torch.arange(n, device="cuda") % 7
    both_ways(inputs, backend=backend)
    both_ways(inputs, backend=backend, labels=labels)
    with no_waiting():
        both_ways(inputs, backend=backend)
        both_ways(inputs, backend=backend, labels=labels)
        info_nce(*inputs, return_stats=True, backend=backend)


@every_backend
@pytest.mark.parametrize("n", [224, 2500])
def test_a_graph_replays_it(backend, n):
    inputs = embeddings(n, 128, torch.float16)
    graph, results = captured(lambda: both_ways(inputs, backend=backend))
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(0))
    graph.replay()
    for replayed, eager in zip(results, both_ways(inputs, backend=backend), strict=True):
        assert torch.equal(replayed, eager), "the same bits, as nothing is added in any order"


def test_the_default_is_the_resolved_backend():
    inputs = embeddings(97, 64, torch.float16)
    chosen = resolve("info_nce", "cuda", dtype=torch.float16, dimension=64)
    assert chosen in BACKENDS
    for ours, told in zip(both_ways(inputs), both_ways(inputs, backend=chosen), strict=True):
        assert torch.equal(ours, told)
