"""The pipeline for a base of whatever family: Stable Diffusion 1, 2 or XL, a folder, a hub name or one file."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fixclip_core.weights.files import checkpoint_file, open_weights
from fixclip_core.weights.kinds import what_it_is
from fixclip_core.weights.text_encoder import text_encoders_in
from fixclip_diffusion import builtin
from fixclip_diffusion.families import STABLE_DIFFUSION, Family
from fixclip_diffusion.loading import HUB_KWARGS
from fixclip_diffusion.pipeline import FixClipStableDiffusionPipeline
from fixclip_diffusion.pipeline_xl import FixClipStableDiffusionXLPipeline

LongPromptPipeline = FixClipStableDiffusionPipeline | FixClipStableDiffusionXLPipeline


def pipeline_class(base: str | Path, **hub_kwargs: Any) -> type[LongPromptPipeline]:
    """The class for a base, from its model_index.json or the header of its file.

    Args:
        base: folder, hub name, built-in name, or a checkpoint in one file, here or by its URL.
        **hub_kwargs: token, revision, cache_dir and so on.

    Raises:
        ValueError: a file without a text encoder of Stable Diffusion. What is wrong with a folder or a hub name is said
            by the class's own `from_pretrained`.
    """
    base = _fetched(base, hub_kwargs)
    if Path(base).is_file():
        held = text_encoders_in(base)
        if not held:
            kind = what_it_is(open_weights(base).shapes)
            raise ValueError(f"base {str(base)!r}: there is no text encoder in this file, it is {kind}")
        return FixClipStableDiffusionXLPipeline if "g" in held else FixClipStableDiffusionPipeline
    try:
        index = DiffusionPipeline.load_config(builtin.resolve(builtin.base_of(base)), **hub_kwargs)
    except OSError:
        return FixClipStableDiffusionPipeline
    return FixClipStableDiffusionXLPipeline if "text_encoder_2" in index else FixClipStableDiffusionPipeline


def _fetched(base: str | Path, hub_kwargs: dict[str, Any]) -> str | Path:
    """The file of a URL; any other base as it is."""
    return checkpoint_file(str(base), hub_kwargs) if "://" in str(base) else base


# What a pipeline of each family is built with where pictures of training and evaluation are drawn.
_PLAIN_OPTIONS: dict[type, dict[str, Any]] = {
    FixClipStableDiffusionPipeline: {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    FixClipStableDiffusionXLPipeline: {"add_watermarker": False},
}


def load_plain_pipeline(base: str | Path, **kwargs: Any) -> LongPromptPipeline:
    """`load_pipeline` without safety checker and watermark, as training reads a base.

    Raises:
        ValueError: see `load_pipeline`.
    """
    return load_pipeline(base, **_PLAIN_OPTIONS[pipeline_class(base)], **kwargs)


def pipeline_of(
    family: Family, components: dict[str, Any], zeros_for_empty: bool = False, **reading: Any
) -> LongPromptPipeline:
    """The pipeline of a family, made of components in memory, without safety checker (unless it is among them) and
    watermark.

    Args:
        family: of the base.
        components: text encoders, tokenizers, UNet, VAE and scheduler.
        zeros_for_empty: for Stable Diffusion XL: `force_zeros_for_empty_prompt`.
        **reading: conditioning and weights, see the pipelines.
    """
    chosen: Any = FixClipStableDiffusionPipeline
    options: dict[str, Any] = {}
    if family is not STABLE_DIFFUSION:
        chosen, options = FixClipStableDiffusionXLPipeline, {"force_zeros_for_empty_prompt": zeros_for_empty}
    return chosen(**{**_PLAIN_OPTIONS[chosen], **components}, **options, **reading)


def load_pipeline(base: str | Path, **kwargs: Any) -> LongPromptPipeline:
    """`from_pretrained` or, for a file, `from_single_file` of the class that fits the base.

    Args:
        base: see `pipeline_class`.
        **kwargs: encoder, encoder_2, adapter, conditioning, weights, and those of diffusers.

    Raises:
        ValueError: see the pipelines.
    """
    hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
    base = _fetched(base, hub_kwargs)
    chosen = pipeline_class(base, **hub_kwargs)
    if Path(base).is_file():
        kwargs["torch_dtype"] = kwargs.pop("dtype", None) or kwargs.get("torch_dtype")
        return chosen.from_single_file(base, **{key: value for key, value in kwargs.items() if value is not None})
    return chosen.from_pretrained(base, **kwargs)
