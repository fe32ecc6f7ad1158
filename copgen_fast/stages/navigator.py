"""Learn T: max over T, min over f of InfoNCE(f(t(G(z))), f(t'(G(z + T(z))))) (paper Eq. 6)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from copgen_fast import augmentations, encoders, generators, methods
from copgen_fast.augmentations import make_views
from copgen_fast.config import RunConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.errors import UsageError
from copgen_fast.images import pictures
from copgen_fast.ops import AugmentParams
from copgen_fast.positives.navigator import Navigator, untrained
from copgen_fast.runtime import artifacts, devices, latents, seeds
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.stages import Run
from copgen_fast.training import cuda_graph, loop, optimizers, sync_bn
from copgen_fast.training.grad_sync import GradientSync
from copgen_fast.training.loop import StepResult
from copgen_fast.training.metrics import Row, read_rows

GRID_COLUMNS = 16


@dataclass(frozen=True)
class Batch:
    """Everything random of a step, on the device: the steps themselves draw nothing and never wait for it.

    Attributes:
        z: latents [N, L].
        params: of the joint batch's augmentation, 2N rows, anchors first.
        labels: classes [N] of a conditional generator's images; an anchor and its positive share theirs.
    """

    z: Tensor
    params: AugmentParams
    labels: Tensor | None = None


@dataclass(frozen=True)
class Game:
    """The two players and what they play on, in the paper's symbols."""

    G: nn.Module
    T: Navigator
    f: nn.Module
    t_x: Callable[[Tensor, AugmentParams], Tensor]
    """Augments the joint batch [2N, 3, H, W], a draw of its own for every image."""
    nce: Callable[[Tensor, Tensor | None], Tensor]
    """Contrastive loss of f on a joint batch of views, and its labels."""
    adam_f: torch.optim.Optimizer
    adam_T: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranks: Ranks = ALONE
    """Of several, each plays with its rows of the batch; gradients and losses are those of the whole."""

    def descend(self, loss: Tensor, *players: torch.optim.Optimizer) -> None:
        """Minimise `loss` by one step of each player; of none if its scaled gradient overflows for any."""
        optimizers.descend(loss, self.scaler, *players)


def alternating_step(game: Game, batch: Batch) -> StepResult:
    """The paper's update: f descends, then T ascends through the updated f, from a second forward."""
    T_z, x, x_pos = generate(game, batch.z, batch.labels)
    v = game.t_x(torch.cat([x, x_pos]), batch.params)
    loss_f = game.nce(v.detach(), batch.labels)
    game.descend(loss_f, game.adam_f)
    with weights_frozen(game.f):
        loss_T = -game.nce(v, batch.labels)
        game.descend(loss_T, game.adam_T)
    return observe(game.ranks, batch.z, T_z, x, x_pos, loss_f, loss_T)


def simultaneous_step(game: Game, batch: Batch) -> StepResult:
    """One forward; reversing the gradient where it leaves f makes the same loss update both. Not the paper's."""
    T_z, x, x_pos = generate(game, batch.z, batch.labels)
    v = game.t_x(torch.cat([x, x_pos]), batch.params)
    loss_f = game.nce(ReverseGradient.apply(v), batch.labels)
    game.descend(loss_f, game.adam_f, game.adam_T)
    return observe(game.ranks, batch.z, T_z, x, x_pos, loss_f, -loss_f)


@record_function("generator")
def generate(game: Game, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """T(z), anchors G(z) without gradient, and positives G(z + T(z)), of the same classes where there are any."""
    with torch.no_grad():
        x = game.G(z, labels)
    T_z = game.T(z)
    return T_z, x, game.G(z + T_z, labels)


def observe(
    ranks: Ranks, z: Tensor, T_z: Tensor, x: Tensor, x_pos: Tensor, loss_f: Tensor, loss_T: Tensor
) -> StepResult:
    """The monitored numbers, left on the device: of the whole batch, but losses, whose mean over ranks is.

    `displacement_shared` is ||mean_z T(z)||^2 / E||T(z)||^2: the part of the displacement's energy that is one
    constant offset for all instances (0.44 in the navigator that the paper's authors released).
    """
    watched = {"latents": z, "displacement": T_z, "anchor images": x, "positive images": x_pos}
    with torch.no_grad():
        z, T_z = ranks.gathered(z), ranks.gathered(T_z)
        metrics = {
            "loss_estimator": loss_f,
            "loss_navigator": loss_T,
            "displacement_mean": T_z.mean(),
            "displacement_std": T_z.std(),
            "displacement_norm": T_z.norm(dim=1).mean(),
            "displacement_shared": T_z.mean(0).square().sum() / T_z.square().sum(1).mean().clamp_min(1e-20),
            "positive_std": (z + T_z).std(),
        }
    return StepResult(metrics, watched)


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is negated (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:  # noqa: ANN001
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ANN001
        return -gradient


@contextlib.contextmanager
def weights_frozen(module: nn.Module) -> Iterator[None]:
    """Compute no weight gradients of `module`: in T's update the reference computes and discards them."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def make_game(run: Run, G: nn.Module, T: Navigator) -> Game:
    config, options = run.config, run.config.navigator
    with seeds.seeded(config.seed, "estimator"):
        f = ContrastiveModel(options.estimator)
    f = encoders.prepare(f, run.device, compiled=config.compile)
    f = sync_bn.convert_sync_bn(f, config.bn, run.ranks, run.device)
    run.ranks.broadcast_parameters(f, T)
    for player in (f, T):
        GradientSync(player.parameters(), run.ranks)
    policy = augmentations.get(options.augmentation)

    def t_x(images: Tensor, params: AugmentParams) -> Tensor:
        return make_views((images + 1) / 2, params, policy)

    def nce(views: Tensor, labels: Tensor | None) -> Tensor:
        with record_function("estimator"), devices.autocast(run.device, config.precision):
            embeddings = f(views)
        with record_function("loss"):
            labels = labels if options.loss == "supcon" else None
            return methods.nt_xent(embeddings, options.temperature, options.base_temperature, labels, run.ranks.group)

    betas, impl = (0.5, 0.999), config.optimizer.impl
    return Game(
        G=G,
        T=T,
        f=f,
        t_x=t_x,
        nce=nce,
        adam_f=optimizers.adam(f.parameters(), options.estimator_lr, betas, impl, run.device),
        adam_T=optimizers.adam(T.parameters(), options.lr, betas, impl, run.device),
        scaler=devices.grad_scaler(run.device, config.precision, getattr(G, "half_dtype", torch.float32)),
        ranks=run.ranks,
    )


def draw_latents(config: RunConfig, G: nn.Module, seed: int, count: int, device: torch.device) -> Tensor:
    """Latents [count, L] of the configured prior, on `device`."""
    return devices.send(latents.sample(config.generator.prior, seed, (count, G.latent_dim)), device)


def draw_labels(G: nn.Module, count: int, device: torch.device, *key: seeds.Key) -> Tensor | None:
    """Uniform classes [count] of a conditional generator, on `device`; None of another."""
    if not G.classes:
        return None
    return devices.send(torch.randint(G.classes, (count,), generator=seeds.generator(*key)), device)


def draw_batch(config: RunConfig, G: nn.Module, index: int, device: torch.device, ranks: Ranks = ALONE) -> Batch:
    """What step `index` is given, drawn on the CPU from seeds: the same whatever the device and the number of ranks."""
    options = config.navigator
    z = draw_latents(config, G, seeds.derive32(config.seed, "navigator latents", index), options.batch, device)
    params = AugmentParams.sample(
        2 * options.batch,
        G.image_shape[1:],
        augmentations.get(options.augmentation),
        generator=seeds.generator(config.seed, "navigator views", index),
    )
    labels = draw_labels(G, options.batch, device, config.seed, "navigator labels", index)
    rows = ranks.rows(options.batch)
    return Batch(
        z[rows],
        devices.send(params[ranks.joint_rows(options.batch)], device),
        None if labels is None else labels[rows],
    )


def make_step(run: Run, game: Game) -> Callable[[Batch], StepResult]:
    """One update of the configured kind; as a CUDA graph where that is asked for and possible."""
    options = run.config.navigator
    update = alternating_step if options.update == "alternating" else simultaneous_step
    step = partial(update, game)
    if not options.graph:
        return step
    adams = (game.adam_f, game.adam_T)
    reason = cuda_graph.obstacle(run.device, adams)
    if reason is not None:
        if run.ranks.first:
            print(f"navigator.graph: not used, {reason}", flush=True)
        return step
    return cuda_graph.GraphedStep(step, (game.f, game.T), adams, game.scaler)


def run(run: Run) -> None:
    """Train T; leaves navigator.safetensors, kept earlier ones, picture grids and the log in RUN/navigator."""
    if run.navigator_file.exists():
        return
    config, options, folder = run.config, run.config.navigator, run.folder / "navigator"
    G = generators.load(config.generator, run.device)
    run.expect_classes(G.classes)
    if run.ranks.first:
        artifacts.write_json(run.generator_record, G.record)
    if options.loss == "supcon" and not G.classes:
        raise UsageError(f"navigator.loss: supcon needs classes, and generator {config.generator.name} has none")
    T = untrained(G.latent_dim, options, config.seed).to(run.device)
    game = make_game(run, G, T)
    step = make_step(run, game)

    shown_z = draw_latents(config, G, seeds.derive32(config.seed, "grid"), GRID_COLUMNS, run.device)
    shown_labels = draw_labels(G, GRID_COLUMNS, run.device, config.seed, "grid labels")
    keep_every = max(1, options.grid_every // options.batch)

    def data(index: int) -> Batch:
        return draw_batch(config, G, index, run.device, run.ranks)

    def step_and_keep(index: int, batch: Batch) -> StepResult:
        if run.ranks.first and index % keep_every == 0:
            keep(folder, index * options.batch, game, shown_z, shown_labels)
        return step(batch)

    def reached_delta(row: Row) -> bool:
        return options.delta is not None and not options.project and row["displacement_norm"] >= options.delta

    steps = max(1, options.samples // options.batch)
    plan = loop.Plan("navigator", folder, steps, options.batch, config.log_every, config.save_every)
    state = {"T": T, "f": game.f, "adam_T": game.adam_T, "adam_f": game.adam_f, "scaler": game.scaler}
    summary = loop.run(step_and_keep, data, state, plan, reached_delta, run.ranks)
    if run.ranks.first:
        keep(folder, int(summary["samples"]), game, shown_z, shown_labels)
        artifacts.write_json(folder / "summary.json", read_rows(folder / "metrics.jsonl")[-1] | summary)
        artifacts.write_tensors(run.navigator_file, T.state_dict())
    run.ranks.barrier("the navigator's end")


def keep(folder: Path, samples: int, game: Game, z: Tensor, labels: Tensor | None) -> None:
    """Keep T as it is after `samples` latents, and a picture of anchors over positives."""
    artifacts.write_tensors(folder / "kept" / f"{samples:010d}.safetensors", game.T.state_dict())
    with torch.no_grad():
        images = torch.cat([game.G(z, labels), game.G(z + game.T(z), labels)])
    pictures.write_grid(folder / "grids" / f"{samples:010d}.png", images, columns=len(z))
