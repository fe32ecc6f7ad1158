"""Navigator training in the reference implementation's form, by its description (reference facts, 1.2 to 1.5).

Float32, NCHW, step by step: the generator in evaluation mode with every parameter asking for a gradient that nobody
uses, its weights divided by their spectral norms at every forward; each image augmented for itself and written into a
batch by assignment, which makes backward copy the whole batch once an image; two forwards of the estimator; the loss
over a 2N x 2N matrix. Different from it: one device and no DataParallel, ReLUs that don't overwrite their input, and
latents given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from bench.baselines.augment import compose
from bench.baselines.info_nce import published
from copgen_fast.ops import AugmentPolicy

BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class ReferenceGame:
    """The players, and what they play on. `slices`: write views into a batch as there; else stack them."""

    G: nn.Module
    T: nn.Module
    f: nn.Module
    augment: Callable[[Tensor], Tensor]
    temperature: float
    base_temperature: float
    adam_f: torch.optim.Adam
    adam_T: torch.optim.Adam
    slices: bool = True

    def nce(self, views: Tensor) -> Tensor:
        """The loss of views [2N, 3, H, W] in the order anchor, positive, anchor, ..."""
        anchors, positives = F.normalize(self.f(views), dim=1).unflatten(0, (-1, 2)).unbind(1)
        return self.temperature / self.base_temperature * published(self.temperature)(anchors, positives)


def reference_game(
    G: nn.Module,
    T: nn.Module,
    f: nn.Module,
    policy: AugmentPolicy,
    *,
    lr: float,
    estimator_lr: float,
    temperature: float,
    base_temperature: float,
    slices: bool = True,
) -> ReferenceGame:
    """Copies of the published generator, the navigator and the estimator, as they train there."""
    G, T, f = (copy.deepcopy(module).to(memory_format=torch.contiguous_format) for module in (G, T, f))
    return ReferenceGame(
        G=G.eval().requires_grad_(True),
        T=T,
        f=f.train(),
        augment=compose(transforms, policy, G.image_shape[1]),
        temperature=temperature,
        base_temperature=base_temperature,
        adam_f=torch.optim.Adam(f.parameters(), estimator_lr, BETAS, foreach=False),
        adam_T=torch.optim.Adam(T.parameters(), lr, BETAS, foreach=False),
        slices=slices,
    )


def reference_step(game: ReferenceGame, z: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration on latents [N, L]; the estimator's loss and the navigator's."""
    with torch.no_grad():
        x = game.G(z)
    x_pos = game.G(z + game.T(z))
    views = augmented(game, x, x_pos)
    game.adam_f.zero_grad()
    loss_f = game.nce(views.detach())
    loss_f.backward()
    game.adam_f.step()
    game.adam_T.zero_grad()
    loss_T = -game.nce(views)
    loss_T.backward()
    game.adam_T.step()
    return loss_f.detach(), loss_T.detach()


def augmented(game: ReferenceGame, x: Tensor, x_pos: Tensor) -> Tensor:
    """Views [2N, 3, H, W] on the images' device, one of each image, by a loop over images."""
    if not game.slices:
        views = [game.augment((image + 1) / 2) for pair in zip(x, x_pos, strict=True) for image in pair]
        return torch.stack(views)
    batch = torch.empty(len(x), 2, *x.shape[1:])  # on the CPU, whatever the images' device, as there
    for i in range(len(x)):
        batch[i, 0] = game.augment((x[i] + 1) / 2)
        batch[i, 1] = game.augment((x_pos[i] + 1) / 2)
    return batch.flatten(0, 1).to(x.device)
