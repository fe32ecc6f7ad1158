"""The GAN of `copgen_fast.generators.fit.resnet_gan`: discriminator, losses, augmentation and one step of the game.

SNGAN's residual discriminator for 32x32 images and its training (Miyato et al. 2018), with the moving average of
the generator's weights (Yazici et al. 2019), standing statistics (Brock et al. 2019) and DiffAugment's idea (Zhao et
al. 2020) on our own operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from copgen_fast import augmentations
from copgen_fast.errors import UsageError
from copgen_fast.generators.resnet_gan import SIZE, ResnetGAN, glorot
from copgen_fast.ops import AugmentParams, AugmentPolicy, augment
from copgen_fast.runtime import latents, seeds
from copgen_fast.training.loop import StepResult

STANDING = (8, 128)
PADDING = SIZE // 8
_SHIFT = {"crop_scale": ((SIZE / (SIZE + 2 * PADDING)) ** 2,) * 2, "crop_ratio": (1.0, 1.0)}

# DiffAugment's translation (by up to an eighth, over grey) as a fixed crop of the padded image, and its colours. It
# changes brightness by a sum, we by a factor; it cuts out a square, we do not.
POLICIES: dict[str, AugmentPolicy] = {
    "gan": AugmentPolicy(**_SHIFT, flip=0.5, brightness=0.4, contrast=0.5, saturation=1.0, jitter=0.8),
    "gan-digits": AugmentPolicy(**_SHIFT, brightness=0.4, contrast=0.4, jitter=0.8),
    "gan-shift": AugmentPolicy(**_SHIFT),
}


class DownBlock(nn.Module):
    """Residual block with spectral norm: ReLU, conv, ReLU, conv, then 2x2 averages where it is `down`.

    [N, C, H, H] -> [N, W, H / 2, H / 2] or [N, W, H, H]. The first block sees pixels, and has no first ReLU.
    """

    def __init__(self, channels: int, width: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, width, 1) if down or channels != width else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x if self.first else F.relu(x))
        # The shortcut's 1x1 convolution and the averaging commute; this way round it is four times cheaper.
        return self.pool(self.conv2(F.relu(hidden))) + self.shortcut(self.pool(x))


class Discriminator(nn.Module):
    """Images [N, 3, 32, 32] in [-1, 1] to scores [N]; every layer's largest singular value is kept at 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            DownBlock(3, width, down=True, first=True),
            DownBlock(width, width, down=True),
            DownBlock(width, width, down=False),
            DownBlock(width, width, down=False),
        )
        self.linear = nn.Linear(width, 1)
        self.apply(glorot)
        for layer in [*self.modules()]:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                spectral_norm(layer)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.relu(self.blocks(images)).sum((2, 3)))[:, 0]


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))), from scores [N] each."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(G(z)), from scores [N]."""
    return -fake.mean()


def augmentation(name: str) -> Callable[[Tensor, torch.Generator], Tensor]:
    """t(images, generator): images [N, 3, 32, 32] in [-1, 1] to others of that form, differentiably.

    Raises:
        UsageError: no such policy; the message lists those there are.
    """
    if name not in POLICIES and name not in augmentations.POLICIES:
        known = ", ".join([*POLICIES, *augmentations.POLICIES])
        raise UsageError(f"--augmentation: unknown policy {name!r}: choose from {known}")
    padding = PADDING if name in POLICIES else 0
    policy = POLICIES[name] if name in POLICIES else augmentations.get(name)
    policy = replace(policy, mean=(0.5,) * 3, std=(0.5,) * 3)

    def t(images: Tensor, generator: torch.Generator) -> Tensor:
        levels = F.pad((images + 1) / 2, (padding,) * 4, value=0.5)
        params = AugmentParams.sample(len(levels), (levels.shape[2],) * 2, policy, out_size=SIZE, generator=generator)
        return augment(
            levels,
            params.to(levels.device),
            SIZE,
            mean=policy.mean,
            std=policy.std,
            memory_format=torch.channels_last,
        )

    return t


@dataclass(frozen=True)
class Game:
    """The players, in the usual symbols, and what they play with."""

    G: ResnetGAN
    D: Discriminator
    average: ResnetGAN
    """Moving average of G's weights. Its batch statistics are nobody's: `settled` makes them."""
    adam_G: torch.optim.Adam
    adam_D: torch.optim.Adam
    t: Callable[[Tensor, int, int], Tensor]
    """Augments images for discriminator step k of step i, a draw of its own for every image."""
    decay: float


def step(game: Game, index: int, batch: tuple[Tensor, Tensor]) -> StepResult:
    """K discriminator steps, one of the generator, one of the average.

    Args:
        batch: real images [K, N, 3, 32, 32] in [-1, 1], and latents [K + 1, N, L].
    """
    reals, z = batch
    for k, x in enumerate(reals):
        with torch.no_grad():
            fake = game.G(z[k])
        scores = game.D(game.t(torch.cat([x, fake]), index, k))
        real_scores, fake_scores = scores.chunk(2)
        loss_D = hinge_discriminator(real_scores, fake_scores)
        descend(loss_D, game.D, game.adam_D)
    images = game.G(z[-1])
    loss_G = hinge_generator(game.D(game.t(images, index, len(reals))))
    descend(loss_G, game.G, game.adam_G)
    follow(game.average, game.G, min(game.decay, (1 + index) / (10 + index)))
    metrics = {
        "loss_discriminator": loss_D,
        "loss_generator": loss_G,
        "score_real": real_scores.mean(),
        "score_fake": fake_scores.mean(),
    }
    return StepResult(metrics, {"generated images": images, "scores": scores})


def descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Adam) -> None:
    """One step of `module` alone: no gradient is computed for the other player's weights."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=list(module.parameters()))
    optimizer.step()


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay x average + (1 - decay) x module, weights only."""
    for mean, value in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


@torch.no_grad()
def settled(average: ResnetGAN, prior: latents.Prior, seed: int) -> ResnetGAN:
    """A copy of the average in eval mode, whose batch norms hold the statistics of its own images.

    The training generator's would not fit it: its weights are others. They are the mean over 8 batches of 128.
    """
    model = copy.deepcopy(average).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
    batches, size = STANDING
    for k in range(batches):
        z = latents.sample(prior, seeds.derive32(seed, "gan standing", k), (size, model.latent_dim))
        model(z.to(model.linear.weight.device))
    return model.eval()
