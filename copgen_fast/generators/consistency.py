"""Consistency models (Song et al. 2023) in diffusers' folders: start noise z to an image by one step of a UNet."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from copgen_fast.errors import UsageError
from copgen_fast.generators._diffusers import Folder, OneStep, OneStepModel
from copgen_fast.registry import NoOptions


class Consistency(OneStepModel):
    """z [N, L] (and labels) to images, as diffusers' ConsistencyModelPipeline with one step."""

    def __init__(self, unet: nn.Module, step: OneStep) -> None:
        super().__init__(unet, step)
        channels, height, width = self.latent_shape
        if channels != 3:
            raise UsageError(f"unet: expected 3 channels, as ConsistencyModelPipeline does, got {channels}")
        self.image_shape, self.classes = (3, height, width), unet.config.num_class_embeds or 0

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """See `OneStepModel`."""
        return self.denoised(z, class_labels=labels)


def build(weights: str | Path | None, config: NoOptions) -> Consistency:
    """Read a local folder of a ConsistencyModelPipeline.

    Raises:
        UsageError: see `_diffusers.Folder`.
    """
    folder = Folder("consistency", weights, ("ConsistencyModelPipeline",))
    step = folder.step(clip_denoised=False)  # as images are clipped in any case
    unet = folder.model("unet", folder.diffusers.UNet2DModel)
    generator = Consistency(unet, step)
    generator.weights_file, generator.weights_sha256 = folder.path, folder.digest()
    return generator
