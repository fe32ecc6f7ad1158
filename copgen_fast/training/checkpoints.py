"""Checkpoints of a training run: what is in them, and the check that it is what the run left."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from copgen_fast import schema
from copgen_fast.errors import CorruptArtifactError
from copgen_fast.runtime import artifacts

_REMEDY = "delete it, and its stage starts again"


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> Any: ...


@dataclass
class Position:
    """Position of a run, saved in its checkpoint."""

    step: int = 0
    seconds: float = 0.0
    """Time of all steps, also of those before a resume."""
    waited: float = 0.0
    """Part of it spent waiting for data."""
    finished: bool = False


def save(path: Path, label: str, state: dict[str, Stateful], position: Position) -> None:
    """Write a checkpoint of the run called `label`."""
    states = {name: holder.state_dict() for name, holder in state.items()}
    artifacts.write_checkpoint(path, {"label": label, "progress": asdict(position), "state": states})


def restore(path: Path, label: str, state: dict[str, Stateful], steps: int) -> Position:
    """Load what `save` wrote into the same holders.

    Raises:
        CorruptArtifactError: the file is altered, another run's, or holds other fields, types or shapes; named.
    """
    saved = artifacts.read_checkpoint(path)
    try:
        if (found := saved.get("label", label)) != label:
            raise ValueError(f"it is of {found}, not of {label}")
        position = schema.check(saved.get("progress"), Position, "progress")
        numbers = position.step, position.seconds, position.waited
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or position.step > steps:
            raise ValueError(f"progress: expected up to {steps} steps and their seconds, got {position}")
        states = schema.check(saved.get("state"), dict[str, dict], "state")
        if states.keys() != state.keys():
            raise ValueError(f"state: expected {', '.join(state)}, got {', '.join(states)}")
        for name, holder in state.items():
            if isinstance(holder, torch.optim.Optimizer):
                _expect_optimizer(states[name], holder, f"state.{name}")
            else:
                _expect_like(states[name], holder.state_dict(), f"state.{name}")
            holder.load_state_dict(states[name])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = str(error).replace("\n", " ")
        raise CorruptArtifactError(f"{path}: {what}: {_REMEDY}") from error
    return position


def _expect_like(found: Any, own: Any, field: str) -> None:
    """Raises ValueError where `found` is not built as `own` is: names, lengths, shapes and types."""
    if isinstance(own, dict):
        if not isinstance(found, dict) or found.keys() != own.keys():
            names = sorted(map(str, found.keys() ^ own.keys()))[:3] if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{field}: other fields than expected ({names})")
        for name, value in own.items():
            _expect_like(found[name], value, f"{field}.{name}")
    elif isinstance(own, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(own):
            raise ValueError(f"{field}: expected {len(own)} values")
        for number, (item, value) in enumerate(zip(found, own, strict=True)):
            _expect_like(item, value, f"{field}[{number}]")
    elif isinstance(own, Tensor):
        _expect_tensor(found, own.shape, own.dtype, field)
    elif not _is_scalar(found, own):
        raise ValueError(f"{field}: expected {type(own).__name__}, got {type(found).__name__}")


def _is_scalar(found: Any, own: Any) -> bool:
    """Whether `found` may be where `own` was; switches of optimisers may be unset, and rates be tensors."""
    if own is None or isinstance(own, bool):
        return found is None or isinstance(found, bool) or own is None
    if isinstance(own, (int, float)):
        return isinstance(found, (int, float)) or (isinstance(found, Tensor) and found.numel() == 1)
    return isinstance(found, type(own))


def _expect_tensor(found: Any, shape: torch.Size, dtype: torch.dtype, field: str) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{field}: expected a tensor {list(shape)}, got {type(found).__name__}")
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{field} is {list(found.shape)} {found.dtype}, expected {list(shape)} {dtype}")


def _expect_optimizer(found: dict, optimizer: torch.optim.Optimizer, field: str) -> None:
    """As `_expect_like`, where a new optimiser has no averages yet: they are shaped as its parameters."""
    own = optimizer.state_dict()
    if found.keys() != own.keys() or not isinstance(found["state"], dict):
        raise ValueError(f"{field}: other fields than expected ({', '.join(map(str, found))})")
    if not isinstance(found["param_groups"], list) or len(found["param_groups"]) != len(own["param_groups"]):
        raise ValueError(f"{field}.param_groups: expected {len(own['param_groups'])} groups")
    for number, (group, mine) in enumerate(zip(found["param_groups"], own["param_groups"], strict=True)):
        # Other versions of torch have other options.
        needed = {"params", "lr"} | (mine.keys() & (group.keys() if isinstance(group, dict) else set()))
        group = {name: value for name, value in group.items() if name in needed} if isinstance(group, dict) else group
        _expect_like(group, {name: mine[name] for name in needed}, f"{field}.param_groups[{number}]")
    if [group["params"] for group in found["param_groups"]] != [group["params"] for group in own["param_groups"]]:
        raise ValueError(f"{field}.param_groups: other parameters than expected")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, averages in found["state"].items():
        if number not in range(len(parameters)) or not isinstance(averages, dict):
            raise ValueError(f"{field}.state.{number}: no averages of a parameter")
        for name, value in averages.items():
            counted = name == "step" and _is_scalar(value, 0)
            if not counted and not (name == "momentum_buffer" and value is None):
                _expect_tensor(value, parameters[number].shape, getattr(value, "dtype", None), f"{field}.state.{name}")
