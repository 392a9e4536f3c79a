"""Models of a base's sizes with random weights: `--smoke` tries a recipe without a download."""

import logging
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fixclip_diffusion import tiny
from fixclip_diffusion.adapter_training.features import FrozenModels
from fixclip_diffusion.families import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, Family, TextEncoding, Tower
from fixclip_diffusion.loading import encoder_class
from fixclip_diffusion.tokenizer import FixClipTokenizer

logger = logging.getLogger(__name__)

SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {**SD15_VAE, "sample_size": 1024, "scaling_factor": 0.13025}
VIT_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}
VIT_BIG_G: dict[str, Any] = {
    **VIT_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def random_base(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> FrozenModels:
    """Models of the sizes of Stable Diffusion XL (3.5 billion weights) if the name of the base has "xl" in it, else of
    Stable Diffusion 1.5 (1.07 billion)."""
    family = STABLE_DIFFUSION_XL if "xl" in name.lower() else STABLE_DIFFUSION
    logger.info("base %s is replaced by random weights of the sizes of %s", name, family.name)
    return random_models(family, dtype, seed)


def random_models(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> FrozenModels:
    """Models of a family's sizes: Stable Diffusion 1.5 or XL."""
    is_xl = family is STABLE_DIFFUSION_XL
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)  # made in float32 and cast, the UNet alone would take 5 GB for a while
        unet = UNet2DConditionModel(**(SDXL_UNET if is_xl else SD15_UNET))
        vae = AutoencoderKL(**(SDXL_VAE if is_xl else SD15_VAE))
        encodings = tuple(_random_encoding(tower) for tower in family.towers)
    finally:
        torch.set_default_dtype(default)
    sampler = tiny.scheduler()
    schedule = DDPMScheduler.from_config(sampler.config)
    return FrozenModels(vae, encodings, encodings, unet, schedule, sampler, family=family, zeros_for_empty=is_xl)


def _random_encoding(tower: Tower) -> TextEncoding:
    from fixclip_core.weights.write import clip_tokenizer

    model, sizes = (CLIPTextModelWithProjection, VIT_BIG_G) if tower.pooled else (CLIPTextModel, VIT_L)
    encoder = encoder_class(tower).from_clip(model(CLIPTextConfig(**sizes)), hidden_state=tower.output)
    tokenizer = FixClipTokenizer.from_stock(clip_tokenizer(pad_token=PADS[tower.tokenizer]), encoder.context_length)
    return TextEncoding(encoder, tokenizer, tower)
