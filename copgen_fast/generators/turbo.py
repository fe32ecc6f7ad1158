"""Latent diffusion distilled to one step (SD-turbo, SDXL-turbo, SDXS, DMD2, LCM) in diffusers' folders.

z is the start noise of the latents. The classes are prompts, a line each of a text file: they are embedded once, and
the text encoders are then freed. Sauer et al. 2023 (turbo), Song et al. 2024 (SDXS), Yin et al. 2024 (DMD2),
Luo et al. 2023 (LCM).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from copgen_fast import files
from copgen_fast.errors import UsageError
from copgen_fast.generators._diffusers import Folder, OneStep, OneStepModel, import_package
from copgen_fast.options import CountOrZero, Place, Range

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
VAES = ("AutoencoderKL", "AutoencoderTiny")
EMBEDDED_AT_ONCE = 32


@dataclass(frozen=True)
class Config:
    """Options of turbo."""

    prompts: Place = ""
    """Text file with a prompt a line: the classes."""
    classes: CountOrZero = 0
    """Take the first so many of them; 0: all."""
    timestep: Annotated[int, Range(0, 999)] = 0
    """Noise level of the step: 399 for DMD2's model of one step; 0: the scheduler's own."""
    guidance: Annotated[float, Range(1, 100)] = 8.5
    """Guidance scale that an LCM's UNet takes as an input; others have none."""


class Turbo(OneStepModel):
    """z [N, L] and labels to images, as diffusers' pipelines with num_inference_steps=1 and guidance_scale=0.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny, whose encoder is left out.
        embeddings: of the prompts, [classes, T, D].
        pooled: of two text encoders, [classes, P], which SDXL's UNet takes beside them.
        guidance: the guidance scale that an LCM's UNet takes as an input, where it does.
    """

    def __init__(
        self,
        unet: nn.Module,
        step: OneStep,
        vae: nn.Module,
        embeddings: Tensor,
        pooled: Tensor | None = None,
        guidance: float = 8.5,
    ) -> None:
        super().__init__(unet, step)
        if vae.config.get("latents_mean") is not None:
            raise UsageError("generator turbo: its vae/config.json has latents_mean, which turbo models don't have")
        vae.encoder = vae.quant_conv = None
        self.vae, self.classes = vae, len(embeddings)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = (factor * side for side in self.latent_shape[1:])
        self.image_shape = (3, height, width)
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("pooled", pooled)
        features = unet.config.time_cond_proj_dim
        self.register_buffer("guidance", None if features is None else embed_guidance(guidance, features))
        # SDXL's conditions: the image's size, no offset of a crop, and the size again.
        self.register_buffer("sizes", torch.tensor([height, width, 0.0, 0.0, height, width]), persistent=False)

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """See `OneStepModel`."""
        conditions: dict[str, Any] = {"encoder_hidden_states": self.embeddings[labels]}
        if self.guidance is not None:
            conditions["timestep_cond"] = self.guidance.expand(len(z), -1)
        if self.pooled is not None:
            sizes = self.sizes.expand(len(z), -1)
            conditions["added_cond_kwargs"] = {"text_embeds": self.pooled[labels], "time_ids": sizes}
        latents = self.denoised(z, **conditions) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0]


def embed_guidance(scale: float, width: int) -> Tensor:
    """Sines and cosines [1, width] of a guidance scale, as an LCM's UNet takes it (Luo et al. 2023, section 4.2).

    diffusers' scale is one more than the paper's.
    """
    half = width // 2
    angles = 1000 * (scale - 1) * torch.logspace(0, -4, half, dtype=torch.float64)
    waves = torch.cat([angles.sin(), angles.cos()])
    return nn.functional.pad(waves, (0, width - 2 * half)).float()[None]


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
    if not folder.pipeline.endswith("XLPipeline"):
        without |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(folder.diffusers, folder.pipeline)(**parts, **without)
    several = [list(prompts[i : i + EMBEDDED_AT_ONCE]) for i in range(0, len(prompts), EMBEDDED_AT_ONCE)]
    options = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = [pipeline.encode_prompt(some, **options) for some in several]
    pooled = torch.cat([one[2] for one in found]) if len(found[0]) > 2 else None
    return torch.cat([one[0] for one in found]), pooled


def build(weights: str | Path | None, config: Config) -> Turbo:
    """Read a local folder of one of `PIPELINES`, and embed the prompts.

    Raises:
        UsageError: see `_diffusers.Folder` and `read_prompts`.
    """
    folder = Folder("turbo", weights, PIPELINES)
    prompts = read_prompts(config)
    # What StableDiffusionPipeline changes of its scheduler, too.
    changes = {"steps_offset": 1, "clip_sample": False} if folder.pipeline == "StableDiffusionPipeline" else {}
    step = folder.step(config.timestep or None, **changes)
    unet = folder.model("unet", folder.diffusers.UNet2DConditionModel)
    vae = folder.model("vae", folder.model_class("vae", VAES))
    embeddings, pooled = embed(folder, prompts)
    generator = Turbo(unet, step, vae, embeddings, pooled, config.guidance)
    generator.weights_file, generator.weights_sha256 = folder.path, folder.digest()
    return generator
