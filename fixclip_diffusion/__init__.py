"""Long prompts in Stable Diffusion: the FIX-CLIP text encoder as a drop-in component."""

# diffusers looks PreTrainedModel and PreTrainedTokenizerFast up in the module that model_index.json names.
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .adapter import TextAdapter
from .pipeline import FixClipStableDiffusionPipeline
from .prompts import TokenReport, token_report
from .text_encoder import FixClipTextConfig, FixClipTextEncoder, FixClipTokenizer

__all__ = [
    "FixClipStableDiffusionPipeline",
    "FixClipTextConfig",
    "FixClipTextEncoder",
    "FixClipTokenizer",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "TextAdapter",
    "TokenReport",
    "token_report",
]
