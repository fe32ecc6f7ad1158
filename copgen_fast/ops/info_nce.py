"""InfoNCE: the loss that tells an anchor's positive from the other samples of the batch."""

from __future__ import annotations

import math

from torch import Tensor, nn

from copgen_fast.checks import expect_tensor
from copgen_fast.ops import info_nce_reference
from copgen_fast.ops.backend import resolve

_IMPLEMENTATIONS = {"reference": info_nce_reference.info_nce}


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.1,
    base_temperature: float | None = None,
    symmetric: bool = True,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of N anchors and their positives, row i of one with row i of the other.

    With unit rows a_i, p_i (the inputs after L2 normalisation, norms floored at 1e-12) and temperature t:

    - symmetric (NT-Xent, what the reference implementation trains with): over the 2N rows v = [a; p],
      mean of -log( exp(v_i.v_j / t) / sum_{k != i} exp(v_i.v_k / t) ), j the other view of i;
      2N - 2 negatives a row. One pair alone has no negatives: the loss is exactly 0.
    - one-sided (paper, Eq. 1): mean over i of -log( exp(a_i.p_i / t) / sum_k exp(a_i.p_k / t) );
      the N - 1 other positives are the negatives.

    Args:
        anchors, positives: floating [N, D], N >= 1. Half precisions are computed in float32.
        temperature: t > 0.
        base_temperature: b multiplies the loss by t / b; None leaves it. The reference implementation
            fixes b = 0.07, so with t = 0.1 its loss is 1/0.7 of the textbook's.
        symmetric: which of the two forms.
        backend: a name from `backends()`; None takes the fastest. The reference multiplies matrices by
            PyTorch's own settings, so on a GPU TF32 applies where it was switched on.

    Returns:
        The loss, shape [], float32 (float64 for float64 inputs).

    Raises:
        TypeError: an input that is not a floating-point tensor.
        ValueError: shapes that differ or are not [N, D], N = 0, inputs on two devices, a temperature
            that is not positive and finite, an unavailable backend.
    """
    expect_tensor("anchors", anchors, ("N", "D"))
    expect_tensor("positives", positives, ("N", "D"))
    if anchors.shape != positives.shape:
        raise ValueError(
            f"anchors and positives: expected one shape, got {list(anchors.shape)} and {list(positives.shape)}"
        )
    if anchors.device != positives.device:
        raise ValueError(f"positives: on {positives.device}, but anchors are on {anchors.device}")
    if len(anchors) == 0:
        raise ValueError("anchors: expected at least one row, got none")
    _expect_positive("temperature", temperature)
    loss = _IMPLEMENTATIONS[resolve("info_nce", anchors.device, backend)](anchors, positives, temperature, symmetric)
    if base_temperature is None:
        return loss
    return loss * (temperature / _expect_positive("base_temperature", base_temperature))


class InfoNCELoss(nn.Module):
    """`info_nce` with its settings kept: `loss = InfoNCELoss(temperature=0.1)(anchors, positives)`."""

    def __init__(self, temperature: float = 0.1, base_temperature: float | None = None, symmetric: bool = True) -> None:
        super().__init__()
        self.temperature = _expect_positive("temperature", temperature)
        if base_temperature is not None:
            _expect_positive("base_temperature", base_temperature)
        self.base_temperature = base_temperature
        self.symmetric = symmetric

    def forward(self, anchors: Tensor, positives: Tensor) -> Tensor:
        """Loss [] of anchors and positives, floating [N, D]; see `info_nce`."""
        return info_nce(
            anchors,
            positives,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            symmetric=self.symmetric,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, base_temperature={self.base_temperature}, symmetric={self.symmetric}"


def _expect_positive(argument: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}: expected a positive finite number, got {value}")
    return value
