"""Encoders: torchvision ResNets with a choice of stem and width, and the contrastive projection head."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from copgen_fast.config import EncoderConfig
from copgen_fast.errors import UsageError
from copgen_fast.ops import Conv3x3
from copgen_fast.ops.backend import triton_lacks
from copgen_fast.ops.checks import expect_tensor, readable

# Beyond any normalisation of intensities in [0, 1].
_MOST = 100
_DEPTHS = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}


class Stage(nn.Sequential):
    """Blocks of one resolution; where `checkpointed`, the backward computes their activations again."""

    checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.checkpointed and torch.is_grad_enabled()):
            return super().forward(x)
        return checkpoint(
            super().forward,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # there is nothing random in it
            context_fn=lambda: (contextlib.nullcontext(), statistics_held(self)),
        )


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
        _in_fewer_products(self)
        self.feature_dim = 8 * config.width * block.expansion

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, feature_dim] of normalised images [N, 3, H, W]; 0..255 are refused in eval mode on the CPU."""
        expect_tensor("views", x, ("N", 3, "H", "W"))
        looks = not self.training and readable(x) and x.numel()  # a step of training looks at no value
        if looks and (most := x.detach().abs().max().item()) > _MOST:
            raise ValueError(f"views: expected normalised images, a few units from 0, got values up to {most:.4g}")
        return super().forward(x)

    def _make_layer(self, block: type, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Module:
        if planes == 64:  # the first stage: torchvision fixes its input at 64 channels
            self.inplanes = self._width
        return Stage(*super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate))


def _in_fewer_products(network: nn.Module) -> None:
    """Replace 3 x 3 convolutions of stride 1 by `Conv3x3` layers with the same parameters."""
    for parent in list(network.modules()):
        for name, conv in parent.named_children():
            if type(conv) is nn.Conv2d and (same := Conv3x3.of(conv)) is not None:
                setattr(parent, name, same)


def _stem(config: EncoderConfig) -> nn.Conv2d:
    kernel, stride = {"imagenet": (7, 2), "cifar": (3, 1), "half": (3, 2)}[config.stem]
    conv = nn.Conv2d(3, config.width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    return conv


def projection_head(dim: int) -> nn.Sequential:
    """Two affine layers D-D-128 with a ReLU between, as in the reference code."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, 128))


class ContrastiveModel(nn.Module):
    """Encoder f and projection head: views [N, 3, H, W] -> embeddings [N, 128].

    Embeddings are not normalised here; the loss does it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.head = projection_head(self.encoder.feature_dim)

    def forward(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(views))


def prepare(f: nn.Module, device: torch.device, *, compiled: bool = False, checkpointed: bool = False) -> nn.Module:
    """f for training on `device`, channels last; the names of its state stay as they are.

    Args:
        compiled: by torch.compile.
        checkpointed: keep no activations within the encoder's stages.

    Raises:
        UsageError: `compiled`, without the compiler that the device needs.
    """
    f = f.to(device, memory_format=torch.channels_last)
    for module in f.modules():
        if isinstance(module, Stage):
            module.checkpointed = checkpointed
    if compiled:
        _expect_compiler(device)
        f.compile()
    return f


def _expect_compiler(device: torch.device) -> None:
    cxx = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(cxx) is None:
        raise UsageError(
            f"--compile needs a C++ compiler on the CPU, and there is no {cxx}: install one, or leave it out"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError("--compile needs the package triton on a GPU: install it, or leave it out")
    if device.type == "cuda" and triton_lacks():
        raise UsageError(f"--compile on a GPU needs {triton_lacks()}; or leave it out")


@contextlib.contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics unchanged during a forward in training mode."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    held = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, held, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, held, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
