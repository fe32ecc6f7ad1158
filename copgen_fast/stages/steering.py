"""Learn linear walks in z that transform images: min over w of ||m (G(z + sum_s alpha_s w_s) - t_alpha(G(z)))||^2.

Walks w_s of all transformations s at once, each with one step size alpha_s per sample; t_alpha applies
all transformations to the image, m masks what comes from outside it. Jahanian et al. 2020 ("On the steerability of
generative adversarial networks"), composed as GenRep (Jahanian et al. 2022) does for positives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from copgen_fast import generators, positives
from copgen_fast.config import RunConfig
from copgen_fast.positives import _groups, _warps
from copgen_fast.positives._distance import DRAWS
from copgen_fast.positives._warps import Limits
from copgen_fast.positives.steering import Walks, draw_steps, unlearned
from copgen_fast.runtime import artifacts, devices, seeds
from copgen_fast.runtime.distributed import ALONE, Ranks
from copgen_fast.stages._draws import draw_labels, draw_latents
from copgen_fast.stages.run import Run
from copgen_fast.training import loop, optimizers
from copgen_fast.training.grad_sync import data_parallel
from copgen_fast.training.loop import StepResult
from copgen_fast.training.metrics import last_row

MEASURED = 256
"""Latents on which each walk is measured in the end."""


@dataclass(frozen=True)
class Learner:
    """The walks w, the frozen generator G, and what trains the walks. Each rank has its rows of a batch."""

    G: nn.Module
    walks: Walks
    adam: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranks: Ranks


@dataclass(frozen=True)
class Batch:
    """Inputs of one step, on the device.

    Attributes:
        z: latents [N, L].
        steps: step sizes alpha [N, S].
        inverse, colour: the same transformations of images, `_warps.homographies` and `_warps.colours`.
        labels: classes [N] of a conditional generator's images.
    """

    z: Tensor
    steps: Tensor
    inverse: Tensor
    colour: Tensor
    labels: Tensor | None = None


def steering_step(learner: Learner, batch: Batch) -> StepResult:
    """One step of Adam on all walks. The target gets no gradient."""
    with torch.no_grad(), record_function("target"):
        x = learner.G(batch.z, batch.labels).to(batch.z.dtype)
        target, mask = _warps.transform(x, batch.inverse, batch.colour)
    dz = learner.walks(batch.steps)
    with record_function("generator"):
        x_prime = learner.G(batch.z + dz, batch.labels).to(batch.z.dtype)
    loss = masked_l2(x_prime, target, mask, learner.ranks)
    optimizers.descend(loss, learner.scaler, learner.adam)

    watched = {"latents": batch.z, "images": x, "displacement": dz, "steered images": x_prime}
    with torch.no_grad():
        without = masked_l2(x, target, mask, learner.ranks)
        norms = positives.norms(learner.ranks.gathered(dz), learner.G.latent_groups)
    return StepResult({"loss": loss, "loss_without_walks": without, **norms}, watched)


def masked_l2(x: Tensor, target: Tensor, mask: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean squared difference over the pixels and channels of the whole batch that the mask [N, 1, H, W] leaves.

    The mean over ranks of what each of them returns is the whole batch's.
    """
    count = mask.sum() * x.shape[1]
    if not ranks.alone:
        dist.all_reduce(count, group=ranks.group)
        count = count / ranks.world
    return ((x - target) * mask).square().sum() / count.clamp_min(1)


def draw_batch(
    config: RunConfig, G: nn.Module, limits: Limits, index: int, device: torch.device, ranks: Ranks = ALONE
) -> Batch:
    """The batch of step `index`, this rank's rows of it: the same whatever the device and the number of ranks."""
    count = config.steering.batch
    z = draw_latents(G, seeds.derive32(config.seed, "steering latents", index), count, device)
    labels = draw_labels(G, count, device, config.seed, "steering labels", index)
    random = seeds.generator(config.seed, "steering amounts", index)
    uniform = torch.rand(count, len(_warps.NAMES), generator=random, dtype=torch.float64)
    rows = ranks.rows(count)
    return make_batch(z[rows], None if labels is None else labels[rows], uniform[rows], limits, G.image_shape[1:])


def make_batch(z: Tensor, labels: Tensor | None, uniform: Tensor, limits: Limits, size: tuple[int, int]) -> Batch:
    """Step sizes of walks and the transformations of images that they stand for, from `uniform` (see `amounts`)."""
    amount = _warps.amounts(uniform, limits)
    derived = _warps.steps(amount, limits), _warps.homographies(amount, limits, size), _warps.colours(amount, limits)
    return Batch(z, *(devices.send(tensor.to(z.dtype), z.device) for tensor in derived), labels)


def make_learner(run: Run, G: nn.Module, walks: Walks) -> Learner:
    """The walks with their optimiser."""
    config = run.config
    walks = data_parallel(walks, run.ranks)
    betas, impl = (0.9, 0.999), config.optimizer.impl
    adam = optimizers.adam(walks.parameters(), config.steering.lr, betas, impl, run.device)
    scaler = devices.grad_scaler(run.device, "fp32", getattr(G, "half_dtype", torch.float32))
    return Learner(G, walks, adam, scaler, run.ranks)


def run(run: Run) -> None:
    """Learn the walks; leaves steering.safetensors and the log in RUN/steering."""
    if run.steering_file.exists():
        return
    config, options, folder = run.config, run.config.steering, run.folder / "steering"
    limits = _warps.limits_of(options)
    G = generators.load(config.generator, run.device)
    generators.expect_differentiable(G, config.generator, "steering")
    run.expect_classes(G.classes)
    if run.ranks.first:
        artifacts.write_record(run.generator_record, G.record)
    walks = unlearned(G.latent_dim, G.latent_groups, options, config.seed).to(run.device)
    learner = make_learner(run, G, walks)

    def data(index: int) -> Batch:
        return draw_batch(config, G, limits, index, run.device, run.ranks)

    def step(index: int, batch: Batch) -> StepResult:
        return steering_step(learner, batch)

    steps = max(1, options.samples // options.batch)
    plan = loop.Plan("steering", folder, steps, options.batch, config.log_every, config.save_every)
    state = {"walks": learner.walks, "adam": learner.adam, "scaler": learner.scaler}
    summary = loop.run(step, data, state, plan, ranks=run.ranks)
    if run.ranks.first:
        last = last_row(folder / "metrics.jsonl")
        found = measure(run, G, walks, limits)
        artifacts.write_record(folder / "summary.json", last | summary | found)
        learned = {"generator_digest": G.record["digest"], "limits": _warps.words(limits)}
        artifacts.write_tensors(run.steering_file, walks.state_dict(), **learned)
    run.ranks.barrier("the end of the steering")


@torch.no_grad()
def measure(run: Run, G: nn.Module, walks: Walks, limits: Limits) -> dict:
    """How much of each transformation its walk does by itself, and all of them of all at once; prints it.

    Returns:
        E||dz|| of all walks at once, and `transformations`: by name (`all` for all), the loss with the walk and
        without (z' = z), their ratio and E||dz||; of each walk also its norm and the groups' shares of its energy.
    """
    table = {}
    for name in (*limits, "all"):
        some = limits if name == "all" else {name: limits[name]}
        with_walk, without = masked_errors(run, G, walks, some)
        dz = walks(draw_steps(some, [(0, 3)], DRAWS).to(run.device), tuple(some))
        norms = {key: value.item() for key, value in positives.norms(dz, G.latent_groups).items()}
        table[name] = {"loss": with_walk, "loss_without": without, "ratio": with_walk / max(without, 1e-30), **norms}
        if name != "all":
            w = walks.walk[name]
            table[name] |= {"norm": w.norm().item(), "energy": _groups.energy(w, G.latent_groups)}
        print(
            f"steering {name}: loss {with_walk:.4g}, without the walk {without:.4g}, "
            f"ratio {table[name]['ratio']:.2f}; E||dz|| {norms['displacement_norm']:.3g}",
            flush=True,
        )
    norms = {key: value for key, value in table["all"].items() if key.startswith("displacement_norm")}
    return norms | {"transformations": table}


def masked_errors(run: Run, G: nn.Module, walks: Walks, limits: Limits) -> tuple[float, float]:
    """The masked L2 over seeded latents and amounts of the transformations in `limits`, with and without the walks."""
    config, sums, count = run.config, torch.zeros(2, dtype=torch.float64, device=run.device), 0.0
    random = seeds.generator(config.seed, "steering measure")
    uniform = torch.rand(MEASURED, len(_warps.NAMES), generator=random, dtype=torch.float64)
    z = draw_latents(G, seeds.derive32(config.seed, "steering measure"), MEASURED, run.device)
    labels = draw_labels(G, MEASURED, run.device, config.seed, "steering measure")
    for start in range(0, MEASURED, config.steering.batch):
        rows = slice(start, start + config.steering.batch)
        own = None if labels is None else labels[rows]
        batch = make_batch(z[rows], own, uniform[rows], limits, G.image_shape[1:])
        x = G(batch.z, own).to(z.dtype)
        target, mask = _warps.transform(x, batch.inverse, batch.colour)
        x_prime = G(batch.z + walks(batch.steps, tuple(limits)), own).to(z.dtype)
        pixels = mask.double().sum() * x.shape[1]
        sums += torch.stack([masked_l2(x_prime, target, mask), masked_l2(x, target, mask)]).double() * pixels
        count += pixels.item()
        run.ranks.mark("the measure of walks")
    with_walk, without = (sums / count).tolist()
    return with_walk, without
