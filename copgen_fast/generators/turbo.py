"""Turbo-distilled latent diffusion (Sauer et al. 2023: SD-turbo, SDXL-turbo) in diffusers' folders, in one step.

z is the start noise of the latents. The classes are prompts, a line each of a text file: they are embedded once, and
the text encoders are then freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from copgen_fast import files
from copgen_fast.errors import UsageError
from copgen_fast.generators._diffusers import Folder, OneStep, OneStepModel, import_package
from copgen_fast.options import CountOrZero, Place

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
EMBEDDED_AT_ONCE = 32


@dataclass(frozen=True)
class Config:
    """Options of turbo."""

    prompts: Place = ""
    """Text file with a prompt a line: the classes."""
    classes: CountOrZero = 0
    """Take the first so many of them; 0: all."""


class Turbo(OneStepModel):
    """z [N, L] and labels to images, as diffusers' pipelines with num_inference_steps=1 and guidance_scale=0.

    Args:
        vae: an AutoencoderKL, whose encoder is left out.
        embeddings: of the prompts, [classes, T, D].
        pooled: of two text encoders, [classes, P], which SDXL's UNet takes beside them.
    """

    def __init__(
        self, unet: nn.Module, step: OneStep, vae: nn.Module, embeddings: Tensor, pooled: Tensor | None = None
    ) -> None:
        super().__init__(unet, step)
        for config, setting in ((unet.config, "time_cond_proj_dim"), (vae.config, "latents_mean")):
            if config.get(setting) is not None:
                raise UsageError(f"generator turbo: its config.json has {setting}, which turbo models don't have")
        vae.encoder = vae.quant_conv = None
        self.vae, self.classes = vae, len(embeddings)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = (factor * side for side in self.latent_shape[1:])
        self.image_shape = (3, height, width)
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("pooled", pooled)
        # SDXL's conditions: the image's size, no offset of a crop, and the size again.
        self.register_buffer("sizes", torch.tensor([height, width, 0.0, 0.0, height, width]), persistent=False)

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """See `OneStepModel`."""
        conditions: dict[str, Any] = {"encoder_hidden_states": self.embeddings[labels]}
        if self.pooled is not None:
            sizes = self.sizes.expand(len(z), -1)
            conditions["added_cond_kwargs"] = {"text_embeds": self.pooled[labels], "time_ids": sizes}
        latents = self.denoised(z, **conditions) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0]


def read_prompts(config: Config) -> tuple[str, ...]:
    """The prompts of a file, one a line.

    Raises:
        UsageError: there is no such file, or fewer lines than classes, or an empty one.
    """
    if not config.prompts:
        raise UsageError(
            "generator turbo needs prompts: give --generator.options prompts=FILE, a text file, a line each"
        )
    try:
        lines = [line.strip() for line in files.read_bytes(config.prompts).decode().splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{config.prompts} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    if len(lines) < max(1, config.classes):
        raise UsageError(f"{config.prompts} has {len(lines)} lines, and classes are {max(1, config.classes)}")
    prompts = tuple(lines[: config.classes or None])
    if "" in prompts:
        raise UsageError(f"{config.prompts}: line {prompts.index('') + 1} is empty: write a prompt, or leave it out")
    return prompts


def embed(folder: Folder, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Embeddings of prompts [P, T, D] and, of two text encoders, pooled ones, as diffusers' pipelines make them.

    Kept in memory for the next stage: embedding many prompts takes minutes on a CPU.

    Raises:
        UsageError: see `Folder`.
    """
    transformers = import_package("transformers", folder.name)
    classes = {"tokenizer": transformers.CLIPTokenizer, "text_encoder": transformers.CLIPTextModel}
    if folder.pipeline.endswith("XLPipeline"):
        second = {"tokenizer_2": transformers.CLIPTokenizer, "text_encoder_2": transformers.CLIPTextModelWithProjection}
        classes |= second
    for name in classes:
        folder.locate(name, weights=name.startswith("text"))
    key = folder.digest(*classes), prompts
    if key not in _embedded:
        _embedded.clear()
        parts = {
            name: folder.model(name, cls) if name.startswith("text") else folder.tokenizer(name, cls)
            for name, cls in classes.items()
        }
        _embedded[key] = encode(folder, parts, prompts)
    return _embedded[key]


_embedded: dict[tuple[str, tuple[str, ...]], tuple[Tensor, Tensor | None]] = {}
"""The last embeddings, by their text encoders' digest and the prompts."""


@torch.no_grad()
def encode(folder: Folder, parts: dict[str, Any], prompts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Embeddings by the pipeline's own `encode_prompt`, with nothing but tokenizers and text encoders in it."""
    without = {"vae": None, "unet": None, "scheduler": None}
    if folder.pipeline == "StableDiffusionPipeline":
        without |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(folder.diffusers, folder.pipeline)(**parts, **without)
    several = [list(prompts[i : i + EMBEDDED_AT_ONCE]) for i in range(0, len(prompts), EMBEDDED_AT_ONCE)]
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = [pipeline.encode_prompt(some, **options) for some in several]
    pooled = torch.cat([one[2] for one in found]) if len(found[0]) > 2 else None
    return torch.cat([one[0] for one in found]), pooled


def build(weights: str | Path | None, config: Config) -> Turbo:
    """Read a local folder of a StableDiffusionPipeline or StableDiffusionXLPipeline, and embed the prompts.

    Raises:
        UsageError: see `_diffusers.Folder` and `read_prompts`.
    """
    folder = Folder("turbo", weights, PIPELINES)
    prompts = read_prompts(config)
    # What StableDiffusionPipeline changes of its scheduler, too.
    changes = {} if "XL" in folder.pipeline else {"steps_offset": 1, "clip_sample": False}
    step, unet = folder.step(**changes), folder.model("unet", folder.diffusers.UNet2DConditionModel)
    vae = folder.model("vae", folder.diffusers.AutoencoderKL)
    embeddings, pooled = embed(folder, prompts)
    generator = Turbo(unet, step, vae, embeddings, pooled)
    generator.weights_file, generator.weights_sha256 = folder.path, folder.digest()
    return generator
