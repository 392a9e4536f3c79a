"""Stable Diffusion 1 and 2 that read prompts of any length."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.families import STABLE_DIFFUSION
from fixclip_diffusion.loading import load_components
from fixclip_diffusion.long_prompts import LongPromptMixin, as_texts, link_tasks, negative_texts
from fixclip_diffusion.lora import LORA_NAME
from fixclip_diffusion.text_encoder import FixClipTextEncoder
from fixclip_diffusion.tokenizer import FixClipTokenizer


class FixClipStableDiffusionPipeline(LongPromptMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that reads prompts of any length.

    Prompts that fit into 77 tokens give exactly the picture of the stock pipeline, unless the encoder was trained. How
    longer ones are read is the conditioning's affair. Everything else is stock. A prompt is drawn the same alone and in
    a batch with longer ones.

    Args:
        text_encoder, tokenizer: the FixClip components, which belong together.
        conditioning: how prompts are read that do not fit into 77 tokens: "overlap", "one_pass", "chunks" or "stock",
            see `conditioning`. By default what the encoder or its adapter was trained for: "one_pass" for a trained
            encoder, and for a base's own "overlap", the best that needs no training.
        weights: syntax of prompt weights, "a1111" (`(word:1.3)`) or "compel" (`word++`); None or "literal" takes
            prompts literally.
        long_prompt: name of `conditioning` in version 0.1.

    Raises:
        ValueError: only one of text encoder and tokenizer is FixClip's, or they differ in length, or the
            encoder's width is not the UNet's, or it cannot be read by that conditioning.
    """

    family = STABLE_DIFFUSION

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: FixClipTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
    ):
        self._check_text(text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self._set_reading(conditioning, weights, long_prompt)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        encoder: str | Path | FixClipTextEncoder | None = None,
        adapter: str | Path | TextAdapter | None = None,
        **kwargs: Any,
    ) -> "FixClipStableDiffusionPipeline":
        """Load a Stable Diffusion 1.x or 2.x model and give it the long text encoder.

        Args:
            base: folder or hub name, stock or saved by this pipeline; or a whole model such as `builtin:scenes` (see
                `builtin`), which brings its own encoder, and to that its adapter and its LoRA, named "fixclip".
            encoder: folder or hub name of a FixClipTextEncoder, CLIPTextModel, CLIPTextModelWithProjection or
                CLIPModel, or an encoder in memory. By default the whole model's, else the base's own, stretched.
            adapter: folder or hub name of a `TextAdapter`, or one in memory. By default the whole model's if the
                encoder is, else the encoder's own, if any.
            **kwargs: of `StableDiffusionPipeline.from_pretrained`, and `conditioning` and `weights`.

        Raises:
            ValueError: the base or the encoder is unknown, damaged or of another width than the UNet; an encoder
                was passed without its tokenizer. Found out from configurations, before any weights are fetched.
        """
        if encoder is not None and "text_encoder" in kwargs:
            raise ValueError("pass either encoder= or text_encoder=, not both")
        if isinstance(encoder, torch.nn.Module):
            kwargs["text_encoder"], encoder = encoder, None
        given = kwargs.get("text_encoder") is not None
        parts = builtin.ModelParts(builtin.base_of(base), adapter=adapter)
        if "text_encoder" not in kwargs:
            parts = builtin.complete(base, encoder, adapter)
        base = builtin.resolve(parts.base)
        encoders = {} if parts.encoder is None else {"text_encoder": parts.encoder}
        kwargs = load_components(cls.family, base, encoders, {"text_encoder": parts.adapter}, kwargs)
        pipe: Any = cls._load_stock(base, kwargs, has_own_encoders=parts.encoder is None and not given)
        if parts.lora is not None and pipe.unet is not None:
            pipe.load_lora_weights(parts.lora, adapter_name=LORA_NAME)
        return pipe

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock method for prompts of any length; both halves of guidance come out equally long.

        The embeds may be passed to any other Stable Diffusion pipeline as prompt_embeds and negative_prompt_embeds.
        Rows behind a prompt that is shorter than others are 0; see `state_mask`.

        Returns:
            Hidden states (B * num_images_per_prompt, L, D) of the prompts and, with guidance, of the negative prompts.
            L is 77 if all texts fit and the encoder kept its original positions, else as long as the longest needs.

        Raises:
            ValueError: a prompt that is no text, another number of negative prompts, or too large a clip_skip.
        """
        if prompt_embeds is None:
            prompt_embeds = self._encode([as_texts(prompt)], device, clip_skip, lora_scale).embeds_BLD
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = negative_texts(negative_prompt, len(prompt_embeds))
            # Stock diffusers reads negative prompts without clip_skip.
            negative_prompt_embeds = self._encode([negatives], device, None, lora_scale, prompt_embeds).embeds_BLD
        prompt_embeds, negative_prompt_embeds = self._equally_long(prompt_embeds, negative_prompt_embeds)
        return super().encode_prompt(
            None,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )


# diffusers finds a pipeline class by name in itself, and asks this table which methods load a component.
FixClipStableDiffusionPipeline.__module__ = "fixclip_diffusion"
setattr(diffusers, FixClipStableDiffusionPipeline.__name__, FixClipStableDiffusionPipeline)
LOADABLE_CLASSES["fixclip_diffusion"] = {
    "PreTrainedModel": ["save_pretrained", "from_pretrained"],
    "PreTrainedTokenizerFast": ["save_pretrained", "from_pretrained"],
}
link_tasks(
    "fixclip-stable-diffusion",
    FixClipStableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
