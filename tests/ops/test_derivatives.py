"""Derivatives that the fused operators have no rule for: second ones, forward mode, torch.func's transforms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist

from copgen_fast.augmentations import get
from copgen_fast.ops import Augment, AugmentParams, add_upsampled, augment, cond_norm, info_nce
from copgen_fast.ops.backend import INSTALLED
from copgen_fast.ops.info_nce.sum_by_label import sum_by_label

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(policy):
    params = AugmentParams.sample(2, (3, 4), policy, out_size=3, generator=torch.Generator().manual_seed(3))
    params.factors[:, :3] = params.factors[:, :3].clamp(0.9, 1.1)  # no clamp, and so no kink, near the images
    return {"params": params, "mean": policy.mean, "std": policy.std}


def views(images, **options):
    return augment(images, out_size=3, out_dtype=torch.float64, **options)


IMAGES = 0.5 + 0.2 * random(2, 3, 3, 4).tanh()
AFFINE = random(2, 2, 3, seed=1)
ROWS = (random(4, 3), random(4, 3, seed=1))
LABELS = torch.tensor([0, 1, 0, -1])


def loss(anchors, positives, **options):
    return info_nce(anchors, positives, reduction="none", **options)


# name: function of tensors with the keyword `backend`, tensors to differentiate by
BLURRED = replace(get("byol"), blur=0.5, solarize=0.5)
OPS = {
    "augment": (partial(views, **drawn(get("simclr"))), (IMAGES,)),
    "augment, blurred and solarised": (
        partial(views, **drawn(BLURRED)),
        (IMAGES,),
    ),
    "info_nce": (loss, ROWS),
    "info_nce, one-sided": (partial(loss, symmetric=False), ROWS),
    "info_nce, unnormalised": (partial(loss, normalize=False), ROWS),
    "info_nce, labels and negatives": (partial(loss, labels=LABELS, negatives=random(5, 3, seed=2)), ROWS),
    "info_nce, queue of other pairs": (
        partial(loss, negatives=random(5, 3, seed=2), negative_ids=torch.arange(5)[:, None] % 3, in_batch=False),
        ROWS,
    ),
    "info_nce, temperature": (
        lambda a, t, **options: loss(a, ROWS[1], temperature=t, **options),
        (ROWS[0], torch.tensor(0.3, dtype=torch.float64)),
    ),
    "cond_norm": (cond_norm, (random(2, 3, 4, 4), *AFFINE)),
    "add_upsampled": (add_upsampled, (random(2, 3, 4, 6), random(2, 3, 2, 3, seed=1), random(3, seed=2))),
    "cond_norm, upsampled": (partial(cond_norm, upsample=True), (random(2, 3, 4, 4), AFFINE[0], AFFINE[1, :1])),
}
each_op = pytest.mark.parametrize(("op", "inputs"), OPS.values(), ids=OPS.keys())


@each_op
def test_forward_mode_is_the_transpose_of_the_backward(op, inputs):
    directions = tuple(random(*x.shape, seed=5) for x in inputs)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(op(*map(forward_ad.make_dual, inputs, directions))).tangent
    torch.testing.assert_close(torch.func.jvp(op, inputs, directions)[1], tangent)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    weights = random(*out.shape, seed=6)
    grads = torch.autograd.grad(out, leaves, weights)
    there, back = (weights * tangent).sum(), sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(there, back)
    assert abs(there) > 1e-3


@each_op
def test_transforms_of_torch_func(op, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    every = tuple(range(len(inputs)))
    expected = torch.autograd.grad(op(*leaves).square().sum(), leaves)
    torch.testing.assert_close(torch.func.grad(lambda *x: op(*x).square().sum(), every)(*inputs), expected)
    pairs = tuple(torch.stack([x, 1.1 * x]) for x in inputs)
    torch.testing.assert_close(torch.func.vmap(op)(*pairs), torch.stack([op(*(x[i] for x in pairs)) for i in (0, 1)]))


BY_BACKEND = [
    (name, backend)
    for name in OPS
    for backend in ("cpp", "chunked", "reference")
    if backend in INSTALLED and (backend != "chunked" or name.startswith("info_nce"))
    if (name, backend) != ("add_upsampled", "cpp")
]


@pytest.mark.parametrize(("name", "backend"), BY_BACKEND)
def test_second_derivatives(name, backend):
    op, inputs = OPS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(partial(op, backend=backend), leaves, fast_mode=True)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in BY_BACKEND if pair[1] != "reference"])
def test_a_fused_backend_named_by_the_caller_is_refused_where_it_has_no_rule(name, backend):
    op, inputs = OPS[name]
    for transform in (
        lambda f: torch.func.jvp(f, inputs, inputs),
        lambda f: torch.func.jacrev(f)(*inputs),
        lambda f: torch.func.vmap(f)(*(x[None] for x in inputs)),
    ):
        with pytest.raises(ValueError, match=f"backend: {backend} has no forward-mode derivative"):
            transform(partial(op, backend=backend))


def test_a_penalty_on_the_gradient_through_the_module_equals_the_references():
    images = 0.1 + 0.8 * torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for backend in (None, "reference"):
        leaf = images.clone().requires_grad_()
        module = Augment(get("simclr"), 8, out_dtype=torch.float64, backend=backend)
        augmented = module(leaf, generator=torch.Generator().manual_seed(0))
        score = augmented.tanh().square().sum()
        (grad,) = torch.autograd.grad(score, leaf, create_graph=True)
        penalty = grad.square().sum()  # R1 (Mescheder et al. 2018)
        found.append((penalty.detach(), *torch.autograd.grad(penalty, leaf)))
    torch.testing.assert_close(*found)


@each_op
def test_forward_over_reverse(op, inputs):
    """A tangent of the gradient alone, which only the backward operators see."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    given, tangent = random(*out.shape, seed=5), random(*out.shape, seed=6)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, leaves, forward_ad.make_dual(given, tangent), retain_graph=True)
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    torch.testing.assert_close(tangents, list(torch.autograd.grad(out, leaves, tangent)))


def test_sums_by_label_take_tangents_of_the_gradient():
    x = random(4, 3).requires_grad_()
    given, tangent = random(4, 3, seed=5), random(4, 3, seed=6)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(sum_by_label(x, LABELS), x, forward_ad.make_dual(given, tangent))
        found = forward_ad.unpack_dual(grad)
    torch.testing.assert_close(tuple(found), (sum_by_label(given, LABELS), sum_by_label(tangent, LABELS)))


def test_compiled_forward_mode():
    torch._dynamo.reset()
    a, p = ROWS

    def derivative(x, v):
        return torch.func.jvp(lambda x: info_nce(x, p), (x,), (v,))[1]

    ours = torch.compile(derivative, fullgraph=True, backend="aot_eager")(a, p)
    torch.testing.assert_close(ours, derivative(a, p))
    assert abs(ours) > 1e-3


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_group_refuses_second_and_forward_derivatives(group, backend):
    a, p = (x.clone().requires_grad_() for x in ROWS)
    with pytest.raises(ValueError, match="group: .* stay within one process"):
        torch.func.jvp(lambda x: info_nce(x, p, group=group, backend=backend), (a,), (p,))
    for symmetric in (True, False):
        value = info_nce(a, p, group=group, symmetric=symmetric, backend=backend)
        with pytest.raises(NotImplementedError, match="group: .* no second derivatives"):
            torch.autograd.grad(value, a, create_graph=True)


def test_no_operator_has_an_argument_with_a_default():
    # PyTorch leaves such an argument out where it has its default, and 2.11 then misses its gradient, None.
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("copgen_fast")]
    schemas = [torch._C._get_schema(*name.partition(".")[::2]) for name in names]
    given = [f"{s.name} {argument.name}" for s in schemas for argument in s.arguments if argument.has_default_value()]
    assert len(names) > 5 and not given
