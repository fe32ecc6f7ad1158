"""Invertible residual networks (Behrmann et al. 2019) with the log-determinants of Residual Flows (Chen et al. 2019).

A block is y = x + g(x) with Lip(g) < 1, hence invertible; its inverse is the fixed point of x <- y - g(x), and the
inverse's gradient comes from the implicit function theorem: no graph is kept through the iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast.errors import CopgenError
from copgen_fast.ops.derivatives import expect_no_graph

BOUND = 0.97
"""Spectral norm that no matrix of a block exceeds. LipSwish has slopes below 1, so Lip(g) <= 0.97 ** matrices."""
LIPSWISH = 1.1
TOLERANCE = 8
"""A fixed point is reached when a row's largest change is at most TOLERANCE * eps * (1 + its largest entry)."""
CHECK_EVERY = 8
MAX_ITERATIONS = 1000
"""At Lip(g) = 0.97 ** 2, 1000 iterations shrink a change by 1e-26."""


class SpectralLinear(nn.Module):
    """An affine map whose matrix is scaled down to spectral norm BOUND where it exceeds that.

    The norm is u' W v, with the vectors u and v of the power iteration stored beside the weight.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(outputs, inputs)))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-0.1, 0.1))
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(inputs), dim=0))

    @torch.no_grad()
    def iterate(self, tolerance: float = 1e-3, most: int = 1000) -> None:
        """Power iteration on u and v until the norm changes by less than the fraction `tolerance`."""
        norm = torch.dot(self.u, self.weight @ self.v)
        for _ in range(most):
            self.v.copy_(F.normalize(self.weight.T @ self.u, dim=0))
            self.u.copy_(F.normalize(self.weight @ self.v, dim=0))
            before, norm = norm, torch.dot(self.u, self.weight @ self.v)
            if (norm - before).abs() <= tolerance * norm:
                break

    def matrix(self) -> Tensor:
        """The scaled weight [outputs, inputs], differentiable with respect to the weight."""
        norm = torch.dot(self.u, self.weight @ self.v)
        return self.weight * (BOUND / norm.clamp_min(BOUND))

    @torch.no_grad()
    def fold(self) -> None:
        """Scale the weight in place by its exact norm, so that `matrix` returns it unchanged."""
        norm = torch.linalg.matrix_norm(self.weight.double(), 2)
        self.weight.mul_((BOUND * (1 - 1e-6) / norm.clamp_min(BOUND)).to(self.weight.dtype))


@dataclass(frozen=True)
class Contraction:
    """g(x) = W_n s_n(... W_1 s_0(x) + b_1 ...) + b_n, s_i LipSwish with steepness i, at given weights.

    LipSwish(x) = x sigmoid(beta x) / 1.1, of slope below 1.
    """

    matrices: list[Tensor]
    biases: list[Tensor]
    betas: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, D] -> g(x) [N, D]."""
        for matrix, bias, beta in zip(self.matrices, self.biases, self.betas, strict=True):
            x = F.linear(x * torch.sigmoid(beta * x) / LIPSWISH, matrix, bias)
        return x

    def linearise(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """g(x) [N, D] and the slopes of every LipSwish at x, which `pull` and `jacobian` take."""
        slopes = []
        for matrix, bias, beta in zip(self.matrices, self.biases, self.betas, strict=True):
            gate = torch.sigmoid(beta * x)
            slopes.append(gate * (1 + beta * x * (1 - gate)) / LIPSWISH)
            x = F.linear(x * gate / LIPSWISH, matrix, bias)
        return x, slopes

    def pull(self, slopes: list[Tensor], w: Tensor) -> Tensor:
        """The products w' J [N, D] of rows w [N, D] with the Jacobians of g."""
        for matrix, slope in zip(reversed(self.matrices), reversed(slopes), strict=True):
            w = (w @ matrix) * slope
        return w

    def jacobian(self, slopes: list[Tensor]) -> Tensor:
        """The Jacobians of g, [N, D, D]; entry (i, j) is dg_i / dx_j."""
        rows = self.matrices[-1] * slopes[-1].unsqueeze(1)
        for matrix, slope in zip(reversed(self.matrices[:-1]), reversed(slopes[:-1]), strict=True):
            rows = (rows.flatten(0, 1) @ matrix).unflatten(0, (len(slope), -1)) * slope.unsqueeze(1)
        return rows


def fixed_point(step: Callable[[Tensor], Tensor], start: Tensor, what: str) -> Tensor:
    """Iterate x <- step(x) from `start` [N, D]; `step` is a contraction that treats each row alone.

    A row that has converged is no longer changed, so that it does not depend on the other rows. A row that
    holds NaN or infinity ends as NaN or infinity.

    Raises:
        CopgenError: finite rows are still moving after MAX_ITERATIONS, or have overflown, as `step` is no contraction.
    """
    small = TOLERANCE * torch.finfo(start.dtype).eps
    x, moving = start, start.new_ones(len(start), 1, dtype=torch.bool)
    for _ in range(0, MAX_ITERATIONS, CHECK_EVERY):
        for _ in range(CHECK_EVERY):
            new = step(x)
            still = (new - x).abs().amax(1, keepdim=True) > small * (1 + new.abs().amax(1, keepdim=True))
            x, moving = torch.where(moving, new, x), moving & still
        lost = start.isfinite().all(1, keepdim=True) & ~x.isfinite().all(1, keepdim=True)
        if not (moving | lost).any():
            return x
    failed = int((moving | lost).sum())
    raise CopgenError(
        f"{what} did not converge in {MAX_ITERATIONS} iterations for {failed} of {len(start)} rows: "
        "its Lipschitz constant is not below 1, or the arithmetic is too coarse"
    )


class _Inverse(torch.autograd.Function):
    """x with x + g(x) = y. With J of g at x, dx = (I + J)^-1 (dy - dg), the latter by g's weights."""

    @staticmethod
    def forward(ctx, count: int, y: Tensor, *weights: Tensor) -> Tensor:  # noqa: ANN001
        g = Contraction(list(weights[:count]), list(weights[count : 2 * count]), list(weights[2 * count :]))
        x = fixed_point(lambda x: y - g(x), y - g(y), "the inverse of a residual block")
        ctx.save_for_backward(x, *weights)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:  # noqa: ANN001
        expect_no_graph("the inverse of a residual block")
        x, *weights = ctx.saved_tensors
        count = len(weights) // 3
        g = Contraction(weights[:count], weights[count : 2 * count], weights[2 * count :])
        slopes = g.linearise(x)[1]
        # u (I + J) = gradient; scaled to entries of order one, which is what the tolerance is relative to.
        scale = gradient.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        unit = gradient / scale + 0 * x  # NaN where x has no finite value, as `fixed_point` asks
        u = scale * fixed_point(lambda u: unit - g.pull(slopes, u), unit, "the gradient of an inverse")
        if not any(ctx.needs_input_grad[2:]):
            return None, u, *[None] * len(weights)
        with torch.enable_grad():
            leaves = [weight.detach().requires_grad_() for weight in weights]
            value = Contraction(leaves[:count], leaves[count : 2 * count], leaves[2 * count :])(x)
            return None, u, *torch.autograd.grad(value, leaves, -u)


class Residual(nn.Module):
    """y = x + g(x) over vectors of D numbers; g has `depth` matrices and `width` hidden units."""

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [dim, *[width] * (depth - 1), dim]
        self.layers = nn.ModuleList(SpectralLinear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.steepness = nn.Parameter(torch.full((depth,), 0.5))

    def contraction(self) -> Contraction:
        """g at the current weights."""
        betas = list(F.softplus(self.steepness))
        return Contraction([layer.matrix() for layer in self.layers], [layer.bias for layer in self.layers], betas)

    @torch.no_grad()
    def lipschitz(self) -> float:
        """An upper bound of Lip(g), by the matrices' exact norms; invertible when below 1."""
        return math.prod(torch.linalg.matrix_norm(layer.matrix().double(), 2).item() for layer in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contraction()(x)

    def inverse(self, y: Tensor) -> Tensor:
        """x [N, D] with x + g(x) = y [N, D], differentiable once, with respect to y and the weights.

        Raises:
            CopgenError: the iteration doesn't converge, as Lip(g) is not below 1.
        """
        g = self.contraction()
        return _Inverse.apply(len(g.matrices), y, *g.matrices, *g.biases, *g.betas)

    def with_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, Tensor]:
        """y [N, D] and log |det dy/dx| [N] at x [N, D]: exact, or an unbiased estimate of it."""
        g = self.contraction()
        value, slopes = g.linearise(x)
        if estimator is not None:
            return x + value, estimator(g, slopes, x)
        jacobian = g.jacobian(slopes)
        return x + value, torch.linalg.slogdet(jacobian + torch.eye(x.shape[1]).to(x)).logabsdet


@dataclass(frozen=True)
class Estimator:
    """log det(I + J) = sum over k >= 1 of (-1)^(k+1) tr(J^k) / k, each row's trace by one random vector.

    After `exact` terms the sum goes on to term k with probability keep^(k - exact), by whose inverse the term is
    weighted: unbiased (Chen et al. 2019, Theorem 1); of finite variance where keep > Lip(g)^2. Its gradient is
    the like estimate of the gradient, tr((I + J)^-1 dJ) (Theorem 2), not the derivative of the value's.

    Args:
        generator: source of the random vectors and of the number of terms, one number for a batch.
    """

    generator: torch.Generator
    exact: int = 8
    keep: float = 0.5

    def __call__(self, g: Contraction, slopes: list[Tensor], like: Tensor) -> Tensor:
        """Estimates [N] for the Jacobians of `g` given by the slopes; `like` [N, D] tells shape and dtype."""
        source = self.generator.device
        v = torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=source).to(like.device)
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64, device=source)
        extra = int(uniform.log() / math.log(self.keep))
        with torch.no_grad():
            w, neumann, value = v, v, torch.zeros_like(v[:, 0])
            for k in range(1, self.exact + extra + 1):
                w = -g.pull(slopes, w)  # (-1)^k v' J^k
                weight = self.keep ** -max(0, k - self.exact)
                value = value - weight / k * (w * v).sum(1)
                neumann = neumann + weight * w  # v' (I + J)^-1, cut off at random
        surrogate = (g.pull(slopes, neumann) * v).sum(1)
        return surrogate + (value - surrogate).detach()


class ActNorm(nn.Module):
    """y = (x + shift) exp(log_scale), entry by entry."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set shift and scale so that x [N, D] is mapped to mean 0 and standard deviation 1 in every entry."""
        self.shift.copy_(-x.mean(0))
        self.log_scale.copy_(-x.std(0).clamp_min(1e-6).log())

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift) * self.log_scale.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.shift


class ResidualFlow(nn.Module):
    """Data x [N, D] -> latent [N, D]: a fixed rotation, then blocks, each after an entry-wise affine map; one more
    affine map ends it. The rotation is to the data's principal axes, so that the first affine map whitens.
    """

    rotation: Tensor

    def __init__(self, dim: int, blocks: int, width: int, depth: int) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.eye(dim))
        self.norms = nn.ModuleList(ActNorm(dim) for _ in range(blocks + 1))
        self.blocks = nn.ModuleList(Residual(dim, width, depth) for _ in range(blocks))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set rotation and affine maps from data [N, D], N > 1."""
        centred = (x - x.mean(0)).double()
        self.rotation.copy_(torch.linalg.eigh(centred.T @ centred).eigenvectors.T)
        self.iterate_norms()
        x = x @ self.rotation.T
        for norm, block in zip(self.norms, self.blocks, strict=False):
            norm.initialise(x)
            x = block(norm(x))
        self.norms[-1].initialise(x)

    def iterate_norms(self, tolerance: float = 1e-3) -> None:
        """Bring the stored vectors of every spectral norm up to date with its weight."""
        for block in self.blocks:
            for layer in block.layers:
                layer.iterate(tolerance)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.rotation.T
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = block(norm(x))
        return self.norms[-1](x)

    def inverse(self, z: Tensor) -> Tensor:
        """Latents [N, D] -> data [N, D], differentiable once.

        Raises:
            CopgenError: a block is no contraction.
        """
        z = self.norms[-1].inverse(z)
        for norm, block in zip(reversed(self.norms[:-1]), reversed(self.blocks), strict=True):
            z = norm.inverse(block.inverse(z))
        return z @ torch.linalg.inv(self.rotation).T  # its transpose only to the precision in which it was stored

    def with_log_det(self, x: Tensor, estimator: Estimator | None = None) -> tuple[Tensor, Tensor]:
        """Latents [N, D] and log |det| [N] of the Jacobian at x [N, D]."""
        x = x @ self.rotation.T
        total = torch.stack([norm.log_scale.sum() for norm in self.norms]).sum().expand(len(x))
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x, log_det = block.with_log_det(norm(x), estimator)
            total = total + log_det
        return self.norms[-1](x), total
