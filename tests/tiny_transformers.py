"""Tiny real Stable Diffusion 3 and FLUX with random weights; CLIP's own tokenizer stands in for T5's as well."""

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fixclip_diffusion.tiny import clip_text_config

T5_WIDTH = 96


def _vae(channels):
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def _t5():
    sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=49408, **sizes))


def stable_diffusion_3(folder):
    """Save a Stable Diffusion 3: CLIP-L of width 32, bigG of width 48, T5 of width 96."""
    torch.manual_seed(0)
    ids = {"eos_token_id": 49407}
    second = {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 48, "hidden_act": "gelu"}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=32 + 48,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        text_encoder=CLIPTextModelWithProjection(clip_text_config(**ids)),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(**ids, **second)),
        tokenizer_2=tiny.clip_tokenizer(pad_token="!"),
        text_encoder_3=_t5(),
        tokenizer_3=tiny.clip_tokenizer(context_length=512),
    ).save_pretrained(folder)


def flux(folder):
    """Save a FLUX: CLIP-L of width 32, of which its transformer reads the pooled vector, and T5 of width 96."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(1),
        text_encoder=CLIPTextModel(clip_text_config(eos_token_id=49407)),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=tiny.clip_tokenizer(context_length=512),
    ).save_pretrained(folder)
