import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.ops import InfoNCELoss, info_nce


def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).unbind()


def literal(anchors, positives, temperature, symmetric):
    """The equations, row by row, with Python's own exp and log."""

    def unit(x):
        return (x / x.norm(dim=1, keepdim=True)).tolist()

    def term(view, positive, others):
        def similarity(other):
            return sum(p * q for p, q in zip(view, other, strict=True)) / temperature

        exponents = [similarity(other) for other in others]
        top = max(exponents)
        return top + math.log(sum(math.exp(e - top) for e in exponents)) - similarity(positive)

    a, p = unit(anchors.double()), unit(positives.double())
    if not symmetric:
        return sum(term(a[i], p[i], p) for i in range(len(a))) / len(a)
    views, n = a + p, len(a)
    terms = (term(views[i], views[(i + n) % (2 * n)], views[:i] + views[i + 1 :]) for i in range(2 * n))
    return sum(terms) / (2 * n)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 17),
    temperature=st.sampled_from([0.01, 0.1, 0.5, 2.0]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_literal_formula(n, d, temperature, symmetric, seed):
    anchors, positives = rows(n, d, seed)
    loss = info_nce(anchors, positives, temperature=temperature, symmetric=symmetric)
    expected = literal(anchors, positives, temperature, symmetric)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_equals_lightly_in_value_and_gradient():
    peer = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.1)
    anchors, positives = (x.requires_grad_() for x in rows(33, 16))
    ours, theirs = info_nce(anchors, positives), peer(anchors, positives)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, (anchors, positives)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_base_temperature_scales_the_loss_by_one_over_seven_tenths():
    anchors, positives = rows(8, 16)
    scaled = info_nce(anchors, positives, base_temperature=0.07)
    torch.testing.assert_close(scaled, info_nce(anchors, positives) / 0.7, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("n", "chance"), [(176, 8.373), (224, 8.718), (256, 8.909)])
def test_chance_level_is_the_published_one(n, chance):
    # Identical similarities: every view is the same unit vector.
    same = torch.ones(n, 4, dtype=torch.float64)
    loss = info_nce(same, same, base_temperature=0.07).item()
    assert loss == pytest.approx(math.log(2 * n - 1) / 0.7) and loss == pytest.approx(chance, abs=5e-4)
    assert info_nce(same, same, symmetric=False).item() == pytest.approx(math.log(n))


def test_the_symmetric_loss_ignores_which_side_is_which():
    anchors, positives = rows(7, 5)
    torch.testing.assert_close(info_nce(anchors, positives), info_nce(positives, anchors))
    one_sided = info_nce(anchors, positives, symmetric=False)
    assert one_sided != info_nce(positives, anchors, symmetric=False)


def test_the_scale_of_a_row_does_not_matter():
    anchors, positives = rows(7, 5)
    torch.testing.assert_close(info_nce(anchors * 1e3, positives * 1e-3), info_nce(anchors, positives))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(symmetric):
    anchors, positives = (x.requires_grad_() for x in rows(4, 3))
    assert torch.autograd.gradcheck(lambda a, p: info_nce(a, p, symmetric=symmetric), (anchors, positives))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_pair_has_no_negatives_and_no_loss(symmetric):
    anchors, positives = (x.requires_grad_() for x in rows(1, 8, dtype=torch.float32))
    loss = info_nce(anchors, positives, symmetric=symmetric)
    loss.backward()
    assert loss.item() == 0.0
    assert not anchors.grad.any() and not positives.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    anchors, positives = (x.requires_grad_() for x in rows(64, 128, dtype=dtype))
    loss = info_nce(anchors, positives)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), info_nce(anchors.double(), positives.double()), rtol=1e-5, atol=0)
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(loss, (anchors, positives)))


def test_autocast_does_not_lower_the_precision():
    anchors, positives = rows(64, 128, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(anchors, positives, temperature=0.01)
    assert inside == info_nce(anchors, positives, temperature=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 1e-4])
def test_sharp_temperatures_stay_finite(temperature, symmetric):
    anchors, _ = rows(16, 8, dtype=torch.float32)
    for positives in (anchors.clone(), -anchors, torch.zeros_like(anchors)):
        a, p = anchors.clone().requires_grad_(), positives.requires_grad_()
        loss = info_nce(a, p, temperature=temperature, symmetric=symmetric)
        loss.backward()
        assert loss.isfinite() and a.grad.isfinite().all() and p.grad.isfinite().all()


def test_the_module_is_the_function():
    anchors, positives = rows(5, 6)
    loss = InfoNCELoss(temperature=0.2, base_temperature=0.07, symmetric=False)
    expected = info_nce(anchors, positives, temperature=0.2, base_temperature=0.07, symmetric=False)
    assert loss(anchors, positives) == expected
    assert "temperature=0.2" in repr(loss)
    for settings_ in ({"temperature": 0.0}, {"base_temperature": -1.0}, {"base_temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings_))):
            InfoNCELoss(**settings_)


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
    with pytest.raises(ValueError, match="anchors: expected at least one row"):
        info_nce(ok[:0], ok[:0])
    with pytest.raises(ValueError, match="positives: on meta"):
        info_nce(ok, ok.to("meta"))
    for temperature in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            info_nce(ok, ok, temperature=temperature)
    with pytest.raises(ValueError, match="base_temperature"):
        info_nce(ok, ok, base_temperature=0.0)
