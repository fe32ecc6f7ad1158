"""Learn T_z: max over T_z, min over f of L_NCE(f(t_x(G(z))), f(t_x'(G(z + T_z(z))))) (paper Eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from copgen_fast import augmentations, encoders, generators, positives
from copgen_fast.config import NavigatorConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.errors import UsageError
from copgen_fast.images import pictures
from copgen_fast.methods import nt_xent
from copgen_fast.ops import AugmentParams
from copgen_fast.positives.navigator import Navigator, untrained
from copgen_fast.runtime import artifacts, devices, seeds
from copgen_fast.runtime.distributed import Ranks
from copgen_fast.stages._calibration import find_delta
from copgen_fast.stages._draws import Batch, draw_batch, draw_labels, draw_latents
from copgen_fast.stages.run import Run
from copgen_fast.training import cuda_graph, loop, optimizers, sync_bn
from copgen_fast.training.adversarial import ReverseGradient, frozen
from copgen_fast.training.grad_sync import data_parallel
from copgen_fast.training.loop import StepResult
from copgen_fast.training.metrics import Row, last_row

GRID_COLUMNS = 16


@dataclass(frozen=True)
class Players:
    """The navigator T_z and the estimator f, the frozen generator G between them, and what trains both.

    Of several ranks, each has its rows of the batch; gradients and losses are those of the whole.
    """

    G: nn.Module
    T_z: Navigator
    f: nn.Module
    adam_f: torch.optim.Optimizer
    adam_T: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    options: NavigatorConfig
    device: torch.device
    precision: str
    ranks: Ranks


def alternating_step(players: Players, batch: Batch) -> StepResult:
    """The paper's update: f descends, then T_z ascends through the updated f, from a second forward of f."""
    dz, x, x_prime = generate(players, batch.z, batch.labels)
    v, v_prime = t_x(players, x, batch.params), t_x(players, x_prime, batch.params_prime)

    loss_f = L_NCE(players, v, v_prime.detach(), batch.labels)
    optimizers.descend(loss_f, players.scaler, players.adam_f)

    with frozen(players.adam_f):
        loss_T = -L_NCE(players, v, v_prime, batch.labels)
        optimizers.descend(loss_T, players.scaler, players.adam_T)
    return observe(players, batch.z, dz, x, x_prime, loss_f, loss_T)


def simultaneous_step(players: Players, batch: Batch) -> StepResult:
    """One forward; reversing the gradient where it leaves f makes the same loss update both. Not the paper's."""
    dz, x, x_prime = generate(players, batch.z, batch.labels)
    v, v_prime = t_x(players, x, batch.params), t_x(players, x_prime, batch.params_prime)

    loss_f = L_NCE(players, v, ReverseGradient.apply(v_prime), batch.labels)
    optimizers.descend(loss_f, players.scaler, players.adam_f, players.adam_T)
    return observe(players, batch.z, dz, x, x_prime, loss_f, -loss_f)


@record_function("generator")
def generate(players: Players, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dz = T_z(z), x = G(z) without gradient, and x_prime = G(z + dz), of the same classes where there are any."""
    with torch.no_grad():
        x = players.G(z, labels)
    dz = players.T_z(z)
    return dz, x, players.G(z + dz, labels)


def t_x(players: Players, x: Tensor, params: AugmentParams) -> Tensor:
    """Augmented views [N, 3, H, W] of images [N, 3, H, W] in [-1, 1], by parameters drawn per image."""
    # G's range was checked when it was built; that G(z + dz) leaves it a little on the way is no fault.
    policy = augmentations.get(players.options.augmentation)
    size = players.options.view_size
    return augmentations.make_views((x + 1) / 2, params, policy, check_range=False, out_size=size)


def L_NCE(players: Players, v: Tensor, v_prime: Tensor, labels: Tensor | None) -> Tensor:
    """The contrastive loss of f (paper Eq. 1, symmetric), or SupCon by the generator's classes.

    Both views go through f at once, so that batch normalisation sees them as one batch.
    """
    options = players.options
    with record_function("estimator"), devices.autocast(players.device, players.precision):
        h = players.f(torch.cat([v, v_prime]))
    with record_function("loss"):
        labels = labels if options.loss == "supcon" else None
        return nt_xent(h, options.temperature, options.base_temperature, labels, players.ranks.group)


def observe(
    players: Players, z: Tensor, dz: Tensor, x: Tensor, x_prime: Tensor, loss_f: Tensor, loss_T: Tensor
) -> StepResult:
    """Metrics of a step, left on the device: of the whole batch, except the losses, which the loop averages over ranks.

    `displacement_shared` is ||E dz||^2 / E||dz||^2: the part of the displacement's energy that is one constant offset
    for all latents (0.44 in the navigator that the paper's authors released). `displacement_norm_0` and so on are those
    of the generator's latent groups, where it has several.
    """
    watched = {"latents": z, "displacement": dz, "anchor images": x, "positive images": x_prime}
    with torch.no_grad():
        z, dz = players.ranks.gathered(z), players.ranks.gathered(dz)
        metrics = {
            "loss_estimator": loss_f,
            "loss_navigator": loss_T,
            "displacement_mean": dz.mean(),
            "displacement_std": dz.std(),
            **positives.norms(dz, players.G.latent_groups),
            "displacement_shared": dz.mean(0).square().sum() / dz.square().sum(1).mean().clamp_min(1e-20),
            "positive_std": (z + dz).std(),
        }
    return StepResult(metrics, watched)


def make_players(run: Run, G: nn.Module, T_z: Navigator) -> Players:
    """Both players with their optimisers; f starts from the run's seed."""
    config, options = run.config, run.config.navigator
    with seeds.seeded(config.seed, "estimator"):
        f = ContrastiveModel(options.estimator)
    f = encoders.prepare(f, run.device, compiled=config.compile)
    f = sync_bn.convert_sync_bn(f, config.bn, run.ranks, run.device)
    f, T_z = data_parallel(f, run.ranks), data_parallel(T_z, run.ranks)
    betas, impl = (0.5, 0.999), config.optimizer.impl
    return Players(
        G=G,
        T_z=T_z,
        f=f,
        adam_f=optimizers.adam(f.parameters(), options.estimator_lr, betas, impl, run.device),
        adam_T=optimizers.adam(T_z.parameters(), options.lr, betas, impl, run.device),
        scaler=devices.grad_scaler(run.device, config.precision, getattr(G, "half_dtype", torch.float32)),
        options=options,
        device=run.device,
        precision=config.precision,
        ranks=run.ranks,
    )


def make_step(run: Run, players: Players) -> Callable[[Batch], StepResult]:
    """The configured update as a function of the batch; a CUDA graph with --navigator.graph, where possible."""
    options = run.config.navigator
    update = alternating_step if options.update == "alternating" else simultaneous_step
    step = partial(update, players)
    if not options.graph:
        return step
    adams = (players.adam_f, players.adam_T)
    reason = cuda_graph.obstacle(run.device, adams)
    if reason is not None:
        if run.ranks.first:
            print(f"navigator.graph: not used, {reason}", flush=True)
        return step
    return cuda_graph.GraphedStep(step, (players.f, players.T_z), adams, players.scaler)


class Rebound:
    """The rule to stop where f's loss, having been below `options.rebound`, climbs back to it (Serez et al. 2025)."""

    def __init__(self, options: NavigatorConfig) -> None:
        self.options = options
        self.lowest = math.inf

    def reached(self, row: Row) -> bool:
        """Whether the loss has climbed back in the last row logged."""
        level, loss = self.options.rebound, row["loss_estimator"]
        if level is None:
            return False
        fell, self.lowest = self.lowest < level, min(self.lowest, loss)
        return fell and loss >= level and row["samples"] >= self.options.rebound_after

    def state_dict(self) -> dict[str, float]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.lowest = state["lowest"]


def run(run: Run) -> None:
    """Train T_z; leaves navigator.safetensors, kept earlier ones, picture grids and the log in RUN/navigator."""
    if run.navigator_file.exists():
        return
    config, folder = run.config, run.folder / "navigator"
    G = generators.load(config.generator, run.device)
    generators.expect_differentiable(G, config.generator, "navigator")
    generators.expect_size(G, "navigator.view_size", config.navigator.view_size)
    run.expect_classes(G.classes)
    if run.ranks.first:
        artifacts.write_record(run.generator_record, G.record)
    if config.navigator.loss == "supcon" and G.classes < 2:
        has = "has none" if not G.classes else "has one, without negatives"
        raise UsageError(f"navigator.loss: supcon needs classes, and generator {config.generator.name} {has}")
    options = find_delta(run, G)
    T_z = untrained(G.latent_dim, options, config.seed, G.latent_groups, G.latent_shape)
    players = make_players(run, G, T_z.to(run.device))
    step = make_step(run, players)
    shown_z = draw_latents(G, seeds.derive32(config.seed, "grid"), GRID_COLUMNS, run.device)
    shown_labels = draw_labels(G, GRID_COLUMNS, run.device, config.seed, "grid labels")
    keep_every = max(1, options.grid_every // options.batch)

    def data(index: int) -> Batch:
        return draw_batch(config, G, index, run.device, run.ranks)

    def step_and_keep(index: int, batch: Batch) -> StepResult:
        if run.ranks.first and index % keep_every == 0:
            keep(folder, index * options.batch, players, shown_z, shown_labels)
        return step(batch)

    rebound = Rebound(options)

    def stop(row: Row) -> bool:
        far = options.delta is not None and not options.project and row["displacement_norm"] >= options.delta
        return rebound.reached(row) or far

    steps = max(1, options.samples // options.batch)
    plan = loop.Plan("navigator", folder, steps, options.batch, config.log_every, config.save_every)
    state = {"T": players.T_z, "f": players.f, "adam_T": players.adam_T, "adam_f": players.adam_f}
    state["scaler"] = players.scaler
    if options.rebound is not None:
        state["rebound"] = rebound
    summary = loop.run(step_and_keep, data, state, plan, stop, run.ranks)
    if run.ranks.first:
        keep(folder, int(summary["samples"]), players, shown_z, shown_labels)
        artifacts.write_record(folder / "summary.json", last_row(folder / "metrics.jsonl") | summary)
        artifacts.write_tensors(run.navigator_file, players.T_z.state_dict())
    run.ranks.barrier("the navigator's end")


def keep(folder: Path, samples: int, players: Players, z: Tensor, labels: Tensor | None) -> None:
    """Keep T_z as it is after `samples` latents, and a picture of anchors over positives."""
    artifacts.write_tensors(folder / "kept" / f"{samples:010d}.safetensors", players.T_z.state_dict())
    with torch.no_grad():
        _, x, x_prime = generate(players, z, labels)
    pictures.write_grid(folder / "grids" / f"{samples:010d}.png", torch.cat([x, x_prime]), columns=len(z))
