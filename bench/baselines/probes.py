"""The linear evaluation in the form of the reference code: PIL pictures of an ImageFolder, float32, everything eager.

Every epoch ends with a pass over the test images. Unlike there, worker processes persist from epoch to epoch, in the
peer's favour, as epochs are short here.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bench.baselines.conv3x3 import by_pytorch

_NORMALISE = (transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class ReferenceProbe:
    """Epochs of a linear classifier on a frozen encoder.

    Args:
        folder: holds train/CLASS/* and test/CLASS/*.
        encoder: in eval mode, not changed; images [N, 3, side, side] -> features [N, dim].
        workers: processes of each loader.
    """

    def __init__(
        self, folder: Path, encoder: nn.Module, dim: int, side: int, batch: int, workers: int, device: torch.device
    ) -> None:
        crop = [transforms.RandomResizedCrop(side, scale=(0.2, 1.0)), transforms.RandomHorizontalFlip(), *_NORMALISE]
        centre = [transforms.Resize(int(side / 0.875)), transforms.CenterCrop(side), *_NORMALISE]
        options = {"batch_size": batch, "num_workers": workers, "persistent_workers": workers > 0}
        options["pin_memory"] = device.type == "cuda"
        train = ImageFolder(str(folder / "train"), transforms.Compose(crop))
        test = ImageFolder(str(folder / "test"), transforms.Compose(centre))
        self.train, self.test = DataLoader(train, shuffle=True, **options), DataLoader(test, **options)
        self.encoder, self.device = by_pytorch(encoder).to(device), device
        self.classifier = nn.Linear(dim, len(train.classes)).to(device)
        self.sgd = torch.optim.SGD(self.classifier.parameters(), lr=1.75, momentum=0.9)

    def epoch(self) -> None:
        """Train on every training image once, then count the hits among the test images."""
        for images, labels in self.train:
            loss = F.cross_entropy(self.classifier(self._features(images)), labels.to(self.device))
            self.sgd.zero_grad()
            loss.backward()
            self.sgd.step()
            loss.item()
        hits = 0
        for images, labels in self.test:
            with torch.no_grad():
                found = self.classifier(self._features(images)).argmax(1)
            hits += (found == labels.to(self.device)).sum().item()

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encoder(images.to(self.device))
