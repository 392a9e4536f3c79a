"""`fixclip demo`."""

from pathlib import Path
from typing import Annotated

import typer

from fixclip_cli.app import DEFAULT_OUTPUT, DeviceOption, app, read_prompt
from fixclip_cli.pictures import free_name, names_picture, output_files


@app.command(short_help="Long prompts on the embedded model, judged.")
def demo(
    prompt: Annotated[
        str | None, typer.Argument(help="Your own prompt instead of three scenes; - reads standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read your own prompt from a text file.")] = None,
    model: Annotated[
        str, typer.Option(help="A whole model of the scenes world: builtin:scenes, or a folder of the same layout.")
    ] = "builtin:scenes",
    steps: Annotated[int, typer.Option(min=1, max=999, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, max=100.0, help="Guidance scale.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise that every system starts from.")] = 0,
    device: DeviceOption = None,
    output: Annotated[str, typer.Option("--output", "-o", help="A .png file or a folder.")] = (
        f"{DEFAULT_OUTPUT}/demo.png"
    ),
) -> None:
    """Long prompts on the embedded model: stock to the best side by side, each object checked. No download, no GPU."""
    text = read_prompt(prompt, prompt_file) if prompt is not None or prompt_file is not None else None
    (file,) = output_files(output, ["demo"])
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from fixclip_core.device import choose_device
    from fixclip_diffusion import demo as demonstration

    device = choose_device(device)

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    prompts, reason = demonstration.default_prompts(), ""
    if text is not None:
        own, reason = demonstration.own_prompt(text)
        prompts = [own]
        if unknown := ", ".join(demonstration.unknown_words(text)):
            typer.echo(f"Warning: the scenes world has no such words: {unknown}; see docs/scenes.md", err=True)
    shown = demonstration.draw(model, prompts, demonstration.Drawing(steps, guidance, seed=seed), device)
    file = file if names_picture(output) else free_name(file)
    demonstration.write_sheet(shown, file)
    typer.echo(demonstration.format_prompts(shown))
    if shown.is_judged:
        typer.echo(f"\n{demonstration.format_table(shown)}\n\n{demonstration.format_verdicts(shown)}")
    else:
        typer.echo(f"\nThe checker cannot judge pictures of this prompt: {reason}")
    typer.echo(f"\n{file}")
