"""The configuration of a long text encoder, and where one is read from; no weights are.

It says all that decides how prompts are read, so that a report of tokens needs a few kilobytes of a model.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPTextConfig

from fixclip_core.check import LoadError, check_folder_or_hub_name, loading
from fixclip_core.model.positional import stretched_length
from fixclip_core.weights.kinds import what_is_in
from fixclip_diffusion.conditioning import CLIP_CONTEXT_LENGTH

CLIP_EOS_TOKEN_ID = 49407
CLASS_FIELDS = ("model_type", "architectures", "transformers_version", "dtype")  # of a configuration's own class


@strict
class FixClipTextConfig(CLIPTextConfig):
    """`CLIPTextConfig` plus what a long text encoder needs.

    Attributes:
        short_position_embeddings: rows of the original table of positions, kept for short texts; 0 without.
        adapter: configuration of the `TextAdapter`, or None.
        conditioning: how pipelines read prompts with this encoder unless they are told otherwise, a name in
            `conditioning.CONDITIONINGS`; None: `overlap` with the original positions, else `one_pass`.
        padding: of the hidden states behind a text: "mask" makes them 0, and a UNet of our pipelines does not attend to
            them; "keep" leaves them as they are, as encoders of version 0.1 and other projects' were trained.
        hidden_state: which hidden state the UNet reads, and so which one adapter and padding are about: "last" behind
            the final LayerNorm (Stable Diffusion 1 and 2), "penultimate", which enters the last layer (Stable Diffusion
            XL).
        short_text_model: configuration of the base's own `CLIPTextModel` that reads passes of up to 77 tokens, or None.
        short_weights: name of the base whose text encoder has that model's weights, where they are not in the encoder's
            own file. `from_pretrained` loads them from there, and `save_pretrained` then writes them with the others.
        delta_rank: rank of the change of the base's matrices that is left out for texts of up to 77 tokens; 0 without.
    """

    model_type = "fixclip_text_model"

    short_position_embeddings: int = 0
    adapter: dict | None = None
    conditioning: str | None = None
    padding: str = "keep"
    hidden_state: str = "last"
    short_text_model: dict | None = None
    short_weights: str | None = None
    delta_rank: int = 0


AutoConfig.register(FixClipTextConfig.model_type, FixClipTextConfig, exist_ok=True)


def long_config(
    config: CLIPTextConfig,
    keep: int = 20,
    ratio: int = 4,
    num_hidden_layers: int | None = None,
    hidden_state: str | None = None,
) -> FixClipTextConfig:
    """The configuration of the long text encoder that `from_clip` makes of a stock CLIP.

    Args:
        config: of a `CLIPTextModel`; one of at most 77 positions is stretched.
        keep, ratio, num_hidden_layers, hidden_state: see `LongTextEncoder.from_clip`.

    Raises:
        ValueError: more layers are asked for than the model has; keep or ratio out of range.
    """
    layers = config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"num_hidden_layers={layers}: the text encoder has {config.num_hidden_layers}")
    positions = config.max_position_embeddings
    stretch = positions <= CLIP_CONTEXT_LENGTH
    values = {name: value for name, value in config.to_dict().items() if name not in CLASS_FIELDS}
    if config.eos_token_id == 2:
        # The legacy value makes transformers pool at the largest id, which an added token would be.
        values["eos_token_id"] = min(CLIP_EOS_TOKEN_ID, config.vocab_size - 1)
    values.update(
        num_hidden_layers=layers,
        max_position_embeddings=stretched_length(positions, keep, ratio) if stretch else positions,
        short_position_embeddings=positions if stretch else 0,
        padding=getattr(config, "padding", "mask" if stretch else "keep"),
        conditioning=getattr(config, "conditioning", None),
        hidden_state=hidden_state or getattr(config, "hidden_state", "last"),
    )
    return FixClipTextConfig(**values)


_CONFIG_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)


def load_clip_text_config(name: str, **kwargs: Any) -> CLIPTextConfig | FixClipTextConfig:
    """The configuration of the CLIP text model in a folder or hub repository; no weights are read.

    Raises:
        ValueError: there is no readable config.json, or it describes something else.
    """
    hub_kwargs = {key: kwargs[key] for key in _CONFIG_KWARGS if key in kwargs}
    where = describe_source(name, kwargs)
    check_folder_or_hub_name("text encoder", name)
    folder = Path(name) / (kwargs.get("subfolder") or "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        is_run = (folder / "model" / "config.json").is_file()
        hint = f"; fixclip export {name} FOLDER --format diffusers makes it of a run" if is_run else ""
        raise LoadError(f"text encoder {where}: no readable config.json there{hint or what_is_in(folder)}")
    with loading(f"text encoder {where}: no readable config.json there"):
        values, _ = CLIPTextConfig.get_config_dict(name, **hub_kwargs)
    if not values:
        raise LoadError(f"text encoder {where}: no config.json there")
    kind = values.get("model_type")
    with loading(f"text encoder {where}: its config.json is damaged"):
        if kind == FixClipTextConfig.model_type:
            return FixClipTextConfig.from_dict(values)
        if kind in ("clip_text_model", "clip"):
            return CLIPTextConfig.from_pretrained(name, **hub_kwargs)
    if {"clip", "preprocess"} <= values.keys():
        raise LoadError(
            f"text encoder {where}: it is a FixClip of two towers; fixclip export {name} FOLDER --format diffusers "
            "makes the text encoder of it"
        )
    other = f"it is of the class {values['_class_name']}; its " if "_class_name" in values else ""
    raise LoadError(
        f"text encoder {where}: {other}model_type is {kind!r}; valid are {FixClipTextConfig.model_type}, "
        "clip_text_model and clip"
    )


def encoder_subfolder(name: str, component: str = "text_encoder") -> str | None:
    """The folder in `name` that holds the text encoder, None where that is `name` itself or a hub name.

    `fixclip export` writes text_encoder/ beside tokenizer/; their parent folder is welcome as encoder= too.
    """
    folders = (component, "text_encoder")
    return next((part for part in folders if (Path(name) / part / "config.json").is_file()), None)


def describe_source(name: str, kwargs: dict[str, Any]) -> str:
    """A folder or hub name with the subfolder that `from_pretrained` was given, for errors."""
    subfolder = kwargs.get("subfolder")
    return repr(f"{name}/{subfolder}" if subfolder else name)
