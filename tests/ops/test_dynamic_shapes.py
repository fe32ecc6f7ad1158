"""torch.compile of the ops for changing sizes: one graph for the first, one more for all others."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from copgen_fast.augmentations import get
from copgen_fast.methods import nt_xent
from copgen_fast.ops import Augment, AugmentParams, InfoNCELoss, add_upsampled, cond_norm, info_nce

SIZES = (16, 12, 7)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def images(n, side=18):
    return torch.rand(n, 3, side, side + 2, generator=torch.Generator().manual_seed(n))


def pairs(n):
    return random(n, 8).requires_grad_(), random(n, 8).requires_grad_()


def stats(a, p, labels, negatives):
    loss, found = info_nce(a, p, labels=labels, negatives=negatives, return_stats=True)
    return loss + 0 * found.mi_lower_bound


def randomized(x):
    # All draws: compilers leave out those that nothing depends on, and the numbers after them are others then.
    params = AugmentParams.sample(len(x), (9, 8), get("infomin"))
    return torch.cat(
        [params.crop, params.factors, params.solarize[:, None], params.rand_augment.argument], 1
    ).nan_to_num()


CASES = {  # what is compiled, and its arguments of a size
    "augment": (Augment(get("simclr"), 10), lambda n: (images(n),)),
    "augment, blurred, two views": (Augment(get("byol"), 10, views=2), lambda n: (images(n),)),
    "augment, image sizes": (Augment(get("simclr"), 10), lambda n: (images(3, n),)),
    "parameters": (
        lambda x: AugmentParams.sample(len(x), (9, 8), get("byol")).factors,
        lambda n: (images(n),),
    ),
    "parameters of RandAugment": (randomized, lambda n: (images(n),)),
    "info_nce": (InfoNCELoss(0.1), pairs),
    "info_nce, one-sided": (InfoNCELoss(0.1, symmetric=False), pairs),
    "info_nce, learned temperature": (InfoNCELoss(0.1, learn_temperature=True), pairs),
    "info_nce, chunked": (InfoNCELoss(0.1, backend="chunked"), pairs),
    "info_nce, everything": (stats, lambda n: (*pairs(n), torch.arange(n) % 3, random(n + 5, 8))),
    "cond_norm": (cond_norm, lambda n: (random(n, 5, n, 4).requires_grad_(), random(n, 5), random(1, 5))),
    "add_upsampled": (add_upsampled, lambda n: (random(n, 5, 2 * n, 4).requires_grad_(), random(n, 5, n, 2))),
    "nt_xent": (lambda h: nt_xent(h, 0.1, 0.07), lambda n: (random(2 * n, 8).requires_grad_(),)),
}


@pytest.mark.parametrize(("op", "arguments"), CASES.values(), ids=CASES.keys())
def test_two_graphs_serve_every_size(op, arguments):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, backend=counter, fullgraph=True)
    for n in SIZES:
        inputs = arguments(n)
        found = []
        for run in (op, compiled):
            torch.manual_seed(0)
            out = run(*inputs)
            if out.requires_grad:
                out.square().sum().backward()
            found.append(out.detach())
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
