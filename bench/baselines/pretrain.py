"""Contrastive pretraining in the reference implementation's form, by its description (reference facts, 3.2 to 3.5).

Each image, a PIL picture in memory, is augmented for itself on the CPU; float32, NCHW; the loss over a 2N x 2N matrix;
SGD. Different from it: one device, pictures that are decoded already (the area loader measures files), and worker
processes that make parts of one batch, so that they don't run ahead while something else is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.baselines.augment import compose
from bench.baselines.info_nce import published
from copgen_fast.ops import AugmentPolicy


class Pictures(Dataset):
    """A view of each of uint8 images [N, 3, H, W], drawn anew at each access; float32 [3, H, W]."""

    def __init__(self, images: Tensor, policy: AugmentPolicy) -> None:
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.augment = compose(transforms, policy, images.shape[3], pictures=True)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.augment(self.pictures[index])


@dataclass(frozen=True)
class ReferenceTraining:
    """An encoder, its optimiser and where its views come from."""

    model: nn.Module
    optimizer: torch.optim.SGD
    views: Callable[[], Tensor]
    """Views [2N, 3, H, W] of a batch on the CPU, anchors first."""
    temperature: float
    base_temperature: float


def pictures_loader(anchors: Tensor, positives: Tensor, policy: AugmentPolicy, workers: int) -> Callable[[], Tensor]:
    """Makes views of the same pairs, uint8 [N, 3, H, W] each, at every call, in that many processes."""
    images = torch.cat([anchors, positives]).cpu()
    part = -(-len(images) // max(1, workers))
    loader = DataLoader(Pictures(images, policy), part, num_workers=workers, persistent_workers=workers > 0)
    return lambda: torch.cat(list(loader))


def reference_training(
    model: nn.Module,
    views: Callable[[], Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    temperature: float,
    base_temperature: float,
) -> ReferenceTraining:
    """A copy of the model, as it trains there."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format).train()
    options = {"momentum": momentum, "weight_decay": weight_decay, "foreach": False}
    return ReferenceTraining(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr, **options),
        views=views,
        temperature=temperature,
        base_temperature=base_temperature,
    )


def reference_step(training: ReferenceTraining) -> Tensor:
    """One iteration on a batch of views; its loss."""
    device = next(training.model.parameters()).device
    views = training.views().to(device)
    anchors, positives = F.normalize(training.model(views), dim=1).chunk(2)
    loss = training.temperature / training.base_temperature * published(training.temperature)(anchors, positives)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    return loss.detach()
