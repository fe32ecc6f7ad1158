"""Parts of a batch give the whole batch's gradient, for every output of the model."""

import contextlib

import pytest
import torch
from torch import nn

from copgen_fast.methods import nt_xent
from copgen_fast.training import grad_cache

OFF = torch.amp.GradScaler("cpu", enabled=False)
PAIRS = 12
VIEWS = torch.randn(2 * PAIRS, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TwoHeads(nn.Module):
    """Views to a tuple of two outputs, embeddings and predictions."""

    def __init__(self, norm):
        super().__init__()
        layers = [nn.Conv2d(3, 6, 3), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.Flatten()]
        self.body, self.head, self.predictor = nn.Sequential(*layers), nn.Linear(216, 5), nn.Linear(5, 4)
        self.calls = 0

    def forward(self, views):
        self.calls += 1
        z = self.head(self.body(views))
        return z, self.predictor(z)


def model(norm=False):
    torch.manual_seed(0)
    return TwoHeads(norm).double()


def loss(outputs):
    z, p = outputs
    return nt_xent(z, 0.1, 0.07) + nt_xent(p, 0.2, None)


def pairs_of(rows):
    """Both views of some pairs, anchors first."""
    return torch.cat([rows, PAIRS + rows])


def gradients(module):
    return [value.grad for value in module.parameters()]


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_is_that_of_one_pass(norm, parts):
    if norm and parts == 12:
        pytest.skip("statistics of a single pair are ill-conditioned")
    ours, theirs = model(norm), model(norm)
    outputs, value = grad_cache.backward(ours, VIEWS, loss, OFF, parts=parts)
    # In one graph, part by part where batch normalisation takes its statistics within a part.
    chunks = torch.arange(PAIRS).chunk(parts if norm else 1)
    by_part = [theirs(VIEWS[pairs_of(rows)]) for rows in chunks]
    order = torch.cat([pairs_of(rows) for rows in chunks]).argsort()
    expected = tuple(torch.cat(rows)[order] for rows in zip(*by_part, strict=True))
    single = loss(expected)
    single.backward()
    torch.testing.assert_close(value, single.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(outputs, tuple(x.detach() for x in expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-10, atol=1e-13)
    # Running statistics are what one forward over the parts leaves.
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_several_positives_are_split_with_their_anchors(parts):
    def mean_of_several(outputs):
        return nt_xent(outputs[0], 0.1, 0.07, positives=2)

    ours, theirs = model(), model()
    outputs, value = grad_cache.backward(ours, VIEWS, mean_of_several, OFF, parts=parts, of_pair=3)
    expected = theirs(VIEWS)
    mean_of_several(expected).backward()
    torch.testing.assert_close(value, mean_of_several(expected).detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(outputs, tuple(x.detach() for x in expected), rtol=1e-12, atol=1e-14)
    of_body = [name for name, _ in theirs.named_parameters() if not name.startswith("predictor")]
    found = {name: (dict(x.named_parameters())[name].grad) for name in of_body for x in [ours]}
    torch.testing.assert_close(found, {name: dict(theirs.named_parameters())[name].grad for name in of_body})
    with pytest.raises(ValueError, match="parts: expected a divisor of 8 pairs, got 3"):
        grad_cache.backward(ours, VIEWS, mean_of_several, OFF, parts=3, of_pair=3)


def test_it_is_not_the_mean_of_the_parts_losses():
    ours, parted = model(), model()
    grad_cache.backward(ours, VIEWS, loss, OFF, parts=3)
    chunks = torch.arange(PAIRS).chunk(3)
    (sum(loss(parted(VIEWS[pairs_of(rows)])) for rows in chunks) / 3).backward()
    assert not torch.allclose(gradients(ours)[0], gradients(parted)[0], rtol=1e-2)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_output_that_the_loss_leaves_out_gets_no_gradient(parts):
    ours, theirs = model(), model()
    grad_cache.backward(ours, VIEWS, lambda outputs: nt_xent(outputs[0], 0.1, None), OFF, parts=parts)
    nt_xent(theirs(VIEWS)[0], 0.1, None).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.startswith("predictor"):
            assert mine.grad is None or not mine.grad.any()
        else:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_scaled_loss_gives_scaled_gradients_and_its_own_value(parts):
    plain, scaled = model(), model()
    values = [grad_cache.backward(plain, VIEWS, loss, OFF, parts=parts)[1]]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    values.append(grad_cache.backward(scaled, VIEWS, loss, scaler, parts=parts)[1])
    assert torch.equal(*values)
    torch.testing.assert_close(gradients(scaled), [256 * value for value in gradients(plain)], rtol=1e-14, atol=0)


def test_gradients_are_averaged_over_ranks_once_a_step():
    f, within = model(), []

    @contextlib.contextmanager
    def no_sync():
        calls = f.calls
        yield
        within.append((calls, f.calls))

    grad_cache.backward(f, VIEWS, loss, OFF, parts=3, no_sync=no_sync)
    assert within == [(3, 4), (4, 5)], "of the passes with a graph, all but the last"


@pytest.mark.parametrize("parts", [1, 3])
def test_the_forward_alone_is_in_the_runs_precision(parts):
    f = model().float()
    seen = []

    def watching(outputs):
        seen.append((outputs[0].dtype, torch.is_autocast_enabled("cpu")))
        return loss([output.float() for output in outputs])

    grad_cache.backward(
        f, VIEWS.float(), watching, OFF, parts=parts, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert seen == [(torch.bfloat16, False)]


def test_parts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="parts: expected a divisor of 12 pairs, got 5"):
        grad_cache.backward(model(), VIEWS, loss, OFF, parts=5)


@pytest.mark.parametrize("parts", [1, 3, 12])
def test_outputs_of_anchors_alone_keep_their_order(parts):
    class Anchors(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model()

        def forward(self, views):
            return (self.model(views[: len(views) // 2])[0],)

    ours, theirs = Anchors(), Anchors()
    weights = torch.linspace(-1, 1, PAIRS, dtype=torch.float64)[:, None]
    outputs, _ = grad_cache.backward(ours, VIEWS, lambda z: (z[0] * weights).square().sum(), OFF, parts=parts)
    (expected,) = theirs(VIEWS)
    (expected * weights).square().sum().backward()
    torch.testing.assert_close(outputs[0], expected.detach(), rtol=1e-12, atol=1e-14)
    of_ours, of_theirs = ([value for value in gradients(x) if value is not None] for x in (ours, theirs))
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-13)
