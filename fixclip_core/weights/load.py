"""Models out of weights: one function for a FixClip, whatever it starts from."""

from pathlib import Path
from typing import Any

import open_clip
import torch

from fixclip_core.check import check_finite, check_shapes, check_tokenizer_options, loading, module_shapes
from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.read import ClipCheckpoint, open_clip_config, read_clip, read_json, refuse_model_name

CLIP_CONTEXT_LENGTH = 77


def load_fixclip(
    source: str | Path,
    *,
    model_name: str | None = None,
    pretrained: str | None = None,
    cache_dir: str | None = None,
    **config_fields: Any,
) -> FixClip:
    """Load a FixClip from its own folder, or make one from any other CLIP.

    A CLIP of 77 positions is stretched. One that was stretched already (Long-CLIP, an exported FIX-CLIP) keeps
    its positions.

    Args:
        source: a folder of `FixClip.save_pretrained` or of a training run (or `best` in it); any file, folder or
            built-in name that `read_clip` knows; or a model of open_clip: "ViT-B-16", "hf-hub:owner/name" or
            "local-dir:folder".
        model_name: see `read_clip`.
        pretrained: open_clip's weight tag or a file, for a model of open_clip; None starts it from random weights.
        cache_dir: where open_clip keeps downloads.
        config_fields: fields of `FixClipConfig` for a CLIP that becomes a FixClip, e.g. `num_prompts=0`; `ratio` is
            for CLIPs of 77 positions.

    Raises:
        LoadError: see `read_clip` and `create_open_clip`.
        ValueError: a FixClip has other fields than given, `pretrained` for weights on disk, or the architecture is none
            that FixClip can hold.
    """
    check_pretrained(source, pretrained)
    if find_fixclip(source) or is_open_clip_name(source):
        refuse_model_name(source, model_name)
    if folder := find_fixclip(source):
        model = FixClip.from_pretrained(folder)
        _check_fields(source, model, config_fields)
        return model
    if is_open_clip_name(source):
        clip, model_config, preprocess = create_open_clip(str(source), pretrained, cache_dir)
        return FixClip.from_clip(clip, model_config, preprocess, **config_fields)
    checkpoint = read_clip(source, model_name)
    if checkpoint.context_length > CLIP_CONTEXT_LENGTH:
        config_fields["ratio"] = 1
    clip = build_clip(checkpoint)
    return FixClip.from_clip(clip, checkpoint.model_config, checkpoint.preprocess, **config_fields)


def find_fixclip(source: str | Path) -> Path | None:
    """The folder that `FixClip.save_pretrained` wrote: `source`, or `model` in a training run's folder."""
    for folder in (Path(source), Path(source) / "model"):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            if "clip" in config and "preprocess" in config:
                return folder
    return None


def _check_fields(source: str | Path, model: FixClip, config_fields: dict[str, Any]) -> None:
    others = [
        f"{key}={getattr(model.config, key)!r}, not {value!r}"
        for key, value in config_fields.items()
        if getattr(model.config, key) != value
    ]
    if others:
        raise ValueError(
            f"{source}: this FixClip has {'; '.join(others)}; fields of a FixClip cannot be changed: leave them out or "
            "make another of the CLIP that it was made of (fixclip convert CLIP FOLDER --set NAME=VALUE)"
        )


def check_pretrained(source: str | Path, pretrained: str | None) -> None:
    """Refuse a weight tag beside weights on disk, which would win.

    Raises:
        ValueError: `pretrained` is given and `source` is no model of open_clip.
    """
    if pretrained is not None and not is_open_clip_name(source):
        raise ValueError(f"pretrained={pretrained}: it chooses the weights of an open_clip model, {source} is none")


def is_open_clip_name(source: str | Path) -> bool:
    """Whether it is neither a path nor a built-in name; open_clip then says what it knows."""
    name = str(source)
    if name.startswith(("hf-hub:", "local-dir:")):
        return True
    return not Path(name).exists() and name.replace("/", "-") in open_clip.list_models()


def create_open_clip(
    name: str, pretrained: str | None = None, cache_dir: str | None = None
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Let open_clip load one of its models, at the model's own context length.

    Args:
        name: "ViT-B-16" (or OpenAI's spelling "ViT-B/16"), "hf-hub:owner/name" or "local-dir:folder".
        pretrained: a weight tag or a file; None for random weights, except behind a prefix.
        cache_dir: where downloads are kept.

    Returns:
        The model, its model config, its preprocess config.

    Raises:
        LoadError: name or tag are unknown, the download fails, a weight is not finite, or the configuration has
            options for its tokenizer that are not open_clip's.
    """
    if not name.startswith(("hf-hub:", "local-dir:")):
        name = name.replace("/", "-")
    with loading(f"cannot load the open_clip model {name!r}, {pretrained!r}"):
        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        clip = open_clip.create_model(
            name,
            pretrained=pretrained,
            # A tag trained with QuickGELU is wrong with GELU; open_clip only warns.
            force_quick_gelu=bool(tag.get("quick_gelu")),
            cache_dir=cache_dir,
        )
        check_finite(clip, name)
        config = open_clip.get_model_config(name)
        check_tokenizer_options(config["text_cfg"])
        return clip, config, open_clip.get_model_preprocess_cfg(clip)


def activation_of(model_name: str) -> str:
    """transformers' name of the activation that a model of open_clip has: "quick_gelu" or "gelu".

    Raises:
        ValueError: open_clip has no such model.
    """
    config = open_clip_config(model_name)
    return "quick_gelu" if config.get("quick_gelu") else "gelu"


def build_clip(checkpoint: ClipCheckpoint) -> open_clip.CLIP:
    """Build the `open_clip.CLIP` of a checkpoint, in evaluation mode and at the checkpoint's context length.

    Raises:
        LoadError: weights and architecture do not fit each other.
    """
    config = checkpoint.model_config
    arguments = (config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"]))
    what = f"the weights ({checkpoint.format}) do not fit their architecture"
    with loading(what):
        with torch.device("meta"):  # a wrong width is found before memory is asked for
            expected = module_shapes(open_clip.CLIP(*arguments, quick_gelu=config["quick_gelu"]))
        check_shapes(expected, {name: tensor.shape for name, tensor in checkpoint.state_dict.items()}, what)
        clip = open_clip.CLIP(*arguments, quick_gelu=config["quick_gelu"])
        clip.load_state_dict(checkpoint.state_dict)
    return clip.eval()
