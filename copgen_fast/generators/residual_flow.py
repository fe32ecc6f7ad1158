"""An invertible generator: a Residual Flow (Chen et al. 2019), as the paper's appendix uses one for MNIST.

The embedded weights are of scikit-learn's digits, made by
`python -m copgen_fast.generators.fit.residual_flow` from the training split of `images.sets.digits` alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from copgen_fast.errors import CorruptArtifactError
from copgen_fast.generators._flow_layers import Estimator, ResidualFlow
from copgen_fast.generators._interface import expect_labels
from copgen_fast.generators._weights import with_remedy
from copgen_fast.generators.digits import SIZE, soft_limit, upsampling
from copgen_fast.ops.checks import expect_tensor
from copgen_fast.registry import NoOptions
from copgen_fast.runtime import artifacts
from copgen_fast.runtime import weights as weights_file

EMBEDDED = Path(__file__).parent / "weights" / "residual_flow.safetensors"
MARGIN = 0.02
"""Grey values in [0, 1] are squeezed to [MARGIN, 1 - MARGIN] before the logit, which keeps float32 accurate there."""
LAYOUT = {"side": (2, 32), "levels": (2, 256), "blocks": (1, 256), "width": (1, 4096), "depth": (1, 16)}
"""Numbers in the weights' tensor `layout`, in this order, with the smallest and largest value of each."""


class ResidualFlowGenerator(nn.Module):
    """Latents to grey 32x32 images, the three channels equal; a `copgen_fast.generators.Generator`, and invertible.

    A scan has side x side pixels of real grey values in [-1, 1] and half a grey level beyond: the 17 (digits) or
    256 levels after uniform dequantisation. The flow maps their logits to N(0, I). Latents are multiplied by
    the temperature, so that those from N(0, I) sample the flow at that temperature. Images are scans after a fixed
    bicubic upsampling and `soft_limit`.

    Raises:
        ValueError: a number outside LAYOUT's ranges.
    """

    image_shape: tuple[int, int, int] = (3, SIZE, SIZE)
    classes: int = 0
    layout: Tensor
    temperature: Tensor
    upsampling: Tensor

    def __init__(self, side: int, levels: int, blocks: int, width: int, depth: int, temperature: float = 1.0) -> None:
        super().__init__()
        numbers = (side, levels, blocks, width, depth)
        for (name, (least, most)), number in zip(LAYOUT.items(), numbers, strict=True):
            if not least <= number <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {number}")
        self.side, self.levels = side, levels
        self.latent_dim = side * side
        self.flow = ResidualFlow(self.latent_dim, blocks, width, depth)
        self.register_buffer("layout", torch.tensor(numbers))
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("upsampling", upsampling(side), persistent=False)

    def scan(self, z: Tensor) -> Tensor:
        """Latents [N, L] of the weights' dtype to scans [N, side, side], differentiable once with respect to z.

        A row of NaN or infinities gives NaN or a limit's values, in that row alone.

        Raises:
            TypeError, ValueError: no such latents.
            CopgenError: the weights give a block that is no contraction, and the inverse doesn't converge.
        """
        expect_tensor("z", z, ("N", self.latent_dim), {self.flow.rotation.dtype})
        squeezed = torch.sigmoid(self.flow.inverse(z * self.temperature))
        fractions = (squeezed - MARGIN) / (1 - 2 * MARGIN)
        scans = (2 * self.levels * fractions - 1) / (self.levels - 1) - 1
        return scans.unflatten(1, (self.side, self.side))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L] of the weights' dtype to images [N, 3, 32, 32] in [-1, 1], differentiable once in z.

        Raises:
            TypeError, ValueError, CopgenError: as `scan`; ValueError, too, where labels are given.
        """
        images = soft_limit(self.upsampling @ self.scan(z) @ self.upsampling.T)
        expect_labels(labels, len(z), self.classes)
        return images.unsqueeze(1).repeat(1, 3, 1, 1)

    def logits(self, scans: Tensor) -> tuple[Tensor, Tensor]:
        """Scans [N, side, side] to logits [N, L], the flow's input, and the log-determinant [N] of that map.

        Raises:
            TypeError, ValueError: no such scans, or values outside the range that the model can give.
        """
        expect_tensor("scans", scans, ("N", self.side, self.side), {self.flow.rotation.dtype})
        fractions = ((scans.flatten(1) + 1) * (self.levels - 1) + 1) / (2 * self.levels)
        squeezed = MARGIN + (1 - 2 * MARGIN) * fractions
        if not ((squeezed > 0) & (squeezed < 1)).all():
            half = 1 / (self.levels - 1)
            raise ValueError(
                f"scans: expected values in [-1, 1] or at most {half:.3g} beyond it, the dequantised levels"
            )
        log, rest = squeezed.log(), (-squeezed).log1p()
        scale = math.log((1 - 2 * MARGIN) * (self.levels - 1) / (2 * self.levels))
        return log - rest, (scale - log - rest).sum(1)

    def inverse(self, scans: Tensor) -> Tensor:
        """Scans [N, side, side] to latents [N, L]: `scan`'s inverse, in one pass.

        Raises:
            TypeError, ValueError: as `logits`.
        """
        return self.flow(self.logits(scans)[0]) / self.temperature

    def log_density(self, scans: Tensor, estimator: Estimator | None = None) -> Tensor:
        """Log density [N], in nats and at temperature 1, of scans [N, side, side].

        Args:
            estimator: of the log-determinants; None computes them exactly, in time cubic in L.

        Raises:
            TypeError, ValueError: as `logits`.
        """
        x, log_det = self.logits(scans)
        z, flow_log_det = self.flow.with_log_det(x, estimator)
        gaussian = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return gaussian + log_det + flow_log_det

    def bits_per_dim(self, scans: Tensor, estimator: Estimator | None = None) -> Tensor:
        """Bits a pixel [N] to code dequantised scans [N, side, side]: above the negative log-likelihood of levels."""
        nats = self.log_density(scans, estimator) + self.latent_dim * math.log(2 / (self.levels - 1))
        return -nats / (self.latent_dim * math.log(2))

    def dequantise(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Grey levels [N, side, side], integers 0 .. levels - 1 in any dtype, plus uniform noise, as scans."""
        dtype = self.flow.rotation.dtype
        noise = torch.rand(levels.shape, generator=generator, dtype=dtype)
        return (2 * (levels.to(dtype) + noise) - 1) / (self.levels - 1) - 1

    @torch.no_grad()
    def round_trip_error(self, z: Tensor) -> dict[str, float]:
        """Errors of inverse(scan(z)) against z [N, L], and of its scan against scan(z).

        Returns:
            Largest and mean absolute difference: latent_max, latent_mean, scan_max, scan_mean.
        """
        scans = self.scan(z)
        again = self.inverse(scans)
        of_latents, of_scans = (again - z).abs(), (self.scan(again) - scans).abs()
        return {
            "latent_max": of_latents.max().item(),
            "latent_mean": of_latents.mean().item(),
            "scan_max": of_scans.max().item(),
            "scan_mean": of_scans.mean().item(),
        }


def build(weights: str | Path | None, config: NoOptions) -> ResidualFlowGenerator:
    """The generator with the embedded weights, or with those of a file of `generators.fit.residual_flow`.

    Raises:
        UsageError: the file is missing, unreadable, does not fit, or holds a flow that is not surely invertible; the
            message names it and the fault.
    """
    remedy = "give a residual_flow.safetensors of `python -m copgen_fast.generators.fit.residual_flow --out DIR`"
    with with_remedy("residual-flow", weights or EMBEDDED, remedy) as path:
        tensors = weights_file.load(path, ["layout", "temperature"])
        generator = _laid_out(tensors, path)
        artifacts.load_strictly(generator, tensors, path)
        _expect_invertible(generator, path)
    generator.weights_file = path
    return generator


def _laid_out(tensors: dict[str, Tensor], path: Path) -> ResidualFlowGenerator:
    layout = tensors.get("layout")
    if layout is None or layout.dtype != torch.int64 or layout.shape != (len(LAYOUT),):
        raise CorruptArtifactError(f"{path} does not fit ResidualFlowGenerator: no `layout` of {len(LAYOUT)} integers")
    side, _, blocks, width, depth = layout.tolist()
    held = sum(tensor.numel() for tensor in tensors.values())
    if blocks * (2 * side**2 + (depth - 2) * width) * width > held and depth > 1:  # before that much is allocated
        raise CorruptArtifactError(f"{path} does not fit ResidualFlowGenerator: layout {layout.tolist()} needs more")
    try:
        return ResidualFlowGenerator(*layout.tolist())
    except ValueError as error:
        raise CorruptArtifactError(f"{path} does not fit ResidualFlowGenerator: layout: {error}") from error


def _expect_invertible(generator: ResidualFlowGenerator, path: Path) -> None:
    for name, value in generator.state_dict().items():
        if not value.isfinite().all():
            raise CorruptArtifactError(f"{path}: {name} is not finite")
    if not generator.temperature > 0:
        raise CorruptArtifactError(f"{path}: temperature is {generator.temperature.item():.3g}, expected more than 0")
    for index, block in enumerate(generator.flow.blocks):
        if (bound := block.lipschitz()) >= 1:
            raise CorruptArtifactError(
                f"{path}: block {index} is not surely invertible, its Lipschitz bound is {bound:.4g}"
            )
    rotation = generator.flow.rotation
    if (rotation @ rotation.T - torch.eye(len(rotation))).abs().max() > 1e-4:
        raise CorruptArtifactError(f"{path}: flow.rotation is not orthogonal")
