"""SimCLR pretraining in the form of the reference code.

Each image, a PIL picture in memory, is augmented separately on the CPU; float32, NCHW; the loss over a 2N x 2N matrix;
SGD. Unlike there, one device, pictures that are decoded already (the area loader measures files), and worker processes
that share one batch, so that they don't run ahead while something else is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.baselines.augment import compose
from bench.baselines.conv3x3 import by_pytorch
from bench.baselines.info_nce import published
from copgen_fast.config import PretrainConfig
from copgen_fast.methods.simclr import Config
from copgen_fast.ops import AugmentPolicy


class Pictures(Dataset):
    """A view of each of uint8 images [N, 3, H, W], drawn at each access; float32 [3, H, W]."""

    def __init__(self, images: Tensor, policy: AugmentPolicy) -> None:
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.augment = compose(transforms, policy, images.shape[3], pictures=True)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.augment(self.pictures[index])


def pictures_loader(images: Tensor, policy: AugmentPolicy, workers: int) -> Callable[[], Tensor]:
    """A call makes a view of each of uint8 images [N, 3, H, W] in `workers` processes; float32, on the CPU."""
    part = -(-len(images) // max(1, workers))
    loader = DataLoader(Pictures(images, policy), part, num_workers=workers, persistent_workers=workers > 0)
    return lambda: torch.cat(list(loader))


class ReferencePretraining:
    """Training of a copy of the model, an encoder with its head, on views [2N, 3, H, W], anchors first."""

    def __init__(self, model: nn.Module, views: Callable[[], Tensor], options: PretrainConfig, simclr: Config) -> None:
        self.model = by_pytorch(model).to(memory_format=torch.contiguous_format).train()
        self.views, self.loss = views, published(simclr.temperature, simclr.base_temperature)
        self.sgd = torch.optim.SGD(
            self.model.parameters(),
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            foreach=False,
        )

    def step(self) -> Tensor:
        """One iteration on a batch of views; its loss."""
        device = next(self.model.parameters()).device
        loss = self.loss(*self.model(self.views().to(device)).chunk(2))
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.detach()
