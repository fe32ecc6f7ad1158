"""Tiny diffusion models in folders, as diffusers saves them: random weights, no network."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIDE, TOKENS, WIDTH = 4, 8, 8
PROMPTS = ["a cat", "a dog", "a bad cab"]
BLOCKS = {"layers_per_block": 1, "norm_num_groups": 2}
PLAIN = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# As openai/diffusers-cd_imagenet64_l2 has them.
PUBLISHED = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 2,
}
TURBO = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def consistency(folder, classes=None, channels=3, blocks=PLAIN):
    """A ConsistencyModelPipeline, saved."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(4, 8), num_class_embeds=classes,
        attention_head_dim=4, resnet_time_scale_shift="scale_shift", **blocks, **BLOCKS,
    )  # fmt: skip
    pipeline = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())
    pipeline.save_pretrained(folder)
    return pipeline


def turbo(folder, kind="turbo"):
    """A pipeline as SD-turbo's (`turbo`), SDXL-turbo's (`large`), SDXS's (`sdxs`) or an LCM's (`lcm`), saved."""
    torch.manual_seed(0)
    large, added = kind == "large", {}
    if large:
        added = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        }  # fmt: skip
    elif kind == "sdxs":
        added = {"mid_block_type": None}
    elif kind == "lcm":
        added = {"time_cond_proj_dim": 5}
    unet = UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(4, 8), cross_attention_dim=2 * WIDTH if large else WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **BLOCKS, **added,
    )  # fmt: skip
    schedulers = {"large": EulerAncestralDiscreteScheduler, "lcm": LCMScheduler}
    scheduler = schedulers.get(kind, EulerDiscreteScheduler)(**TURBO)
    parts = {"unet": unet, "vae": decoder(kind == "sdxs"), "scheduler": scheduler, "tokenizer": tokenizer(folder)}
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    parts["text_encoder"] = CLIPTextModel(config).eval()
    if large:
        second = {"text_encoder_2": CLIPTextModelWithProjection(config).eval(), "tokenizer_2": parts["tokenizer"]}
        pipeline = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = (LatentConsistencyModelPipeline if kind == "lcm" else StableDiffusionPipeline)(**parts, **without)
    pipeline.save_pretrained(folder)
    return pipeline


def decoder(tiny=False):
    """A VAE that doubles the latents' side: an AutoencoderKL, or an AutoencoderTiny as SDXS has."""
    if tiny:
        widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
        return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    return AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.13, **BLOCKS,
    )  # fmt: skip


def tokenizer(folder):
    """CLIP's tokenizer of single letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdgot", *(f"{letter}</w>" for letter in "abcdgot")]
    source = folder / "words"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TOKENS}))
    return CLIPTokenizer.from_pretrained(str(source), local_files_only=True)


def prompts_file(folder, lines=PROMPTS):
    """A text file of prompts."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n")
    return path
