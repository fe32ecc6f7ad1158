"""Navigator training in the form of the reference code.

Float32, NCHW, step by step: the generator in evaluation mode, with unused gradients of all its parameters and weights
divided by their spectral norms at every forward; each image augmented separately and assigned into a batch, which makes
backward copy the whole batch once an image; two forwards of the estimator; the loss over a 2N x 2N matrix. Unlike
there, one device without DataParallel, ReLUs that don't overwrite their input, and latents given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import transforms

from bench.baselines.augment import compose
from bench.baselines.conv3x3 import by_pytorch
from bench.baselines.info_nce import published
from copgen_fast import augmentations
from copgen_fast.config import NavigatorConfig


class ReferenceNavigator:
    """Training of copies of the navigator T_z and the estimator f through a copy of the published generator G.

    Args:
        stacked: stack the views, where the reference code assigns them into a batch.
    """

    def __init__(
        self, G: nn.Module, T_z: nn.Module, f: nn.Module, options: NavigatorConfig, stacked: bool = False
    ) -> None:
        G, T_z, f = (by_pytorch(module).to(memory_format=torch.contiguous_format) for module in (G, T_z, f))
        self.G, self.T_z, self.f, self.stacked = G.eval().requires_grad_(True), T_z, f.train(), stacked
        self.t_x = compose(transforms, augmentations.get(options.augmentation), G.image_shape[1])
        self.loss = published(options.temperature, options.base_temperature)
        adam = {"betas": (0.5, 0.999), "foreach": False}
        self.adam_f = torch.optim.Adam(self.f.parameters(), options.estimator_lr, **adam)
        self.adam_T = torch.optim.Adam(self.T_z.parameters(), options.lr, **adam)

    def step(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration on latents [N, L]; the estimator's loss and the navigator's."""
        with torch.no_grad():
            x = self.G(z)
        views = self.views(x, self.G(z + self.T_z(z)))
        self.adam_f.zero_grad()
        loss_f = self.nce(views.detach())
        loss_f.backward()
        self.adam_f.step()
        self.adam_T.zero_grad()
        loss_T = -self.nce(views)
        loss_T.backward()
        self.adam_T.step()
        return loss_f.detach(), loss_T.detach()

    def nce(self, views: Tensor) -> Tensor:
        """The loss of views [2N, 3, H, W] in the order anchor, positive, anchor, ..."""
        return self.loss(*self.f(views).unflatten(0, (-1, 2)).unbind(1))

    def views(self, x: Tensor, x_prime: Tensor) -> Tensor:
        """Views [2N, 3, H, W] of anchors and positives [N, 3, H, W], one of each, by a loop over images."""
        if self.stacked:
            views = [self.t_x((image + 1) / 2) for pair in zip(x, x_prime, strict=True) for image in pair]
            return torch.stack(views)
        # On the CPU, whatever the images' device, as in the reference code.
        batch = torch.empty(len(x), 2, *x.shape[1:], dtype=x.dtype)
        for i in range(len(x)):
            batch[i, 0] = self.t_x((x[i] + 1) / 2)
            batch[i, 1] = self.t_x((x_prime[i] + 1) / 2)
        return batch.flatten(0, 1).to(x.device)
