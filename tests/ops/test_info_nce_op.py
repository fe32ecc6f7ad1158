"""InfoNCE's operators: gradients, precision, sizes, registration, compilation, memory, determinism."""

import copy

import pytest
import torch
import torch.nn.functional as F

from copgen_fast.ops import info_nce
from copgen_fast.ops.backend import INSTALLED
from copgen_fast.ops.info_nce.l2_normalize import l2_normalize, l2_normalize_backward, l2_normalize_reference
from copgen_fast.ops.info_nce.operator import row_gradients, row_losses
from copgen_fast.ops.info_nce.small_batch import pair_gradients, pair_losses
from copgen_fast.ops.info_nce.sum_by_label import sum_by_label
from copgen_fast.runtime.memory import peak_memory

FUSED = [name for name in ("cpp", "chunked") if name in INSTALLED]
every_fused = pytest.mark.parametrize("backend", FUSED)
every_backend = pytest.mark.parametrize("backend", [*FUSED, "reference"])
needs_cpp = pytest.mark.skipif("cpp" not in INSTALLED, reason="the C++ extension is not built")
each_l2 = pytest.mark.parametrize("backend", [x for x in ("cpp", "reference") if x in INSTALLED])
both_forms = pytest.mark.parametrize("symmetric", [True, False])


def rows(n, d, seed=0, dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, d, generator=generator, dtype=torch.float64).to(dtype).unbind()


def forms(n):
    """Options that together take every path, for n pairs."""
    labels = torch.arange(n) % 5 - 1
    for symmetric in (True, False):
        yield {"symmetric": symmetric}
        yield {"symmetric": symmetric, "labels": labels}
        yield {"symmetric": symmetric, "labels": labels, "negatives": rows(9, 4, seed=7)[0]}


FORMS = pytest.mark.parametrize(
    "form", list(forms(6)), ids=lambda form: "-".join(map(str, form)) + str(form["symmetric"])
)


# Gradients.


@every_backend
@FORMS
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(backend, form, normalize):
    inputs = [x.requires_grad_() for x in (*rows(6, 4), torch.tensor(0.3, dtype=torch.float64))]

    def loss(a, p, t):
        return info_nce(a, p, temperature=t, normalize=normalize, backend=backend, **form)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(lambda a, p: loss(a, p, 0.2), inputs[:2])


@every_fused
@both_forms
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_each_gradient_alone_and_under_a_negated_scaled_loss(backend, symmetric, temperature):
    a, p = rows(70, 8)
    options = {"symmetric": symmetric, "temperature": temperature}
    for of_a, of_p in ((True, False), (False, True), (True, True)):
        found = {}
        for name in (backend, "reference"):
            inputs = [x.clone().requires_grad_(needed) for x, needed in ((a, of_a), (p, of_p))]
            (-1e3 * info_nce(*inputs, **options, backend=name)).backward()
            found[name] = [x.grad for x in inputs]
            assert [x is not None for x in found[name]] == [of_a, of_p]
        for ours, theirs in zip(found[backend], found["reference"], strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-9)


@every_fused
def test_rows_are_weighted_by_their_own_gradients(backend):
    a, p = (x.requires_grad_() for x in rows(33, 8))
    weights = torch.randn(66, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(info_nce(a, p, reduction="none", backend=name) @ weights, (a, p))
        for name in (backend, "reference")
    )
    torch.testing.assert_close(ours, theirs)


# Sizes and precision.


@every_fused
@both_forms
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize(
    ("n", "d"), [(1, 1), (2, 3), (3, 97), (97, 113), (256, 8), (257, 5), (511, 16), (600, 16), (1025, 3), (40, 2048)]
)
def test_sizes_off_the_tile(backend, symmetric, temperature, n, d):
    inputs = [x.requires_grad_() for x in rows(n, d)]
    options = {"temperature": temperature, "symmetric": symmetric}
    ours, theirs = (info_nce(*inputs, **options, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, inputs) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@every_fused
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
def test_errors_stay_below_twice_those_of_pytorch(backend, symmetric, dtype, temperature):
    inputs = [x.requires_grad_() for x in rows(300, 64, dtype=dtype)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    options = {"temperature": temperature, "symmetric": symmetric}

    def plain(a, p):  # in its inputs' own dtype, as one would write it
        a, p = F.normalize(a, dim=1), F.normalize(p, dim=1)
        if not symmetric:
            return F.cross_entropy(a @ p.T / temperature, torch.arange(300))
        views = torch.cat([a, p])
        logits = (views @ views.T / temperature).masked_fill(torch.eye(600, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(600).roll(300))

    def with_gradients(loss, leaves):
        return [loss, *torch.autograd.grad(loss, leaves)]

    exact = with_gradients(info_nce(*exact_inputs, **options, backend="reference"), exact_inputs)
    ours = with_gradients(info_nce(*inputs, **options, backend=backend), inputs)
    theirs = with_gradients(plain(*inputs), inputs)
    assert ours[0].dtype == torch.float32 and all(x.dtype == dtype for x in ours[1:])
    for truth, mine, peer in zip(exact, ours, theirs, strict=True):
        error, their_error = ((x.double() - truth).abs().max() for x in (mine, peer))
        # A loss may by chance be right to the last digit: then one rounding of it is allowed.
        assert error <= max(2 * their_error, 4e-7 * truth.abs().max())


def test_autocast_does_not_lower_the_precision():
    anchors, positives = rows(64, 128, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(anchors, positives, temperature=0.01)
    assert inside == info_nce(anchors, positives, temperature=0.01)


@every_fused
@pytest.mark.parametrize("queue", ["none", "of negatives", "of pairs"])
def test_a_backward_within_autocast_computes_the_same(queue, backend):
    anchors, positives, bank = rows(16, 8, dtype=torch.float32, count=3)
    options = {} if queue == "none" else {"negatives": bank}
    if queue == "of pairs":
        options["negative_ids"] = torch.arange(len(bank))[:, None]
    gradients = []
    for within in (False, True):
        leaf = anchors.clone().requires_grad_()
        loss = info_nce(leaf, positives, backend=backend, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@every_backend
@both_forms
@pytest.mark.parametrize("temperature", [0.01, 1e-4])
def test_sharp_temperatures_stay_finite(temperature, symmetric, backend):
    anchors, _ = rows(16, 8, dtype=torch.float32)
    for positives in (anchors.clone(), -anchors, torch.zeros_like(anchors)):
        a, p = anchors.clone().requires_grad_(), positives.requires_grad_()
        loss = info_nce(a, p, temperature=temperature, symmetric=symmetric, backend=backend)
        loss.backward()
        assert loss.isfinite() and a.grad.isfinite().all() and p.grad.isfinite().all()


@every_fused
@both_forms
@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize(
    ("length", "temperature"), [(1e4, 0.1), (1e10, 0.1), (1e15, 1e3), (None, 1e-10), (None, 1e-30), (None, 1e30)]
)
def test_logits_of_any_size(backend, symmetric, with_stats, length, temperature):
    inputs = [(length or 1) * x for x in rows(300, 128, dtype=torch.float32)]
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    options = {"temperature": temperature, "symmetric": symmetric, "normalize": length is None}
    exact = info_nce(*exact_inputs, **options, backend="reference")
    ours = info_nce(*inputs, **options, return_stats=with_stats, backend=backend)
    ours = ours[0] if with_stats else ours
    exact_grads, grads = torch.autograd.grad(exact, exact_inputs), torch.autograd.grad(ours, inputs)
    for mine, truth in zip((ours, *grads), (exact, *exact_grads), strict=True):
        assert (mine.double() - truth).norm() <= 1e-5 * truth.norm()


@every_backend
@both_forms
def test_a_positive_that_rules_a_sum_leaves_no_loss_however_large(backend, symmetric):
    anchors, _ = rows(64, 32, dtype=torch.float32)
    options = {"symmetric": symmetric, "normalize": False, "backend": backend}
    assert info_nce(1e6 * anchors, 1e6 * anchors.clone(), **options) == 0


@every_backend
@both_forms
def test_logits_beyond_floats_are_not_finite_on_any_backend(backend, symmetric):
    anchors, positives = rows(20, 8, dtype=torch.float32)
    options = {"symmetric": symmetric, "normalize": False, "backend": backend}
    assert not info_nce(1e25 * anchors, 1e25 * positives, **options).isfinite()
    assert not info_nce(1e15 * anchors, 1e15 * positives, temperature=1e-20, **options).isfinite()


@every_fused
@both_forms
def test_rows_whose_logits_are_all_very_negative(backend, symmetric):
    # Longer than one, and each far from all others: logits down to -1e4 beside rows of moderate ones.
    n = 300
    a, p = rows(n, 2, dtype=torch.float32)
    angle = torch.linspace(0, 3.1, n)
    a = torch.stack([angle.cos(), angle.sin()], 1) * torch.linspace(1, 30, n)[:, None]
    inputs = [x.requires_grad_() for x in (a, -a + p)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    options = {"symmetric": symmetric, "normalize": False}
    ours = info_nce(*inputs, **options, reduction="none", backend=backend)
    exact = info_nce(*exact_inputs, **options, reduction="none", backend="reference")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-2)
    assert exact.max() > 5e3
    ours, exact = (torch.autograd.grad(x.mean(), leaves) for x, leaves in ((ours, inputs), (exact, exact_inputs)))
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())


@every_backend
@both_forms
def test_one_pair_has_no_negatives_and_no_loss(symmetric, backend):
    anchors, positives = (x.requires_grad_() for x in rows(1, 8, dtype=torch.float32))
    loss = info_nce(anchors, positives, symmetric=symmetric, backend=backend)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(anchors.grad.abs().max(), positives.grad.abs().max()) < 1e-5


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_rows_are_compared_but_take_no_gradient(backend, dtype):
    anchors, positives = rows(5, 8, dtype=dtype)
    anchors = anchors.index_fill(0, torch.tensor([2]), 0).requires_grad_()
    positives = positives.requires_grad_()
    losses = info_nce(anchors, positives, reduction="none", backend=backend)
    losses.sum().backward()
    assert losses[2].item() == pytest.approx(torch.tensor(9.0).log().item(), rel=1e-6)  # all alike
    assert not anchors.grad[2].any() and anchors.grad[:2].any() and anchors.grad.isfinite().all()
    assert positives.grad[2].any() and positives.grad.isfinite().all()


@every_backend
@both_forms
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_nan_spreads_to_the_losses_that_see_it(backend, symmetric, temperature):
    anchors, positives = (x.clone() for x in rows(5, 8, dtype=torch.float32))
    anchors[2, 3] = torch.nan
    options = {"symmetric": symmetric, "temperature": temperature, "backend": backend}
    losses, (_, top1, _) = info_nce(anchors, positives, **options, reduction="none", return_stats=True)
    assert losses.isnan().tolist() == ([True] * 10 if symmetric else [False, False, True, False, False])
    assert 0 <= top1 <= 1


# Operators.


@every_fused
@both_forms
@pytest.mark.parametrize("with_nearest", [False, True])
def test_opcheck(backend, symmetric, with_nearest):
    x, y = rows(6, 4, dtype=torch.float32)
    views, _ = l2_normalize(x, y, "reference")
    of_rows, columns = (
        (views.detach().requires_grad_(), None) if symmetric else (views.detach()[:6], views.detach()[6:])
    )
    placed = (0.1, 10.0, 0, 6 if symmetric else 0, symmetric)
    how = (torch.float32, backend)
    torch.library.opcheck(row_losses, (of_rows, columns, *placed, with_nearest, *how))
    losses, lse, *_ = row_losses(of_rows, columns, *placed, False, *how)
    statistics = (lse, losses.detach(), None, None)
    arguments = (of_rows.detach(), columns, *placed[:2], *statistics, *placed[2:], *how)
    torch.library.opcheck(row_gradients, arguments)


@each_l2
def test_opcheck_l2_normalize(backend):
    x, y = rows(6, 4, dtype=torch.float32)
    views, norms = l2_normalize(x, y, backend)
    torch.library.opcheck(l2_normalize_backward, (views, x, y, views, norms, backend))
    torch.library.opcheck(l2_normalize, (x.requires_grad_(), y.requires_grad_(), backend))


@needs_cpp
def test_opcheck_pair_losses():
    x, y = rows(6, 4, dtype=torch.float32)
    losses, *saved = pair_losses(x, y, 0.1)
    torch.library.opcheck(pair_gradients, (losses, x, y, 0.1, *saved))
    torch.library.opcheck(pair_losses, (x.requires_grad_(), y.requires_grad_(), 0.1))


def test_opcheck_sum_by_label():
    x, _ = rows(6, 4)
    labels = torch.tensor([3, -1, 3, 0, 0, 3])
    torch.library.opcheck(sum_by_label, (x.requires_grad_(), labels))
    expected = torch.stack([x[labels == label].sum(0) for label in labels])
    torch.testing.assert_close(sum_by_label(x, labels), expected)
    assert torch.autograd.gradcheck(lambda x: sum_by_label(x, labels), x)


@each_l2
def test_l2_normalize_is_its_definition(backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = [x.requires_grad_() for x in rows(5, 7, dtype=dtype)]
        ours, _ = l2_normalize(*inputs, backend)
        theirs = l2_normalize_reference(torch.cat(inputs).to(ours.dtype))
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn(10, 7, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
        torch.testing.assert_close(*(torch.autograd.grad(x, inputs, grad) for x in (ours, theirs)))


@every_fused
@FORMS
def test_compiles_to_one_graph(backend, form):
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in rows(6, 4)]

    def loss(a, p):
        loss, stats = info_nce(a, p, base_temperature=0.07, return_stats=True, backend=backend, **form)
        return loss, stats.contrastive_top1, stats.mi_lower_bound

    # Traced, differentiated and run by PyTorch; no code generator is needed to see that it is one graph.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), loss(*inputs)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours[0], inputs), torch.autograd.grad(expected[0], inputs))


def test_compiles_with_a_learned_temperature():
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in (*rows(6, 4), torch.tensor(0.2, dtype=torch.float64))]

    def loss(a, p, t):
        return info_nce(a, p, temperature=t)

    ours, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), loss(*inputs)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs))


@every_fused
@pytest.mark.parametrize("n", [300, 700])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_two_runs_and_two_backwards_give_the_same_bits(backend, n, temperature):
    inputs = [x.requires_grad_() for x in rows(n, 64, dtype=torch.float32)]
    runs = []
    for _ in range(2):
        loss = info_nce(*inputs, temperature=temperature, backend=backend)
        for _ in range(2):
            runs.append([loss, *torch.autograd.grad(loss, inputs, retain_graph=True)])
    assert all(torch.equal(x, y) for one in runs[1:] for x, y in zip(runs[0], one, strict=True))


@needs_cpp
@pytest.mark.parametrize("n", [300, 1025])
def test_any_number_of_threads_gives_the_same_bits(n):
    inputs = [x.requires_grad_() for x in rows(n, 33, dtype=torch.float32)]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = info_nce(*inputs, temperature=0.1, backend="cpp")
            runs.append([loss, *torch.autograd.grad(loss, inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for one in runs[1:] for x, y in zip(runs[0], one, strict=True))


@needs_cpp
@pytest.mark.parametrize("n", [512, 513])
def test_only_a_small_batch_keeps_its_matrix(n):
    inputs = [x.requires_grad_() for x in rows(n, 8, dtype=torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        info_nce(*inputs, backend="cpp")
    assert max(kept) == ((2 * n) ** 2 if n == 512 else 2 * n * 8)


def test_inputs_may_have_any_strides():
    a, p = rows(24, 18)
    inputs = (a.T.contiguous().T, p[:, ::1].flip(0).contiguous().flip(0))
    strided = torch.stack([a, p], 2)
    torch.testing.assert_close(info_nce(*strided.unbind(2)), info_nce(a, p))
    torch.testing.assert_close(info_nce(*inputs), info_nce(a, p))


@every_fused
def test_memory_is_not_that_of_the_matrix(backend):
    inputs = [x.requires_grad_() for x in rows(4096, 16, dtype=torch.float32)]

    def both_ways():
        return torch.autograd.grad(info_nce(*inputs, backend=backend), inputs)

    both_ways()
    peak = peak_memory(both_ways)
    if peak is None:
        pytest.skip("needs Linux")
    matrix = 8192**2 * 4 / 1e6
    assert peak < matrix / 3, f"{peak:.0f} MB beside a matrix of {matrix:.0f} MB"


def test_training_goes_as_with_the_definition():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(512, 20, generator=generator)
    encoder = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    for module in encoder[::2]:
        torch.nn.init.normal_(module.weight, std=0.2, generator=generator)
        torch.nn.init.zeros_(module.bias)

    def train(backend):
        model = copy.deepcopy(encoder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        noise = torch.Generator().manual_seed(1)
        losses = []
        for step in range(40):
            batch = data[64 * (step % 8) : 64 * (step % 8 + 1)]
            views = (model(batch + 0.5 * torch.randn(batch.shape, generator=noise)) for _ in range(2))
            loss = info_nce(*views, temperature=0.2, backend=backend)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    curves = {name: train(name) for name in (*FUSED, "reference")}
    assert curves["reference"][-8:].mean() < 0.75 * curves["reference"][:8].mean()
    for name in FUSED:
        torch.testing.assert_close(curves[name], curves["reference"], rtol=1e-3, atol=1e-3)
