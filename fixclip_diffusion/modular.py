"""A text step for modular diffusers: any workflow of Stable Diffusion XL reads prompts of any length.

blocks = StableDiffusionXLAutoBlocks()
blocks.sub_blocks["text_encoder"] = FixClipStableDiffusionXLTextStep()
"""

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep

from fixclip_diffusion.pipeline_xl import FixClipStableDiffusionXLPipeline
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.text_encoder import FixClipTextEncoder, FixClipTextEncoderWithProjection
from fixclip_diffusion.tokenizer import FixClipTokenizer

OURS: dict[str, type] = {
    "text_encoder": FixClipTextEncoder,
    "text_encoder_2": FixClipTextEncoderWithProjection,
    "tokenizer": FixClipTokenizer,
    "tokenizer_2": FixClipTokenizer,
}


class FixClipStableDiffusionXLTextStep(StableDiffusionXLTextEncoderStep):
    """`StableDiffusionXLTextEncoderStep` that gives what `FixClipStableDiffusionXLPipeline.encode_prompt` gives.

    Outputs: prompt_embeds and negative_prompt_embeds (B, L, 768 + 1280), equally long, and both pooled vectors
    (B, 1280). Inputs beside the stock ones: `conditioning` and `weights`, see that pipeline. Where the workflow has a
    UNet or a ControlNet, it is told to pass over rows of zeros (`state_mask`), which fill up the shorter prompts.

    Raises:
        ValueError: text encoders and tokenizers are not FixClip's, or see the pipeline's `encode_prompt`.
    """

    @property
    def description(self) -> str:
        return "Text step for prompts of any length: both text encoders read them by one conditioning, token by token"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        stock = super().expected_components
        return [ComponentSpec(spec.name, OURS[spec.name]) if spec.name in OURS else spec for spec in stock]

    @property
    def inputs(self) -> list[InputParam]:
        own = [
            InputParam("conditioning", type_hint=str, description="how prompts of more than 77 tokens are read"),
            InputParam("weights", type_hint=str, description="syntax of prompt weights: a1111, compel or literal"),
        ]
        return [*super().inputs, *own]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state: Any = self.get_block_state(state)
        self.check_inputs(block_state)
        # A pipeline of text encoders alone: the one place that knows how prompts become embeds.
        pipe: Any = FixClipStableDiffusionXLPipeline(
            **{name: getattr(components, name) for name in OURS},
            vae=None,
            unet=None,
            scheduler=None,
            force_zeros_for_empty_prompt=components.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
            conditioning=block_state.conditioning,
            weights=block_state.weights,
        )
        (
            block_state.prompt_embeds,
            block_state.negative_prompt_embeds,
            block_state.pooled_prompt_embeds,
            block_state.negative_pooled_prompt_embeds,
        ) = pipe.encode_prompt(
            block_state.prompt,
            block_state.prompt_2,
            device=components._execution_device,
            do_classifier_free_guidance=components.guider.num_conditions > 1,
            negative_prompt=block_state.negative_prompt,
            negative_prompt_2=block_state.negative_prompt_2,
            lora_scale=(block_state.cross_attention_kwargs or {}).get("scale"),
            clip_skip=block_state.clip_skip,
        )
        for name in ("unet", "controlnet"):
            if getattr(components, name, None) is not None:
                mask_empty_states(getattr(components, name))
        self.set_block_state(state, block_state)
        return components, state
