"""`fixclip generate` and `fixclip tokens`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fixclip_cli.app import DEFAULT_OUTPUT, AdapterOption, BaseOption, EncoderOption, app, parse_size, read_prompt
from fixclip_cli.pictures import label_row, output_files, save_png


def load_pipeline(base: str, encoder: str | None, adapter: str | None, device: str | None, dtype: str | None) -> Any:
    """The pipeline, on the fastest device there is unless one is named."""
    import torch

    from fixclip_core.device import best_device
    from fixclip_diffusion import FixClipStableDiffusionPipeline

    device = device or best_device()
    torch_dtype = getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))
    pipe = FixClipStableDiffusionPipeline.from_pretrained(base, encoder=encoder, adapter=adapter, dtype=torch_dtype)
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, of any length; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file.")] = None,
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoder: EncoderOption = None,
    adapter: AdapterOption = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show; of any length too.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=999, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, max=100.0, help="Guidance scale.")] = 7.5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Picture i starts from seed + i.")] = 0,
    size: Annotated[str | None, typer.Option(help="512 or 512x768 (width x height); default: the model's own.")] = None,
    num: Annotated[int, typer.Option(min=1, max=1000, help="Number of pictures.")] = 1,
    conditioning: Annotated[
        str | None,
        typer.Option(
            "--conditioning",
            "--long-prompt",
            help="How more than 77 tokens are read: overlap, one_pass, chunks or stock; default: as the encoder says.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the fastest there is.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Default: float16 on cuda, else float32.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One sheet: stock (truncated) | chunked | FIX-CLIP, the same seed.")
    ] = False,
    output: Annotated[str, typer.Option("--output", "-o", help="A .png file or a folder.")] = DEFAULT_OUTPUT,
) -> None:
    """Make pictures from a prompt of any length."""
    text = read_prompt(prompt, prompt_file)
    width_height = parse_size(size) if size else None
    files = output_files(output, [f"seed{seed + index}" for index in range(num)])
    from importlib.metadata import version

    from fixclip_diffusion import builtin

    pipe = load_pipeline(base, encoder, adapter, device, dtype)
    pipe.conditioning = conditioning
    if compare:
        same = encoder is None and adapter is None and builtin.base_of(base) == base
        reference = pipe if same else load_pipeline(builtin.base_of(base), None, None, device, dtype)
        systems = comparison(reference, pipe)
    else:
        systems = {"FIX-CLIP": pipe}
    settings = {
        "prompt": text,
        "negative_prompt": negative,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "size": width_height or default_size(pipe),
        "base": base,
        "encoder": encoder,
        "adapter": adapter,
        "conditioning": pipe.conditioning,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "version": version("fixclip"),
    }
    typer.echo(pipe.token_report(text))
    if negative:
        typer.echo(f"negative prompt: {pipe.token_report(negative)}")
    for index, file in enumerate(files):
        draw_and_save(systems, {**settings, "seed": seed + index}, file)


def comparison(reference: Any, pipe: Any) -> dict[str, Callable[..., Any]]:
    """Stock, chunked and ours as functions of the same arguments; `reference` has the base's own encoder."""
    from diffusers.utils import logging as diffusers_logging

    def stock(**kwargs: Any) -> Any:
        """Without the warning: that it drops the end is what this column shows."""
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            return reference(conditioning="stock", **kwargs)
        finally:
            diffusers_logging.set_verbosity(verbosity)

    return {
        "stock, cut at 77 tokens": stock,
        "chunks of 77 tokens": lambda **kwargs: reference(conditioning="chunks", **kwargs),
        "FIX-CLIP": lambda **kwargs: pipe(**kwargs),
    }


def default_size(pipe: Any) -> tuple[int, int]:
    """Width and height that the UNet was trained with, in pixels."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return side, side


def draw(system: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """One picture of one system; the same settings give the same starting noise to each."""
    import torch

    width, height = settings["size"]
    return system(
        prompt=settings["prompt"],
        negative_prompt=settings["negative_prompt"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(settings["seed"]),
    ).images[0]


def draw_and_save(systems: dict[str, Callable[..., Any]], settings: dict[str, Any], file: Path) -> list[Any]:
    """Make one picture of each system and write it, or the row of them, as soon as it is there."""
    images = [draw(system, settings) for system in systems.values()]
    image = images[0] if len(images) == 1 else label_row(images, list(systems))
    save_png(image, file, {**settings, "systems": list(systems)})
    typer.echo(file)
    return images


@app.command(short_help="Count a prompt's tokens.")
def tokens(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file.")] = None,
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
) -> None:
    """Count a prompt's tokens and show where a stock encoder stops reading. Needs the base's tokenizer only."""
    text = read_prompt(prompt, prompt_file)
    from huggingface_hub import hf_hub_download

    from fixclip_diffusion import builtin
    from fixclip_diffusion.text_encoder import check_folder_or_hub_name
    from fixclip_diffusion.token_report import token_report
    from fixclip_diffusion.tokenizer import FixClipTokenizer

    base = builtin.resolve(builtin.base_of(base))
    check_folder_or_hub_name("base", base)
    if not Path(base).is_dir():  # one file first: the tokenizer alone would try a dozen before it gives up
        try:
            hf_hub_download(base, "tokenizer/tokenizer_config.json")
        except Exception as error:
            raise ValueError(f"base {base!r}: its tokenizer could not be read from the hub ({error})") from error
    typer.echo(token_report(FixClipTokenizer.from_pretrained(base, subfolder="tokenizer"), text))
