"""A training step as one CUDA graph, replayed on each batch from static buffers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from copgen_fast.errors import CopgenError
from copgen_fast.training.loop import StepResult

WARM_UP = 3
"""Steps before the capture, in which libraries choose their algorithms (see PyTorch's notes on CUDA graphs)."""


@dataclass
class GraphedStep:
    """`step(batch)` as one CUDA graph; metrics are copied out, watched tensors are valid until the next call.

    The first call captures the graph. A checkpoint must be loaded before, as loading replaces the optimisers' tensors,
    whose addresses the graph holds. The effect of the warm-up is undone. A batch of another shape is stepped without
    the graph, with a message the first time.

    Attributes:
        step: draws nothing at random, never waits for the device, and changes only what follows.
        models, adams, scaler: all that a step changes; torch's fused optimisers, Adam or others.
    """

    step: Callable[[Any], StepResult]
    models: Sequence[nn.Module]
    adams: Sequence[Optimizer]
    scaler: torch.amp.GradScaler
    inputs: Any = field(default=None, init=False)
    replay: Callable[[], None] | None = field(default=None, init=False)
    result: StepResult | None = field(default=None, init=False)
    numbers: Tensor | None = field(default=None, init=False)
    said: bool = field(default=False, init=False)

    def __call__(self, batch: Any) -> StepResult:
        """Replay the graph on `batch`; captures it first if needed."""
        if self.replay is None:
            self.capture(batch)
        if signature(batch) != signature(self.inputs):
            if not self.said:
                print("graph: a batch of another shape than the captured one is stepped without it", flush=True)
            self.said = True
            return self.step(batch)
        copy_into(self.inputs, batch)
        self.replay()
        metrics = self.numbers.clone().unbind()  # the next replay overwrites them
        return StepResult(dict(zip(self.result.metrics, metrics, strict=True)), self.result.watched)

    def capture(self, batch: Any) -> None:
        """Capture the graph for batches of this one's shapes, without changing models, optimisers or scaler.

        Raises:
            CopgenError: the step does something that can't be captured, such as waiting for the device.
            OutOfMemoryError: memory is too small, of which the step without a graph takes less.
        """
        self.inputs = copied(batch)
        snapshot = Snapshot.take(self.models, self.adams, self.scaler)
        try:
            warm_up(lambda: self.step(self.inputs), WARM_UP)
            snapshot.restore()
            for adam in self.adams:
                adam.zero_grad(set_to_none=True)  # gradients come from the graph's own memory
            with _capturable(self.adams):
                self.replay = record(self._run)
        except RuntimeError as error:
            cause = error
            while isinstance(cause.__context__, RuntimeError):  # the error of the capture's end has no reason
                cause = cause.__context__
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).splitlines()[0]
            raise CopgenError(f"the step can't be captured as a CUDA graph ({reason}): run without it") from error

    def _run(self) -> None:
        result = self.step(self.inputs)
        self.numbers = torch.stack([value.detach().float() for value in result.metrics.values()])
        # Detached: the autograd graph would stay, and with it accumulators of gradients on the capture's stream.
        parts = ({name: value.detach() for name, value in part.items()} for part in (result.metrics, result.watched))
        self.result = StepResult(*parts)


@dataclass(frozen=True)
class Snapshot:
    """State of models, optimisers and scaler, restored in place: every tensor keeps its address."""

    now: Callable[[], dict[Any, Tensor]]
    before: dict[Any, Tensor]
    scaler: torch.amp.GradScaler
    scale: dict[str, Any]

    @classmethod
    def take(cls, models: Sequence[nn.Module], adams: Sequence[Optimizer], scaler: torch.amp.GradScaler) -> Snapshot:
        def now() -> dict[Any, Tensor]:
            found: dict[Any, Tensor] = {}
            for number, model in enumerate(models):
                found |= {(number, name): value for name, value in model.state_dict().items()}
            for number, adam in enumerate(adams):
                for at, state in enumerate(adam.state.get(p, {}) for p in _parameters(adam)):
                    found |= {("adam", number, at, name): value for name, value in state.items()}
            return found

        return cls(now, {key: value.clone() for key, value in now().items()}, scaler, scaler.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the state back. Averages that Adam did not have yet become zero, as Adam starts them."""
        for key, value in self.now().items():
            if key in self.before:
                value.copy_(self.before[key])
            else:
                value.zero_()
        self.scaler.load_state_dict(self.scale)


def obstacle(device: torch.device, adams: Sequence[Optimizer]) -> str | None:
    """Reason why a step can't be a CUDA graph here; None where it can."""
    if device.type != "cuda":
        return f"the run is on the {device.type.upper()}"
    if dist.is_available() and dist.is_initialized():
        return "the run has several processes"
    if not all(group.get("fused") for adam in adams for group in adam.param_groups):
        return "it takes --optimizer.impl fused or auto"
    return None


def tensors(batch: Any) -> Iterator[Tensor]:
    """Tensors of a (nested) dataclass of tensors and None, in order of the fields."""
    for part in dataclasses.fields(batch):
        value = getattr(batch, part.name)
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from tensors(value)


def copied(batch: Any) -> Any:
    """A copy of a dataclass of tensors."""
    values = {part.name: getattr(batch, part.name) for part in dataclasses.fields(batch)}
    made = {
        name: value.clone() if isinstance(value, Tensor) else value if value is None else copied(value)
        for name, value in values.items()
    }
    return dataclasses.replace(batch, **made)


def copy_into(static: Any, batch: Any) -> None:
    """Copy a dataclass of tensors into another one of the same shapes and dtypes, those of a dtype in one launch."""
    pairs = list(zip(tensors(static), tensors(batch), strict=True))
    for dtype in {given.dtype for _, given in pairs}:
        torch._foreach_copy_(*zip(*(pair for pair in pairs if pair[1].dtype == dtype), strict=True))


def signature(batch: Any) -> list[tuple]:
    """Shapes, dtypes and devices of a dataclass of tensors."""
    return [(tuple(value.shape), value.dtype, value.device) for value in tensors(batch)]


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def _capturable(adams: Sequence[Optimizer]) -> Iterator[None]:
    """Set `capturable` for the capture alone: the fused kernels are the same, but steps without a graph would warn."""
    groups = [group for adam in adams for group in adam.param_groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def warm_up(call: Callable[[], Any], times: int) -> None:
    """Warm up on a side stream of the current device, and restore the random generators."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.random.fork_rng([torch.cuda.current_device()]):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(side)


def record(call: Callable[[], None]) -> Callable[[], None]:
    """Capture a call; returns the graph's replay."""
    graph = torch.cuda.CUDAGraph()
    # By default CUDA refuses memory and events to all threads meanwhile, also to those that load the next batches.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay
