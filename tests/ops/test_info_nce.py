"""InfoNCE: definition, other libraries, forms and errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.baselines import info_nce as baselines
from copgen_fast.ops import InfoNCELoss, info_nce
from copgen_fast.ops.backend import INSTALLED

FUSED = [name for name in ("cpp", "chunked") if name in INSTALLED]
every_backend = pytest.mark.parametrize("backend", [*FUSED, "reference"])
both_forms = pytest.mark.parametrize("symmetric", [True, False])


def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).unbind()


def literal(anchors, positives, temperature, symmetric, labels=None, negatives=None):
    """The equations, row by row, with Python's own exp and log: one loss a row."""

    def unit(x):
        return (x.double() / x.double().norm(dim=1, keepdim=True)).tolist()

    a, p = unit(anchors), unit(positives.flatten(0, -2))
    bank = [] if negatives is None else unit(negatives)
    n = len(a)
    views, columns = (a + p, a + p) if symmetric else (a, p)
    labels = [-1] * n if labels is None else labels.tolist()
    losses = []
    for i, view in enumerate(views):

        def logit(other, view=view):
            return sum(x * y for x, y in zip(view, other, strict=True)) / temperature

        candidates = [j for j in range(len(columns)) if not symmetric or j != i]
        exponents = [logit(columns[j]) for j in candidates] + [logit(other) for other in bank]
        top = max(exponents)
        lse = top + math.log(sum(math.exp(e - top) for e in exponents))
        found = [j for j in candidates if j % n == i % n or (labels[j % n] == labels[i % n] and labels[i % n] >= 0)]
        losses.append(sum(lse - logit(columns[j]) for j in found) / len(found))
    return losses


@every_backend
@pytest.mark.parametrize("several", [2, 3])
@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.parametrize("bank", [None, 4])
def test_several_positives_have_the_mean_outside_the_log(backend, several, classes, bank):
    seeded = torch.Generator().manual_seed(several)
    anchors, *positives = torch.randn(1 + several, 5, 6, generator=seeded, dtype=torch.float64)
    options = {
        "labels": None if classes is None else torch.randint(-1, classes, (5,), generator=seeded),
        "negatives": None if bank is None else torch.randn(bank, 6, generator=seeded, dtype=torch.float64),
    }
    anchors.requires_grad_()
    positives = torch.stack(positives).requires_grad_()
    losses, stats = info_nce(
        anchors, positives, temperature=0.3, reduction="none", return_stats=True, backend=backend, **options
    )
    assert losses.tolist() == pytest.approx(literal(anchors.detach(), positives.detach(), 0.3, True, **options))
    reference = info_nce(anchors, positives, temperature=0.3, reduction="none", backend="reference", **options)
    weights = torch.rand(len(losses), generator=seeded, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, (anchors, positives), weights) for x in (losses, reference))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def multi_positive_loss(views, temperature, labels=None):
    """SupCon's L_out (Khosla et al. 2020, Eq. 2) of views [1 + K, N, D], term by term; labels below 0 are no class."""
    n, v = views.shape[1], [x / x.norm() for x in views.flatten(0, 1)]

    def same(i, j):
        return i % n == j % n or labels is not None and labels[i % n] == labels[j % n] >= 0

    total = 0.0
    for i in range(len(v)):
        others = [j for j in range(len(v)) if j != i]
        below = sum((v[i] @ v[j] / temperature).exp() for j in others)
        positives = [j for j in others if same(i, j)]
        total -= sum(((v[i] @ v[j] / temperature).exp() / below).log() for j in positives) / len(positives)
    return total / len(v)


@every_backend
@pytest.mark.parametrize("labels", [None, [0, 1, -1, 0]])
def test_several_positives_have_the_gradient_of_supcons_formula(backend, labels):
    views = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    given = None if labels is None else torch.tensor(labels)
    loss = info_nce(views[0], views[1:], temperature=0.3, labels=given, backend=backend)
    expected = multi_positive_loss(views, 0.3, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(x, views)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@every_backend
def test_one_positive_of_several_is_the_pair_to_the_bit(backend):
    anchors, positives = rows(6, 5)
    losses = [info_nce(anchors, x, reduction="none", backend=backend) for x in (positives, positives[None])]
    assert torch.equal(*losses)


def test_several_positives_are_refused_where_a_form_takes_one():
    anchors, positives = torch.randn(4, 3), torch.randn(2, 4, 3)
    for options in ({"symmetric": False}, {"in_batch": False, "negatives": anchors}):
        with pytest.raises(ValueError, match="positives: several of each anchor go with symmetric=True"):
            info_nce(anchors, positives, **options)
    with pytest.raises(ValueError, match=r"expected one shape, got \[4, 3\] and \[2, 3, 3\]"):
        info_nce(anchors, positives[:, :3])
    with pytest.raises(ValueError, match="expected at least one row"):
        info_nce(anchors, positives[:0])


@every_backend
@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 17),
    temperature=st.sampled_from([0.01, 0.1, 0.5, 2.0]),
    symmetric=st.booleans(),
    classes=st.sampled_from([None, 1, 3]),
    bank=st.sampled_from([None, 1, 7]),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_formula(backend, n, d, temperature, symmetric, classes, bank, seed):
    anchors, positives = rows(n, d, seed)
    labels = None if classes is None else torch.arange(n) % classes - (1 if classes > 1 else 0)  # -1: unlabelled
    negatives = None if bank is None else rows(bank, d, seed + 1)[0]
    options = {"temperature": temperature, "symmetric": symmetric, "labels": labels, "negatives": negatives}
    losses = info_nce(anchors, positives, **options, reduction="none", backend=backend)
    expected = literal(anchors, positives, **options)
    assert losses.dtype == torch.float64 and losses.shape == (2 * n if symmetric else n,)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    loss = info_nce(anchors, positives, **options, backend=backend)
    assert loss.shape == () and loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9, abs=1e-9)


# Peers.


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@every_backend
def test_equals_metric_learning_without_labels(backend):
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    inputs = [x.requires_grad_() for x in rows(21, 16)]
    instance = torch.arange(21).repeat(2)
    theirs = peers.NTXentLoss(temperature=0.2)(torch.cat(inputs), instance)
    ours = info_nce(*inputs, temperature=0.2, backend=backend)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs))


@every_backend
def test_equals_metric_learning_with_labels(backend):
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    inputs = [x.requires_grad_() for x in rows(21, 16)]
    labels = torch.randint(5, (21,), generator=torch.Generator().manual_seed(0))
    theirs = peers.SupConLoss(temperature=0.2)(torch.cat(inputs), labels.repeat(2))
    ours = info_nce(*inputs, temperature=0.2, labels=labels, backend=backend)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs))


@every_backend
@pytest.mark.parametrize("base_temperature", [None, 0.07])
def test_equals_the_peers_of_the_benchmarks(backend, base_temperature):
    """Plain PyTorch, lightly and the reference implementation's SupConLoss; only that has a base temperature."""
    inputs = [x.requires_grad_() for x in rows(33, 16)]
    ours = info_nce(*inputs, base_temperature=base_temperature, backend=backend)
    published = baselines.published(0.1, base_temperature)
    for peer in (published, *(baselines.peers(0.1).values() if base_temperature is None else ())):
        theirs = peer(*inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs))


# Forms.


def test_base_temperature_scales_the_loss_by_one_over_seven_tenths():
    anchors, positives = rows(8, 16)
    scaled = info_nce(anchors, positives, base_temperature=0.07)
    torch.testing.assert_close(scaled, info_nce(anchors, positives) / 0.7, rtol=1e-14, atol=0)


@every_backend
@pytest.mark.parametrize(("n", "chance"), [(176, 8.373), (224, 8.718), (256, 8.909)])
def test_chance_level_is_the_published_one(n, chance, backend):
    # Identical similarities: every view is the same unit vector.
    same = torch.ones(n, 4, dtype=torch.float64)
    loss = info_nce(same, same, base_temperature=0.07, backend=backend).item()
    assert loss == pytest.approx(math.log(2 * n - 1) / 0.7) and loss == pytest.approx(chance, abs=5e-4)
    assert info_nce(same, same, symmetric=False, backend=backend).item() == pytest.approx(math.log(n))


def test_the_symmetric_loss_ignores_which_side_is_which():
    anchors, positives = rows(7, 5)
    torch.testing.assert_close(info_nce(anchors, positives), info_nce(positives, anchors))
    one_sided = info_nce(anchors, positives, symmetric=False)
    assert one_sided != info_nce(positives, anchors, symmetric=False)


def test_the_scale_of_a_row_does_not_matter_with_normalize():
    anchors, positives = rows(7, 5)
    torch.testing.assert_close(info_nce(anchors * 1e3, positives * 1e-3), info_nce(anchors, positives))
    units = [F.normalize(x, dim=1) for x in (anchors, positives)]
    torch.testing.assert_close(info_nce(*units, normalize=False), info_nce(anchors, positives))
    longer = info_nce(*(2 * x for x in units), normalize=False, temperature=0.4)
    torch.testing.assert_close(longer, info_nce(anchors, positives))


def test_reductions():
    anchors, positives = rows(7, 5)
    losses = info_nce(anchors, positives, base_temperature=0.05, reduction="none")
    for name in ("mean", "sum"):
        reduced = info_nce(anchors, positives, base_temperature=0.05, reduction=name)
        torch.testing.assert_close(reduced, getattr(losses, name)())


@every_backend
@both_forms
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_stats_are_what_they_say(backend, symmetric, labelled, queued):
    anchors, positives = rows(40, 3, seed=5)
    positives = anchors + positives
    labels = torch.arange(40) % 7 - 1 if labelled else None
    negatives = rows(25, 3, seed=6)[0] if queued else None
    options = {"symmetric": symmetric, "labels": labels, "negatives": negatives, "temperature": 0.3}
    inputs = (anchors.clone().requires_grad_(), positives)
    loss, stats = info_nce(*inputs, **options, base_temperature=0.1, return_stats=True, backend=backend)
    expected = torch.tensor(literal(anchors, positives, **options), dtype=torch.float64)
    torch.testing.assert_close(stats.losses, expected)
    torch.testing.assert_close(loss.detach(), 3 * expected.mean())
    a, p = (F.normalize(x, dim=1) for x in (anchors, positives))
    of_rows, columns = (torch.cat([a, p]),) * 2 if symmetric else (a, p)
    similarities = of_rows @ columns.T
    if symmetric:
        similarities.fill_diagonal_(-2)
    if queued:
        similarities = torch.cat([similarities, of_rows @ F.normalize(negatives, dim=1).T], 1)
    nearest = similarities.argmax(1)
    row_labels = labels if labelled else -torch.ones(40, dtype=torch.int64)
    hits = [
        j < len(columns) and (j % 40 == i % 40 or row_labels[j % 40] == row_labels[i % 40] >= 0)
        for i, j in enumerate(nearest.tolist())
    ]
    assert 0 < sum(hits) < len(hits)
    assert stats.contrastive_top1.item() == pytest.approx(sum(hits) / len(hits))
    candidates = (79 if symmetric else 40) + (25 if queued else 0)
    assert stats.mi_lower_bound.item() == pytest.approx(math.log(candidates) - expected.mean().item())
    assert not any(x.requires_grad for x in stats)
    loss.backward()
    assert inputs[0].grad.abs().sum() > 0


def test_unlabelled_rows_keep_their_own_view():
    anchors, positives = rows(9, 5)
    unlabelled = torch.full((9,), -1)
    assert info_nce(anchors, positives, labels=unlabelled) == pytest.approx(info_nce(anchors, positives).item())


def test_the_queue_takes_no_gradient_and_an_empty_one_changes_nothing():
    anchors, positives = rows(9, 5)
    queue = rows(4, 5, seed=1)[0].requires_grad_()
    loss = info_nce(anchors.requires_grad_(), positives, negatives=queue)
    loss.backward()
    assert queue.grad is None and loss > info_nce(anchors, positives)
    assert info_nce(anchors, positives, negatives=queue[:0]) == info_nce(anchors, positives)


@pytest.mark.parametrize("learned", [False, True])
def test_the_module_is_the_function(learned):
    anchors, positives = rows(5, 6)
    labels, negatives = torch.tensor([0, 0, 1, 1, 2]), rows(3, 6, seed=1)[0]
    options = {"base_temperature": 0.07, "symmetric": False, "reduction": "sum"}
    loss = InfoNCELoss(temperature=0.2, learn_temperature=learned, **options)
    expected = info_nce(anchors, positives, temperature=0.2, labels=labels, negatives=negatives, **options)
    torch.testing.assert_close(loss(anchors, positives, labels, negatives), expected, rtol=1e-6, atol=0)
    assert ("learned" if learned else "temperature=0.2") in repr(loss)
    assert len(list(loss.parameters())) == learned
    if learned:
        loss(anchors, positives).backward()
        assert loss.log_temperature.grad != 0


# Errors.


def test_errors_name_the_argument():
    ok = torch.randn(4, 3)
    with pytest.raises(TypeError, match="anchors"):
        info_nce([1.0], ok)
    with pytest.raises(TypeError, match="positives: expected a floating-point"):
        info_nce(ok, ok.long())
    with pytest.raises(ValueError, match=r"anchors: expected shape \[N, D\]"):
        info_nce(ok[0], ok)
    with pytest.raises(ValueError, match=r"anchors and positives.*\[4, 3\] and \[3, 3\]"):
        info_nce(ok, ok[:3])
    with pytest.raises(ValueError, match="anchors and positives: expected at least one row"):
        info_nce(ok[:0], ok[:0])
    with pytest.raises(ValueError, match="anchors: expected D from 1 to 2048, got 2049"):
        info_nce(torch.zeros(2, 2049), torch.zeros(2, 2049))
    with pytest.raises(ValueError, match="anchors: expected D from 1 to 2048, got 0"):
        info_nce(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(ValueError, match="positives: on meta"):
        info_nce(ok, ok.to("meta"))
    with pytest.raises(ValueError, match="reduction: .*'average'"):
        info_nce(ok, ok, reduction="average")


def test_errors_of_the_options_name_them():
    ok = torch.randn(4, 3)
    for temperature in (
        0.0,
        -0.1,
        1e-40,
        1e300,
        math.nan,
        math.inf,
        "0.1",
        torch.tensor(1e-40),
        torch.tensor(math.nan),
    ):
        with pytest.raises(ValueError, match="^temperature"):
            info_nce(ok, ok, temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature: expected shape \[\]"):
        info_nce(ok, ok, temperature=torch.ones(2))
    with pytest.raises(ValueError, match="base_temperature"):
        info_nce(ok, ok, base_temperature=0.0)
    with pytest.raises(ValueError, match=r"labels: expected shape \[4\], got \[3\]"):
        info_nce(ok, ok, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels"):
        info_nce(ok, ok, labels=torch.zeros(4))
    with pytest.raises(ValueError, match=r"negatives: expected shape \[Q, 3\]"):
        info_nce(ok, ok, negatives=torch.zeros(5, 4))
    for settings_ in ({"temperature": 0.0}, {"base_temperature": -1.0}, {"base_temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings_))):
            InfoNCELoss(**settings_)


def test_values_are_checked_only_with_check_finite():
    ok = torch.randn(4, 3)
    for bad in (math.nan, math.inf):
        spoilt = ok.clone()
        spoilt[2, 1] = bad
        with pytest.raises(ValueError, match="positives: holds NaN or infinity"):
            info_nce(ok, spoilt, check_finite=True)
        with pytest.raises(ValueError, match="negatives: holds NaN or infinity"):
            info_nce(ok, ok, negatives=spoilt, check_finite=True)
        assert info_nce(ok, spoilt).isnan()
    assert info_nce(ok, ok, check_finite=True).isfinite()
