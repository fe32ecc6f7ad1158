"""Encoders: torchvision ResNets with a choice of stem and width, and the contrastive projection head."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from copgen_fast.checks import expect_tensor
from copgen_fast.config import EncoderConfig

_DEPTHS = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}


class Encoder(ResNet):
    """A torchvision ResNet without its classifier: images [N, 3, H, W] -> features [N, feature_dim].

    Parameter names are torchvision's, so its state dict loads into torchvision's model (less `fc`).
    """

    def __init__(self, config: EncoderConfig) -> None:
        block, layers = _DEPTHS[config.name]
        self._width = config.width
        super().__init__(block, layers)
        self.conv1 = _stem(config)
        self.bn1 = nn.BatchNorm2d(config.width)
        if config.stem != "imagenet":
            self.maxpool = nn.Identity()
        self.fc = nn.Identity()
        self.feature_dim = 8 * config.width * block.expansion

    def _make_layer(self, block: type, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Module:
        if planes == 64:  # the first stage: torchvision fixes its input at 64 channels
            self.inplanes = self._width
        return super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate)


def _stem(config: EncoderConfig) -> nn.Conv2d:
    kernel, stride = {"imagenet": (7, 2), "cifar": (3, 1), "half": (3, 2)}[config.stem]
    conv = nn.Conv2d(3, config.width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    return conv


class ContrastiveModel(nn.Module):
    """Encoder f and projection head D-D-128 (reference): views [N, 3, H, W] -> embeddings [N, 128].

    Embeddings are not normalised here; the loss does it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        dim = self.encoder.feature_dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, 128))

    def forward(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(expect_tensor("views", views, ("N", 3, "H", "W"))))
