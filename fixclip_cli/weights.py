"""`fixclip convert` and `fixclip export`: weights from and to other formats."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fixclip_cli.app import ModelNameOption, app
from fixclip_core.files import new_folder

TEXT_FIELDS = ("hidden_act", "num_attention_heads")  # what weights alone may not tell of a CLIPTextConfig


@app.command(short_help="Make a FixClip folder of any CLIP.")
def convert(
    source: Annotated[
        str, typer.Argument(help="A CLIP (OpenAI, open_clip, transformers, Long-CLIP), or a file of text encoders.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    model_name: ModelNameOption = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=f"A field of FixClipConfig, e.g. num_prompts=0; of text encoders alone {' or '.join(TEXT_FIELDS)}.",
        ),
    ] = None,
) -> None:
    """Make a FixClip folder of any CLIP; one of 77 tokens is stretched to 248.

    A file of text encoders alone (clip_l, clip_g, a whole Stable Diffusion checkpoint) becomes folders for diffusers.
    """
    from fixclip_core.weights.load import activation_of, load_fixclip
    from fixclip_core.weights.text_encoder import holds_text_encoders_alone
    from fixclip_core.weights.write import write_text_encoders

    if Path(source).is_file() and holds_text_encoders_alone(source):
        values = parse_fields(field or [], TEXT_FIELDS, f"; {source} holds no image tower, so it makes no FixClip")
        if model_name and "hidden_act" in values:
            raise ValueError("--model-name and --set hidden_act= both name the activation: leave one out")
        activation = {"hidden_act": activation_of(model_name)} if model_name else {}
        with new_folder(output):
            lines = write_text_encoders(source, output, **activation, **values)
        for line in lines:
            typer.echo(line)
        return
    fields = parse_fields(field or [], fixclip_fields())
    with new_folder(output):
        model = load_fixclip(source, model_name=model_name, **fields)
        model.save_pretrained(output)
    typer.echo(f"{output}: {model.config.context_length} tokens, {model.config.num_prompts} regional prompts")


def fixclip_fields() -> list[str]:
    """The fields of FixClipConfig that a CLIP which becomes one can be given."""
    from dataclasses import fields

    from fixclip_core.model.config import FixClipConfig

    return sorted({field.name for field in fields(FixClipConfig)} - {"clip", "preprocess", "context_length"})


def parse_fields(pairs: list[str], known: Sequence[str], why: str = "") -> dict[str, Any]:
    """NAME=VALUE strings to values by name; a value is JSON where it can be, else text.

    Args:
        pairs: as they were typed.
        known: the names that there are.
        why: what the error adds to them.

    Raises:
        ValueError: no `=`, or an unknown name.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {pair}: expected NAME=VALUE with a name of {', '.join(known)}{why}")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


@app.command(short_help="Write an encoder in the formats of other libraries.")
def export(
    run: Annotated[Path, typer.Argument(help="A training run's folder, or a FixClip folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="fixclip, transformers, diffusers, open_clip, clip_l, clip_g or delta."),
    ] = None,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    short_weights: Annotated[
        str | None,
        typer.Option(
            help="The Stable Diffusion whose text encoder reads short prompts: folder, hub or built-in name, or a file."
        ),
    ] = None,
    by_name: Annotated[
        bool,
        typer.Option("--by-name", help="Name that base in config.json, in place of a copy of its text encoder."),
    ] = False,
) -> None:
    """Write an encoder in the formats of transformers, diffusers, open_clip and ComfyUI (all by default)."""
    import torch

    from fixclip_core.weights.load import find_fixclip, load_fixclip
    from fixclip_core.weights.write import all_or_nothing
    from fixclip_core.weights.write import export as write

    if find_fixclip(run) is None:
        hint = "fixclip convert makes one of a CLIP in another format"
        if str(run).startswith("builtin:"):
            hint = "a built-in name has none; fixclip convert builtin:scenes/clip FOLDER makes one"
        elif not run.exists():
            hint = "there is no such folder"
        elif find_fixclip(run / "best"):
            hint = f"the best so far is in {run / 'best'}"
        raise ValueError(f"{run}: no FixClip there; expected model/ or config.json and model.safetensors; {hint}")
    if short_weights is not None and "diffusers" not in (formats or ["diffusers"]):
        raise ValueError("--short-weights: only the format diffusers holds the base's weights beside the trained ones")
    if by_name and short_weights is None:
        raise ValueError("--by-name: name the base with --short-weights")
    base = None
    if short_weights is not None:
        from fixclip_diffusion.text_encoder import FixClipTextEncoder, base_text_model

        base = base_text_model(short_weights, "--short-weights")
    with new_folder(output), all_or_nothing(output) as partial:
        lines = write(load_fixclip(run), partial, formats or None, getattr(torch, dtype))
        if base is not None:
            encoder = FixClipTextEncoder.from_pretrained(partial / "text_encoder", dtype=getattr(torch, dtype))
            encoder.set_short_weights(base)
            if by_name and short_weights is not None:
                path = Path(short_weights)  # found from any other folder, too
                encoder.name_short_weights(str(path.resolve()) if path.exists() else short_weights)
            encoder.save_pretrained(partial / "text_encoder")
            whose = f"the text encoder of {short_weights}" + (", which is needed to load it" if by_name else "")
            lines.append(f"text_encoder/: prompts of up to 77 tokens are read by {whose}")
            with (partial / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\n{lines[-1]}.\n")
    for line in lines:
        typer.echo(line)
