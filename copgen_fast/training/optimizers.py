"""Adam, SGD and LARS by implementation (foreach, fused, apex), and a step under loss scaling."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from copgen_fast.errors import UsageError

# Options of how a step is computed: kept from the optimiser, not loaded from a checkpoint.
_IMPLEMENTATION = ("foreach", "fused", "capturable")
_OPTION = "--optimizer.impl apex"
_TRUST = 0.001  # LARS's coefficient eta


def resolve(impl: str, device: torch.device) -> str:
    """foreach, fused or apex; auto is fused, which is the fastest on CPUs, too.

    Raises:
        UsageError: apex without a GPU, or not installed, or another project of that name.
    """
    if impl != "apex":
        return "fused" if impl == "auto" else impl
    if device.type != "cuda":
        raise UsageError(f"{_OPTION} needs a CUDA device: choose fused or auto on the {device.type.upper()}")
    _apex()
    return "apex"


def adam(
    parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], impl: str, device: torch.device
) -> Optimizer:
    """Adam for parameters on `device`; raises as `resolve`."""
    impl = resolve(impl, device)
    if impl == "apex":
        return _apex().FusedAdam(parameters, lr, betas=betas, adam_w_mode=False)
    return _portable(torch.optim.Adam(parameters, lr, betas, **{impl: True}))


def sgd(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    lr: float,
    momentum: float,
    weight_decay: float,
    impl: str,
    device: torch.device,
) -> Optimizer:
    """SGD with momentum for parameters, or groups of them, on `device`; raises as `resolve`."""
    impl = resolve(impl, device)
    if impl == "apex":
        return _apex().FusedSGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    return _from_zero(torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, **{impl: True}), impl)


def lars(
    groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float, impl: str, device: torch.device
) -> Optimizer:
    """LARS with momentum for groups of parameters on `device`: foreach, or fused."""
    split = []
    for group in groups:
        weights = [parameter for parameter in group["params"] if parameter.ndim > 1]
        others = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        split += [group | {"params": weights, "adapted": True}, group | {"params": others, "adapted": False}]
    impl = "fused" if impl in ("auto", "apex") else impl
    return _from_zero(Lars(split, lr, momentum, weight_decay, **{impl: True}), impl)


class Lars(torch.optim.SGD):
    """LARS (You et al. 2017): SGD whose steps are scaled to each weight's norm.

    g <- (g + d w) 0.001 |w| / (|g| + d |w|) with weight decay d, then SGD with momentum. Groups with `"adapted": False`
    (norms' weights and biases, as in BYOL) take SGD's step without weight decay. The host never waits for the device.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float, **impl: bool
    ) -> None:
        super().__init__(groups, lr, momentum, **impl)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["adapted"] and weights:
                gradients = [weight.grad for weight in weights]
                of_weights, of_gradients = (torch.stack(torch._foreach_norm(x)) for x in (weights, gradients))
                ratios = _TRUST * of_weights / (of_gradients + self.decay * of_weights + 1e-8)
                torch._foreach_add_(gradients, weights, alpha=self.decay)
                torch._foreach_mul_(gradients, list(torch.where(of_weights > 0, ratios, 1).unbind()))
        return super().step(closure)


def _from_zero(optimizer: torch.optim.SGD, impl: str) -> Optimizer:
    if impl == "fused":
        # torch allocates momentum without a value and fills it in the first step: where that overflows and is skipped,
        # the next step would add to whatever the memory held.
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return _portable(optimizer)


def descend(loss: Tensor, scaler: torch.amp.GradScaler, *optimizers: Optimizer) -> None:
    """Backward of the scaled loss, then one step of each optimiser by the gradients of its parameters."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    with record_function("backward"):
        scaler.scale(loss).backward()
    step(scaler, *optimizers)


@record_function("optimizer")
def step(scaler: torch.amp.GradScaler, *optimizers: Optimizer) -> None:
    """One step of each optimiser by its scaled gradients; of none if any of these overflowed.

    torch's fused optimisers skip an overflowed step without a wait of the host; others wait in fp16.
    """
    if scaler.is_enabled():
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        overflows = [x for optimizer in optimizers for x in scaler._found_inf_per_device(optimizer).values()]
        overflowed = torch.stack(overflows).amax()
        for overflow in overflows:
            overflow.copy_(overflowed)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


def _portable(optimizer: Optimizer) -> Optimizer:
    """Keep the optimiser's implementation when a checkpoint of another one, or of another device, is loaded."""

    def keep_implementation(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        own = {name: optimizer.defaults[name] for name in _IMPLEMENTATION if name in optimizer.defaults}
        return state | {"param_groups": [group | own for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_implementation)
    return optimizer


def _apex() -> Any:
    """NVIDIA's apex.optimizers."""
    build = "build it from github.com/NVIDIA/apex, or choose fused"
    if find_spec("apex") is None:
        raise UsageError(f"{_OPTION}: NVIDIA's apex is not installed: {build}")
    try:
        found = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # the compiled part, without which its optimisers refuse to start
    except ModuleNotFoundError as error:
        if error.name == "amp_C":
            raise UsageError(f"{_OPTION}: apex is installed without its CUDA extensions: {build}") from error
        found = None
    except Exception:  # another project's import may fail in any way
        found = None
    if not hasattr(found, "FusedAdam"):
        other = "the installed `apex` is not NVIDIA's (PyPI's apex is another project)"
        raise UsageError(f"{_OPTION}: {other}: uninstall it and {build}")
    return found
