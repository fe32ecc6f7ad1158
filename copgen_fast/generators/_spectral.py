"""Spectral normalisation as trained generators store it: one power iteration from a stored vector a forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-4


def normalised(weight: Tensor, u: Tensor) -> Tensor:
    """weight / sigma, where one power iteration from u [1, out] estimates its largest singular value sigma.

    No gradient passes through the iteration, as in the published code.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        v = F.normalize(u @ matrix, eps=EPSILON)
        u = F.normalize(v @ matrix.T, eps=EPSILON)
    return weight / (v @ matrix.T @ u.T).squeeze()


class _Spectral:
    """A layer with buffers `u0` [1, out] and `sv0` [1], of which the latter is unused."""

    weight: Tensor
    u0: Tensor

    def _keep_vectors(self, out: int) -> None:
        self.register_buffer("u0", torch.randn(1, out))
        self.register_buffer("sv0", torch.ones(1))

    def normalised_weight(self) -> Tensor:
        """The weight divided by its spectral norm."""
        return normalised(self.weight, self.u0)


class SpectralLinear(_Spectral, nn.Linear):
    """nn.Linear with spectral normalisation."""

    def __init__(self, features: int, out: int, bias: bool = True) -> None:
        super().__init__(features, out, bias)
        self._keep_vectors(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight(), self.bias)


class SpectralConv2d(_Spectral, nn.Conv2d):
    """nn.Conv2d with spectral normalisation."""

    def __init__(self, channels: int, out: int, kernel: int, **options: Any) -> None:
        super().__init__(channels, out, kernel, **options)
        self._keep_vectors(out)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalised_weight(), self.bias)


def normalised_weight(layer: nn.Module) -> Tensor:
    """The normalised weight in eval mode of such a layer or of one by torch.nn.utils.spectral_norm."""
    if isinstance(layer, _Spectral):
        return layer.normalised_weight()
    matrix = layer.weight_orig.flatten(1)
    return layer.weight_orig / torch.dot(layer.weight_u, matrix @ layer.weight_v)
