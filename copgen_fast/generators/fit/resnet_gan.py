"""Train a small GAN at 32 px: python -m copgen_fast.generators.fit.resnet_gan --out DIR [--data.root FILE].

The result is the moving average of the generator's weights; use it by `--generator.name resnet-gan
--generator.weights DIR/generator.safetensors`. The training step is in gan_training.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import save
from torch import Tensor

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError, command
from copgen_fast.evals import _frechet
from copgen_fast.files import sha256
from copgen_fast.generators.fit import gan_training
from copgen_fast.generators.resnet_gan import LATENT_DIM, SIZE, ResnetGAN
from copgen_fast.images import pictures, sets
from copgen_fast.options import Count, LearningRate, Range, Seed, expect_ranges, parse
from copgen_fast.record import differences
from copgen_fast.runtime import artifacts, devices, latents, seeds
from copgen_fast.runtime.interrupts import handle_signals
from copgen_fast.training import loop
from copgen_fast.training.loop import StepResult
from copgen_fast.training.metrics import last_row

BETAS = (0.0, 0.9)
GRID = (8, 16)


@dataclass(frozen=True)
class GanConfig:
    """Train a generator of 32 px images; the same command again goes on where it was stopped."""

    out: Path
    """Folder for generator.safetensors, grids/, summary.json, log and checkpoint."""
    data: DataConfig = field(default_factory=DataConfig)
    steps: Count = 20_000
    """Generator steps."""
    batch: Annotated[int, Range(2)] = 64
    """Real images, and as many generated ones, a step."""
    discriminator_steps: Count = 2
    """Discriminator steps a generator step (SNGAN: 5)."""
    width: Annotated[int, Range(1, 4096)] = 64
    """Channels of both networks (SNGAN: 256 and 128)."""
    latent_dim: Count = LATENT_DIM
    prior: latents.Prior = "normal"
    """Latent prior: N(0, I), or truncated to [-2, 2]."""
    lr: LearningRate = 2e-4
    """Adam learning rate of both."""
    average: Annotated[float, Range(0, 0.99999)] = 0.999
    """Decay of the moving average of the generator's weights; lower at the start, (1 + i) / (10 + i) at step i."""
    augmentation: str | None = None
    """`gan`, `gan-digits`, `gan-shift` or a policy of copgen_fast.augmentations (`none`: none); the default is
    `gan-digits` for digits (a mirrored digit is another sign) and `gan` for all else."""
    seed: Seed = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    log_every: Count = 10
    save_every: Count = 200
    """Steps between checkpoints."""
    grid_every: Count = 500
    """Steps between pictures of samples."""


def make_players(config: GanConfig, device: torch.device) -> gan_training.Players:
    with seeds.seeded(config.seed, "gan"):
        G, D = ResnetGAN(config.latent_dim, config.width), gan_training.Discriminator(config.width)
    G, D = (player.to(device, memory_format=torch.channels_last) for player in (G, D))
    draw = gan_training.augmentation(augmentation_name(config))

    def t(images: Tensor, index: int, k: int) -> Tensor:
        return draw(images, seeds.generator(config.seed, "gan views", index, k))

    adam_G, adam_D = (torch.optim.Adam(player.parameters(), config.lr, BETAS) for player in (G, D))
    return gan_training.Players(G, D, copy.deepcopy(G).requires_grad_(False), adam_G, adam_D, t, config.average)


def augmentation_name(config: GanConfig) -> str:
    if config.augmentation is not None:
        return config.augmentation
    return "gan-digits" if config.data.name == "digits" else "gan"


def fit(config: GanConfig) -> dict[str, float]:
    """Train, and write generator.safetensors, grids/, summary.json and the log to the folder `config.out`.

    Returns:
        What summary.json holds: speed, last losses, and distances from held-out images (see `evals._frechet`).

    Raises:
        UsageError: a setting out of range, unusable data, or a folder that holds another run.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    validate(config)
    device = devices.resolve(config.device, "fp32")
    devices.make_current(device)
    real = sets.load(config.data, labelled=False)
    if min(len(real.train_images), len(real.test_images)) < 2:
        raise UsageError(f"{config.data.root}: expected two training and two test images or more")
    open_folder(config)
    players = make_players(config, device)
    shown_z = draw_latents(config, GRID[0] * GRID[1], "grid").to(device)

    def batch(index: int) -> tuple[Tensor, Tensor]:
        shape = (config.discriminator_steps, config.batch)
        rows = torch.randint(len(real.train_images), shape, generator=seeds.generator(config.seed, "gan real", index))
        z = draw_latents(config, (shape[0] + 1) * shape[1], "latents", index).unflatten(0, (-1, config.batch))
        return as_floats(real.train_images[rows.flatten()]).to(device).unflatten(0, shape), z.to(device)

    def picture(index: int) -> ResnetGAN:
        generator = gan_training.with_statistics(players.average, config.prior, config.seed)
        with torch.no_grad():
            pictures.write_grid(config.out / "grids" / f"{index:07d}.png", generator(shown_z), columns=GRID[1])
        return generator

    def step_and_show(index: int, drawn: tuple[Tensor, Tensor]) -> StepResult:
        if index % config.grid_every == 0:
            picture(index)
        return gan_training.step(players, index, drawn)

    plan = loop.Plan("gan", config.out, config.steps, config.batch, config.log_every, config.save_every)
    state = {name: getattr(players, name) for name in ("G", "D", "average", "adam_G", "adam_D")}
    summary = loop.run(step_and_show, batch, state, plan)
    generator = picture(config.steps)
    write_generator(config.out / "generator.safetensors", generator, config)
    summary = last_row(config.out / "metrics.jsonl") | summary | evaluate(generator, real, config)
    artifacts.write_json(config.out / "summary.json", summary)
    return summary


def draw_latents(config: GanConfig, count: int, *purpose: seeds.Key) -> Tensor:
    return latents.sample(config.prior, seeds.derive32(config.seed, "gan", *purpose), (count, config.latent_dim))


def as_floats(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def evaluate(generator: ResnetGAN, real: sets.LabelledImages, config: GanConfig) -> dict[str, float]:
    """Distances of samples from the held-out images, and of as many training images from them (`real_...`).

    The latter is the least that a generator can be expected to reach. At most 2000 images a set.
    """
    device = generator.linear.weight.device
    count = min(2000, len(real.train_images), len(real.test_images))
    order = torch.randperm(len(real.train_images), generator=seeds.generator(config.seed, "gan judge"))[:count]
    held_out, training = as_floats(real.test_images[:count]), as_floats(real.train_images[order])
    z = draw_latents(config, count, "judge").to(device)
    samples = torch.cat([generator(part).cpu() for part in z.split(256)])
    floor = {f"real_{name}": value for name, value in _frechet.distances(training, held_out).items()}
    return {"evaluated_images": count} | _frechet.distances(samples, held_out) | floor


def write_generator(path: Path, generator: ResnetGAN, config: GanConfig) -> None:
    """The state dict as safetensors, and how it was made in its metadata under `copgen_fast`, as JSON.

    One entry: safetensors writes several in an order that changes from run to run, and so would the bytes.
    """
    made = {
        "architecture": "resnet-gan",
        "width": config.width,
        "latent_dim": config.latent_dim,
        "prior": config.prior,
        "data": config.data.name,
        "steps": config.steps,
        "seed": config.seed,
    }
    tensors = {name: value.cpu().contiguous() for name, value in generator.state_dict().items()}
    artifacts.write_bytes(path, save(tensors, metadata={"copgen_fast": json.dumps(made)}))


def validate(config: GanConfig) -> None:
    """Raises UsageError: a number out of range or an unknown policy; nothing was written."""
    expect_ranges(config)
    if config.data.image_size != SIZE:
        raise UsageError(f"--data.image-size: the generator draws {SIZE} px, got {config.data.image_size}")
    gan_training.augmentation(augmentation_name(config))


def open_folder(config: GanConfig) -> None:
    """Record the configuration in DIR/config.json.

    Raises:
        UsageError: the folder holds something else, or a run of another configuration.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    values |= {f"data.{name}": value for name, value in values.pop("data").items()}
    wanted = {name: value for name, value in values.items() if name not in ("out", "device", "data.root")}
    if config.data.root is not None and Path(config.data.root).is_file():  # the same wherever it lies
        wanted["data.sha256"] = sha256(config.data.root)
    record = config.out / "config.json"
    if record.exists():
        if changed := differences(artifacts.read_record(record), wanted):
            raise UsageError(f"--out {config.out} holds another run: {'; '.join(changed[:3])}: choose another --out")
    elif config.out.is_file() or (config.out.is_dir() and any(config.out.iterdir())):
        raise UsageError(f"--out {config.out} is not empty and holds no run: choose another --out")
    artifacts.write_json(record, wanted)


@command
def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code: 0, 2 for a fault of usage, 130 when stopped, else 1."""
    config = parse(GanConfig, arguments, "python -m copgen_fast.generators.fit.resnet_gan")
    with handle_signals():
        summary = fit(config)
    print(f"wrote {config.out / 'generator.safetensors'}")
    for name in ("frechet_pixels", "frechet_random"):
        print(f"{name}: {summary[name]:.3g}; real training images: {summary[f'real_{name}']:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
