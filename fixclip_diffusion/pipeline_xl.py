"""Stable Diffusion XL that reads prompts of any length, with both of its text encoders."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from fixclip_diffusion.adapter import XL_ENCODERS, TextAdapter, adapter_folders
from fixclip_diffusion.families import STABLE_DIFFUSION_XL
from fixclip_diffusion.loading import ELSEWHERE, load_components
from fixclip_diffusion.long_prompts import LongPromptMixin, as_texts, link_tasks, negative_texts
from fixclip_diffusion.text_encoder import FixClipTextEncoder, FixClipTextEncoderWithProjection
from fixclip_diffusion.tokenizer import FixClipTokenizer


class FixClipStableDiffusionXLPipeline(LongPromptMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that reads prompts of any length.

    Both text encoders read a prompt by the same conditioning, so that row l of the embeds (B, L, 768 + 1280) holds the
    hidden states of the same token. Prompts that fit into 77 tokens give exactly the picture of the stock pipeline,
    unless an encoder was trained. The pooled vector is that of the first pass: with `stock` and `overlap` of the first
    77 tokens, as stock diffusers and compel have it; with `chunks` of the first window, which may end at a sentence
    before; with `one_pass` of the whole text, or of its first pass where there are more than 248 tokens.

    Args:
        text_encoder, text_encoder_2, tokenizer, tokenizer_2: the FixClip components; the refiner has the second ones
            only.
        conditioning, weights: see `FixClipStableDiffusionPipeline`.

    Raises:
        ValueError: a text encoder or a tokenizer is not FixClip's, or they differ in length, or their widths do not add
            up to the UNet's, or one cannot be read by that conditioning.
    """

    family = STABLE_DIFFUSION_XL

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: FixClipTokenizer,
        tokenizer_2: FixClipTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
    ):
        self._check_text(
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
        )
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
        self._set_reading(conditioning, weights, long_prompt)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        encoder: str | Path | FixClipTextEncoder | None = None,
        encoder_2: str | Path | FixClipTextEncoderWithProjection | None = None,
        adapter: "str | Path | tuple[TextAdapter | None, TextAdapter | None] | None" = None,
        **kwargs: Any,
    ) -> "FixClipStableDiffusionXLPipeline":
        """Load a Stable Diffusion XL model and give it long text encoders.

        Args:
            base: folder or hub name, stock or saved by this pipeline.
            encoder: folder or hub name of a CLIP ViT-L/14 text encoder, stock or of 248 tokens, or one in memory; by
                default the base's own. encoder_2: the same for ViT-bigG/14, with its projection.
            adapter: folder that `train_adapter.py` wrote for this base, with text_encoder/ and text_encoder_2/ as far
                as both have one, or a pair of adapters in memory.
            **kwargs: of `StableDiffusionXLPipeline.from_pretrained`, and `conditioning` and `weights`.

        Raises:
            ValueError: the base or an encoder is unknown, damaged or does not fit; see `loading.load_components`.
        """
        encoders = {
            name: part for name, part in (("text_encoder", encoder), ("text_encoder_2", encoder_2)) if part is not None
        }
        is_own = not encoders and all(kwargs.get(name) is None for name in ("text_encoder", "text_encoder_2"))
        adapters = cls._adapters(adapter, **{key: kwargs[key] for key in ELSEWHERE if key in kwargs})
        kwargs = load_components(cls.family, str(base), encoders, adapters, kwargs)
        return cls._load_stock(str(base), kwargs, is_own)

    @classmethod
    def _adapters(cls, adapter: Any, **hub_kwargs: Any) -> dict[str, Any]:
        if adapter is None:
            return {}
        if isinstance(adapter, (tuple, list)) and len(adapter) == 2:
            return dict(zip(XL_ENCODERS, adapter, strict=True))
        if not isinstance(adapter, (str, Path)):
            raise ValueError(
                f"adapter={type(adapter).__name__}: Stable Diffusion XL takes a folder or a hub name of both adapters, "
                f"or a pair, for {' and '.join(XL_ENCODERS)}, of which one may be None"
            )
        return dict(adapter_folders(adapter, **hub_kwargs))

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The stock method for prompts of any length; both halves of guidance come out equally long.

        Returns:
            Hidden states (B * num_images_per_prompt, L, D) of prompts and negative prompts, rows behind a prompt's own
            being 0, and pooled vectors (B * num_images_per_prompt, E) of both.

        Raises:
            ValueError: a prompt that is no text, another number of second or negative prompts, too large a clip_skip,
                or embeds without their pooled vectors.
        """
        device = device or self._execution_device
        is_given = do_classifier_free_guidance and negative_prompt_embeds is not None
        if is_given and negative_pooled_prompt_embeds is None:
            raise ValueError(
                "negative_prompt_embeds= needs negative_pooled_prompt_embeds= too; encode_prompt gives both"
            )
        if prompt_embeds is None:
            texts = as_texts(prompt)
            encoded = self._encode(self._columns(texts, as_texts(prompt_2 or texts)), device, clip_skip, lora_scale)
            prompt_embeds = encoded.embeds_BLD
            pooled_prompt_embeds = encoded.pooled_BE if pooled_prompt_embeds is None else pooled_prompt_embeds
        if pooled_prompt_embeds is None:
            raise ValueError("prompt_embeds= needs pooled_prompt_embeds= too; encode_prompt gives both")
        zeros = negative_prompt is None and self.config.force_zeros_for_empty_prompt
        if do_classifier_free_guidance and negative_prompt_embeds is None and zeros:
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)
            negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)
        elif do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = negative_texts(negative_prompt or "", len(prompt_embeds))
            seconds = negative_texts(negative_prompt_2 or negative_prompt or "", len(prompt_embeds))
            # Stock diffusers reads negative prompts without clip_skip.
            encoded = self._encode(self._columns(negatives, seconds), device, None, lora_scale, prompt_embeds)
            negative_prompt_embeds = encoded.embeds_BLD
            if negative_pooled_prompt_embeds is None:
                negative_pooled_prompt_embeds = encoded.pooled_BE
        prompt_embeds, negative_prompt_embeds = self._equally_long(prompt_embeds, negative_prompt_embeds)
        return super().encode_prompt(
            None,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )

    def _columns(self, texts: list[str], seconds: list[str]) -> list[list[str]]:
        """The texts of each text encoder that this model has."""
        by_name = {"text_encoder": texts, "text_encoder_2": seconds}
        return [by_name[tower.encoder] for tower in self.towers]


FixClipStableDiffusionXLPipeline.__module__ = "fixclip_diffusion"
setattr(diffusers, FixClipStableDiffusionXLPipeline.__name__, FixClipStableDiffusionXLPipeline)
link_tasks(
    "fixclip-stable-diffusion-xl",
    FixClipStableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
