"""`fixclip evaluate-images`."""

from pathlib import Path
from typing import Annotated

import typer

from fixclip_cli.app import DEFAULT_OUTPUT, AdapterOption, BaseOption, EncoderOption, app, parse_size, refuse


@app.command("evaluate-images", short_help="Do pictures follow their prompts? Systems side by side.")
def evaluate_images(
    ctx: typer.Context,
    prompts: Annotated[str, typer.Argument(help="Text file with a prompt a line, .jsonl with `prompt`, or scenes:N.")],
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoder: EncoderOption = None,
    adapter: AdapterOption = None,
    lora: Annotated[str | None, typer.Option(help="LoRA for the UNet, as load_lora_weights reads it.")] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="NAME:encoder=...,adapter=...,lora=...,conditioning=...; repeat. Default: all given."),
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="CLIP for image-text scores, as for `evaluate`.")] = None,
    check_scenes: Annotated[
        bool | None, typer.Option(help="Judge pictures by the exact checker. Default: if all prompts are scenes.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=999, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, max=100.0, help="Guidance scale.")] = 7.5,
    size: Annotated[str | None, typer.Option(help="Side of the square pictures; default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="First seed, the same for every system.")] = 0,
    num: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each prompt and system.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures drawn at a time.")] = 1,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.json, sheet.png and images.")
    ] = Path(f"{DEFAULT_OUTPUT}/evaluation"),
) -> None:
    """Do pictures follow their prompts? Systems side by side, by sentence before and after the 77th token."""
    width_height = parse_size(size) if size else None
    if width_height and width_height[0] != width_height[1]:
        raise ValueError(f"size {size}: pictures to compare are square, give one number")
    if system:
        refuse(ctx, "does not act beside --system, which names its own", "encoder", "adapter", "lora")
    import torch

    from fixclip_core.device import best_device
    from fixclip_core.evaluation.encoders import load_encoder
    from fixclip_diffusion import builtin
    from fixclip_diffusion.evaluation import generate, report, run
    from fixclip_diffusion.evaluation.prompts import read_prompts

    # Prompts and systems first: a wrong one should not cost loading a model.
    read = read_prompts(prompts, check_scenes)
    systems = [generate.parse_system(text) for text in system or ()]
    if not systems:
        parts = builtin.complete(base, encoder, adapter, lora)
        systems = generate.default_systems(parts.encoder, parts.adapter, parts.lora)
    if scorer is None and read[0].scene is None:
        typer.echo("No --scorer and no captions of scenes: pictures will be drawn and nothing scored.", err=True)
    device = best_device()
    found = run.evaluate_images(
        base,
        read,
        systems,
        generate.Drawing(steps, guidance, width_height and width_height[0], seed, num, batch_size=batch_size),
        scorer=load_encoder(scorer, device=device) if scorer else None,
        device=device,
        dtype=torch.float16 if device == "cuda" else torch.float32,
        folder=output,
    )
    typer.echo(report.format_table(found))
    typer.echo(f"{output / 'report.json'}, {output / 'sheet.png'}, {output / 'images'}")
