"""InfoNCE against a queue alone, and against negatives that were made of the batch's own pairs."""

import pytest
import torch
import torch.nn.functional as F

from copgen_fast.ops import InfoNCELoss, info_nce
from copgen_fast.ops.backend import INSTALLED

every_backend = pytest.mark.parametrize(
    "backend", [name for name in ("cpp", "chunked", "reference") if name == "reference" or name in INSTALLED]
)
both_forms = pytest.mark.parametrize("symmetric", [True, False])


def inputs(n=5, q=11, d=7):
    generator = torch.Generator().manual_seed(0)
    a, p = torch.randn(2, n, d, generator=generator, dtype=torch.float64).requires_grad_().unbind()
    return a, p, torch.randn(q, d, generator=generator, dtype=torch.float64)


def literal(a, p, queue, symmetric, temperature=0.2, ids=None):
    """MoCo's Equation 1, row by row: one loss a row."""
    a, p, queue = (F.normalize(x, dim=1) for x in (a, p, queue))
    losses = []
    for rows, others in ((a, p), (p, a)) if symmetric else ((a, p),):
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            kept = [j for j in range(len(queue)) if ids is None or i not in ids[j].tolist()]
            logits = torch.stack([row @ other, *(row @ queue[j] for j in kept)]) / temperature
            losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
    return torch.stack(losses)


@every_backend
@both_forms
@pytest.mark.parametrize("made_of", [None, 2])
def test_loss_and_gradient_are_the_literal_formulas(backend, symmetric, made_of):
    a, p, queue = inputs()
    ids = None if made_of is None else torch.randint(0, 7, (len(queue), made_of))
    options = {"negatives": queue, "in_batch": False, "negative_ids": ids, "temperature": 0.2, "symmetric": symmetric}
    ours = info_nce(a, p, **options, reduction="none", backend=backend)
    theirs = literal(a, p, queue, symmetric, ids=ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    gradients = [torch.autograd.grad((loss * weights).sum(), (a, p), retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@every_backend
def test_a_learned_temperature_takes_its_gradient(backend):
    a, p, queue = inputs()
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    options = {"negatives": queue, "in_batch": False, "symmetric": False, "backend": backend}
    (of_ours,) = torch.autograd.grad(info_nce(a, p, temperature=t, **options), t)
    (of_theirs,) = torch.autograd.grad(literal(a, p, queue, False, t).mean(), t)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=0)


@every_backend
def test_stats_count_the_queue_and_the_positive(backend):
    a, p, queue = inputs()
    loss, stats = info_nce(a, p, negatives=queue, in_batch=False, return_stats=True, backend=backend)
    nearest = [F.normalize(x, dim=1) for x in (a, p, queue)]
    rows, others = torch.cat(nearest[:2]), torch.cat(nearest[1::-1])
    correct = ((rows * others).sum(1) >= (rows @ nearest[2].T).amax(1)).double().mean()
    assert stats.contrastive_top1 == correct
    torch.testing.assert_close(stats.mi_lower_bound, torch.tensor(12.0).double().log() - loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_row_whose_pair_all_negatives_are_made_of_has_no_loss(backend):
    a, p, queue = inputs()
    ids = torch.zeros(len(queue), 1, dtype=torch.int64)
    options = {"negatives": queue, "in_batch": False, "negative_ids": ids, "symmetric": False, "backend": backend}
    losses = info_nce(a, p, **options, reduction="none")
    assert losses[0].abs() < 1e-12 and (losses[1:] > 0.1).all()
    (gradient,) = torch.autograd.grad(losses.sum(), a)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() < 1e-12


def test_the_module_takes_it_too():
    a, p, queue = inputs()
    expected = info_nce(a, p, negatives=queue, in_batch=False, symmetric=False)
    assert torch.equal(InfoNCELoss(symmetric=False, in_batch=False)(a, p, negatives=queue), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": None}, "in_batch=False: needs a queue, give negatives"),
        ({"negatives": torch.empty(0, 7).double()}, "in_batch=False: needs a queue, give negatives"),
        ({"negatives": None, "in_batch": True, "negative_ids": torch.ones(3, 1).long()}, "negative_ids: needs a queue"),
        ({"labels": torch.arange(5)}, "in_batch=False: leaves out the positives of a label, give no labels"),
        ({"negative_ids": torch.ones(3, 1).long()}, r"negative_ids: expected shape \[11, E\], got \[3, 1\]"),
        ({"negative_ids": torch.ones(11, 1).long(), "return_stats": True}, "for which there are no stats"),
    ],
)
def test_errors_name_the_argument(options, message):
    a, p, queue = inputs()
    with pytest.raises(ValueError, match=message):
        info_nce(a, p, **{"negatives": queue, "in_batch": False} | options)
