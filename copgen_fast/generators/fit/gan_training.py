"""The GAN of `copgen_fast.generators.fit.resnet_gan`: discriminator, losses, augmentation and training step.

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
from copgen_fast.generators.fit.fitting import update_average
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
    """t(images, generator), a differentiable augmentation of images [N, 3, 32, 32] in [-1, 1].

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
class Players:
    """Generator and discriminator with their optimisers, and the augmentation before the discriminator."""

    G: ResnetGAN
    D: Discriminator
    average: ResnetGAN
    """Moving average of G's weights, without batch statistics: `with_statistics` computes them."""
    adam_G: torch.optim.Adam
    adam_D: torch.optim.Adam
    t: Callable[[Tensor, int, int], Tensor]
    """t(images, i, k) augments images for discriminator step k of step i, by one draw an image."""
    decay: float
    """Of the moving average."""


def step(players: Players, index: int, batch: tuple[Tensor, Tensor]) -> StepResult:
    """K steps of the discriminator, one of the generator, one of the moving average.

    Args:
        batch: real images [K, N, 3, 32, 32] in [-1, 1], and latents [K + 1, N, L].
    """
    reals, z = batch
    for k, x in enumerate(reals):
        with torch.no_grad():
            fake = players.G(z[k])
        scores = players.D(players.t(torch.cat([x, fake]), index, k))
        real_scores, fake_scores = scores.chunk(2)
        loss_D = hinge_discriminator(real_scores, fake_scores)
        descend(loss_D, players.D, players.adam_D)
    images = players.G(z[-1])
    loss_G = hinge_generator(players.D(players.t(images, index, len(reals))))
    descend(loss_G, players.G, players.adam_G)
    update_average(players.average, players.G, players.decay, index)
    metrics = {
        "loss_discriminator": loss_D,
        "loss_generator": loss_G,
        "score_real": real_scores.mean(),
        "score_fake": fake_scores.mean(),
    }
    return StepResult(metrics, {"generated images": images, "scores": scores})


def descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Adam) -> None:
    """One optimiser step of `module` alone: no gradient is computed for the other network's weights."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=list(module.parameters()))
    optimizer.step()


@torch.no_grad()
def with_statistics(average: ResnetGAN, prior: latents.Prior, seed: int) -> ResnetGAN:
    """A copy of the average in eval mode with standing statistics in its batch norms: means over 8 batches of 128.

    Those of the training generator would not fit, as its weights are others.
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
