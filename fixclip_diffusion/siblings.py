"""Two text encoders in one pipeline of another package: both must read equally many tokens.

Stable Diffusion XL and 3 put the hidden states of both side by side, row by row. A stock pipeline does not tell a text
encoder what stands beside it, so the encoder looks for the pipeline that calls it on the stack.
"""

import sys
from typing import Any

from transformers import CLIPTextModel, CLIPTextModelWithProjection

PAIRS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def check_siblings(encoder: Any, num_tokens: int) -> None:
    """Compare passes of `num_tokens` tokens, which `encoder` is given, with what the CLIP beside it reads.

    Raises:
        ValueError: a diffusers pipeline calls, and its other CLIP text encoder, with its tokenizer, reads fewer.
    """
    pipe = _calling_pipeline(encoder)
    if pipe is None:
        return
    own = next(name for name in PAIRS if getattr(pipe, name, None) is encoder)
    for name in PAIRS.keys() - {own}:
        other, tokenizer = getattr(pipe, name, None), getattr(pipe, PAIRS[name], None)
        if tokenizer is None or not isinstance(other, (CLIPTextModel, CLIPTextModelWithProjection)):
            continue
        # Stable Diffusion 3 pads for both to what its first tokenizer says.
        padded = getattr(pipe, "tokenizer_max_length", tokenizer.model_max_length)
        length = min(other.config.max_position_embeddings, padded)
        if length < num_tokens:
            projection = "WithProjection" if isinstance(other, CLIPTextModelWithProjection) else ""
            raise ValueError(
                f"{own} is given {num_tokens} tokens, and {name} ({type(other).__name__}) with {PAIRS[name]} "
                f"({type(tokenizer).__name__}) reads {length}: their hidden states stand side by side, row by row. "
                f"Give the pipeline a FixClipTextEncoder{projection} as {name} and a FixClipTokenizer of {num_tokens} "
                f"tokens as {PAIRS[name]} too; of Stable Diffusion XL FixClipStableDiffusionXLPipeline loads all four"
            )


def _calling_pipeline(encoder: Any) -> Any:
    """The pipeline with this text encoder that the nearest frame of diffusers' own code is a method of; else None."""
    frame = sys._getframe(1)
    while frame is not None:
        # Only there: to look at the variables of a caller's frame would keep what they hold in memory.
        if str(frame.f_globals.get("__name__")).startswith("diffusers"):
            owner = frame.f_locals.get("self")
            components = getattr(owner, "__dict__", {})
            if any(components.get(name) is encoder for name in PAIRS):
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
