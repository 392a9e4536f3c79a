"""A tiny refiner of Stable Diffusion XL with random weights."""

from diffusers import StableDiffusionXLImg2ImgPipeline

from fixclip_diffusion.tiny import unet


def refiner_of(base):
    """With the components of a tiny Stable Diffusion XL, but the first text encoder: as the real one, its UNet has five
    time ids, of which the last is a score for beauty."""
    parts = {**base.components, "text_encoder": None, "tokenizer": None}
    parts["unet"] = unet(
        **{**base.unet.config, "cross_attention_dim": 48, "projection_class_embeddings_input_dim": 24 + 5 * 8}
    )
    return StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False
    )
