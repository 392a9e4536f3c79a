"""Long prompts in Stable Diffusion: the FIX-CLIP text encoder as a drop-in component.

Importing it makes our pipeline classes known to diffusers, so that plain `DiffusionPipeline.from_pretrained` loads what
they saved. Without diffusers everything but the pipelines is there. Inside ComfyUI, whose nodes read prompts without
diffusers, the pipelines are imported when they are first asked for.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

# diffusers looks PreTrainedModel and PreTrainedTokenizerFast up in the module that model_index.json names.
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.text_config import FixClipTextConfig
from fixclip_diffusion.text_encoder import FixClipTextEncoder, FixClipTextEncoderWithProjection
from fixclip_diffusion.token_report import TokenReport, token_report
from fixclip_diffusion.tokenizer import FixClipTokenizer

if TYPE_CHECKING:
    from fixclip_diffusion.pipeline import FixClipStableDiffusionPipeline
    from fixclip_diffusion.pipeline_xl import FixClipStableDiffusionXLPipeline

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

_PIPELINES = {
    "FixClipStableDiffusionPipeline": "fixclip_diffusion.pipeline",
    "FixClipStableDiffusionXLPipeline": "fixclip_diffusion.pipeline_xl",
}


def __getattr__(name: str) -> Any:
    if name not in _PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PIPELINES[name]), name)
    globals()[name] = value
    return value


def _register_pipelines() -> None:
    try:
        for name in _PIPELINES:
            __getattr__(name)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise


if "comfy.sd" not in sys.modules:
    _register_pipelines()
