"""Long prompts in Stable Diffusion: the FIX-CLIP text encoder as a drop-in component."""

# diffusers looks PreTrainedModel and PreTrainedTokenizerFast up in the module that model_index.json names.
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.pipeline import FixClipStableDiffusionPipeline
from fixclip_diffusion.pipeline_xl import FixClipStableDiffusionXLPipeline
from fixclip_diffusion.text_encoder import FixClipTextConfig, FixClipTextEncoder, FixClipTextEncoderWithProjection
from fixclip_diffusion.token_report import TokenReport, token_report
from fixclip_diffusion.tokenizer import FixClipTokenizer

__all__ = [
    "FixClipStableDiffusionPipeline",
    "FixClipStableDiffusionXLPipeline",
    "FixClipTextConfig",
    "FixClipTextEncoder",
    "FixClipTextEncoderWithProjection",
    "FixClipTokenizer",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "TextAdapter",
    "TokenReport",
    "token_report",
]
