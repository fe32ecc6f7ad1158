"""Parts of a batch give the whole batch's gradient, whatever they are called with."""

import contextlib

import pytest
import torch
from torch import nn

from copgen_fast.methods._nt_xent import nt_xent
from copgen_fast.training import grad_cache

OFF = torch.amp.GradScaler("cpu", enabled=False)
VIEWS = torch.randn(24, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Parted(nn.Module):
    """Applies a model to parts of a joint batch one after the other: batch normalisation per part, in one graph."""

    def __init__(self, model, parts):
        super().__init__()
        self.model, self.parts = model, parts

    def forward(self, views):
        return grad_cache._joined([self.model(part) for part in grad_cache._split(views, self.parts)])


def model(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)]
    return nn.Sequential(*layers).double()


def loss(embeddings):
    return nt_xent(embeddings, 0.1, 0.07)


def gradients(module):
    return [value.grad for value in module.parameters()]


def test_parts_hold_both_views_of_their_pairs_and_are_put_back_in_order():
    joint = torch.arange(12)
    parts = grad_cache._split(joint, 3)
    assert [part.tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert torch.equal(grad_cache._joined(parts), joint)


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_is_that_of_one_pass(norm, parts):
    if norm and parts == 12:
        pytest.skip("statistics of a single pair are ill-conditioned")
    ours, theirs = model(norm), model(norm)
    embeddings, value = grad_cache.backward(ours, ours, VIEWS, loss, OFF, parts)
    single = Parted(theirs, parts)(VIEWS) if norm else theirs(VIEWS)
    expected = loss(single)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(embeddings, single.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-10, atol=1e-13)
    # Running statistics are what one forward over the parts leaves.
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-12, atol=0)


def test_it_is_not_the_mean_of_the_parts_losses():
    ours, parted = model(False), model(False)
    grad_cache.backward(ours, ours, VIEWS, loss, OFF, 3)
    (sum(loss(parted(part)) for part in grad_cache._split(VIEWS, 3)) / 3).backward()
    assert not torch.allclose(gradients(ours)[0], gradients(parted)[0], rtol=1e-2)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_scaled_loss_gives_scaled_gradients_and_its_own_value(parts):
    plain, scaled = model(False), model(False)
    values = [grad_cache.backward(plain, plain, VIEWS, loss, OFF, parts)[1]]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    values.append(grad_cache.backward(scaled, scaled, VIEWS, loss, scaler, parts)[1])
    assert torch.equal(*values)
    torch.testing.assert_close(gradients(scaled), [256 * value for value in gradients(plain)], rtol=1e-14, atol=0)


def test_ranks_share_gradients_once_a_step():
    f, alone, holding = model(False), [], []

    def embed(views):
        alone.append(bool(holding))
        return f(views)

    @contextlib.contextmanager
    def held():
        holding.append(True)
        yield
        holding.pop()

    grad_cache.backward(f, embed, VIEWS, loss, OFF, 3, held)
    assert alone[3:] == [True, True, False], "of the passes with a graph, all but the last"


def test_parts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="parts: expected a divisor of 12 pairs, got 5"):
        grad_cache.backward(model(False), model(False), VIEWS, loss, OFF, 5)
