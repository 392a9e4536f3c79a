"""The command `fixclip`.

Heavy libraries are imported by the commands that need them, so that `fixclip --help` answers at once.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fixclip_cli.core import app

DEFAULT_OUTPUT = Path("outputs")

BaseOption = Annotated[str, typer.Option(help="Stable Diffusion 1.x or 2.x: a folder, a hub name or builtin:scenes.")]
EncoderOption = Annotated[str | None, typer.Option(help="FIX-CLIP or Long-CLIP text encoder: a folder or hub name.")]
AdapterOption = Annotated[str | None, typer.Option(help="Adapter on the text states: a folder or hub name.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """A wrong input is one line on stderr and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error


def parse_size(value: str) -> tuple[int, int]:
    """`512` or `512x768` (width x height) to (width, height).

    Raises:
        typer.BadParameter: not numbers, not multiples of 8, or out of 8..4096.
    """
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{value!r}: give one number or WIDTHxHEIGHT, like 512 or 512x768")
    width, height = int(parts[0]), int(parts[-1])
    if any(side % 8 or not 8 <= side <= 4096 for side in (width, height)):
        raise typer.BadParameter(f"{value!r}: width and height must be multiples of 8 between 8 and 4096")
    return width, height


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the command line, a file, or standard input (`-`).

    Raises:
        typer.BadParameter: none or both were given, the file is not readable UTF-8 text, or the text is empty.
    """
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give a PROMPT (- for standard input) or --prompt-file FILE, one of the two")
    try:
        if prompt_file is not None:
            text = prompt_file.read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if prompt == "-" else str(prompt)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise typer.BadParameter(f"{prompt_file or 'standard input'}: {reason}") from error
    if not text.strip():
        raise typer.BadParameter("the prompt is empty")
    return text.strip()


def output_files(output: Path, names: list[str]) -> list[Path]:
    """Where the pictures go: a name ending in .png is a file (numbered if there are several), else a folder.

    Raises:
        ValueError: another file type, or the folder cannot be made or written to.
    """
    if output.suffix.lower() == ".png":
        files = [output] if len(names) == 1 else [output.with_stem(f"{output.stem}-{name}") for name in names]
    elif output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"output {str(output)!r}: pictures are written as .png, which carries prompt and settings")
    else:
        files = [_free(output, name) for name in names]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=files[0].parent):
            pass  # found out now, and not after drawing
    except OSError as error:
        raise ValueError(f"output {str(output)!r} cannot be written: {error}") from error
    return files


def _free(folder: Path, name: str) -> Path:
    """NAME.png, or NAME-2.png and so on: pictures of an earlier run are not overwritten."""
    tries = (folder / (f"{name}-{count}.png" if count > 1 else f"{name}.png") for count in itertools.count(1))
    return next(file for file in tries if not file.exists())


def save_png(image: Any, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with its prompt and settings as text chunks, in one step: never half a file."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", settings["prompt"])
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt("fixclip", json.dumps(settings, ensure_ascii=False))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False) as file:
        partial = Path(file.name)
        try:
            image.save(file, format="png", pnginfo=info)
            file.close()
            partial.chmod(0o644)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def parameters_text(settings: dict[str, Any]) -> str:
    """The settings in the layout that common Stable Diffusion front ends read from a PNG."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    width, height = settings["size"]
    lines.append(
        f"Steps: {settings['steps']}, CFG scale: {settings['guidance_scale']}, Seed: {settings['seed']}, "
        f"Size: {width}x{height}, Model: {settings['base']}"
    )
    return "\n".join(lines)


def load_pipeline(base: str, encoder: str | None, adapter: str | None, device: str | None, dtype: str | None) -> Any:
    """The pipeline, on the fastest device there is unless one is named."""
    import torch

    from fixclip_diffusion import FixClipStableDiffusionPipeline

    fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = device or fastest
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
    long_prompt: Annotated[
        Literal["windows", "truncate", "overlap_77", "windows_77", "truncate_77"],
        typer.Option(help="More than 248 tokens; the last two are chunking and stock, with the base's own encoder."),
    ] = "windows",
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the fastest there is.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Default: float16 on cuda, else float32.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One sheet: stock (truncated) | chunked | FIX-CLIP, the same seed.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file or a folder.")] = DEFAULT_OUTPUT,
) -> None:
    """Make pictures from a prompt of any length."""
    text = read_prompt(prompt, prompt_file)
    width_height = parse_size(size) if size else None
    with user_errors():
        from fixclip_diffusion import builtin

        pipe = load_pipeline(base, encoder, adapter, device, dtype)
        if compare:
            same = encoder is None and adapter is None and builtin.base_of(base) == base
            reference = pipe if same else load_pipeline(builtin.base_of(base), None, None, device, dtype)
            systems = comparison(reference, pipe)
        else:
            systems = {"FIX-CLIP": lambda **kwargs: pipe(long_prompt=long_prompt, **kwargs)}
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
            "long_prompt": long_prompt,
            "scheduler": type(pipe.scheduler).__name__,
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "version": version("fixclip"),
        }
        files = output_files(output, [f"seed{seed + index}" for index in range(num)])
        typer.echo(pipe.token_report(text).describe(long_prompt))
        if negative:
            typer.echo(f"negative prompt: {pipe.token_report(negative).describe(long_prompt)}")
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
            return reference(long_prompt="truncate_77", **kwargs)
        finally:
            diffusers_logging.set_verbosity(verbosity)

    return {
        "stock, cut at 77 tokens": stock,
        "chunks of 77 tokens": lambda **kwargs: reference(long_prompt="windows_77", **kwargs),
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


def label_row(images: list[Any], labels: list[str], smallest: int = 256) -> Any:
    """Pictures side by side, each under its label; tiny ones are enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1, -(-smallest // images[0].width))
    width, height = images[0].width * scale, images[0].height * scale
    font_size = max(14, width // 20)
    font = ImageFont.load_default(size=font_size)
    bar, gap = 2 * font_size, 8
    sheet = Image.new("RGB", (len(images) * (width + gap) - gap, height + bar), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = index * (width + gap)
        draw.text((left + width // 2, bar // 2), label, fill="black", font=font, anchor="mm")
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, bar))
    return sheet


@app.command("evaluate-images")
def evaluate_images(
    prompts: Annotated[str, typer.Argument(help="Text file with a prompt a line, .jsonl with `prompt`, or scenes:N.")],
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoder: EncoderOption = None,
    adapter: AdapterOption = None,
    lora: Annotated[str | None, typer.Option(help="LoRA for the UNet, as load_lora_weights reads it.")] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="NAME:encoder=...,adapter=...,lora=...,long_prompt=...; repeat. Default: all that is given."),
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
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.json, sheet.png and images.")] = (
        DEFAULT_OUTPUT / "evaluation"
    ),
) -> None:
    """Do pictures follow their prompts? Systems side by side, by sentence before and after the 77th token."""
    width_height = parse_size(size) if size else None
    if width_height and width_height[0] != width_height[1]:
        raise typer.BadParameter(f"size {size}: pictures to compare are square, give one number")
    with user_errors():
        import torch

        from fixclip_core.evaluation.retrieval import load_encoder
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
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


@app.command()
def tokens(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file.")] = None,
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
) -> None:
    """Count a prompt's tokens and show where a stock encoder stops reading. Needs the base's tokenizer only."""
    text = read_prompt(prompt, prompt_file)
    with user_errors():
        from huggingface_hub import hf_hub_download

        from fixclip_diffusion import builtin
        from fixclip_diffusion.conditioning import token_report
        from fixclip_diffusion.text_encoder import FixClipTokenizer, check_folder_or_hub_name

        base = builtin.resolve(builtin.base_of(base))
        check_folder_or_hub_name("base", base)
        if not Path(base).is_dir():  # one file first: the tokenizer alone would try a dozen before it gives up
            try:
                hf_hub_download(base, "tokenizer/tokenizer_config.json")
            except Exception as error:
                raise ValueError(f"base {base!r}: its tokenizer could not be read from the hub ({error})") from error
        typer.echo(token_report(FixClipTokenizer.from_pretrained(base, subfolder="tokenizer"), text))


@app.command()
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
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file or a folder.")] = (
        DEFAULT_OUTPUT / "demo.png"
    ),
) -> None:
    """Long prompts on the embedded model: stock to FIX-CLIP side by side, each object checked. No download, no GPU."""
    text = read_prompt(prompt, prompt_file) if prompt is not None or prompt_file is not None else None
    with user_errors():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from fixclip_diffusion import demo as demonstration

        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()
            library.set_verbosity_error()
        prompts, reason = demonstration.default_prompts(), ""
        if text is not None:
            own, reason = demonstration.own_prompt(text)
            prompts = [own]
            if unknown := ", ".join(demonstration.unknown_words(text)):
                typer.echo(f"Warning: the scenes world has no such words: {unknown}; see docs/scenes.md", err=True)
        (file,) = output_files(output, ["demo"])
        shown = demonstration.draw(model, prompts, demonstration.Drawing(steps, guidance, seed=seed))
        demonstration.write_sheet(shown, file)
        typer.echo(demonstration.format_prompts(shown))
        if shown.is_judged:
            typer.echo(f"\n{demonstration.format_table(shown)}\n\n{demonstration.format_verdicts(shown)}")
        else:
            typer.echo(f"\nThe checker cannot judge pictures of this prompt: {reason}")
        typer.echo(f"\n{file}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fixclip {version('fixclip')}")
        raise typer.Exit


@app.callback()
def fixclip(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Long prompts in Stable Diffusion, and the long-text CLIP behind them."""


TRAINING_LIBRARIES = ("matplotlib", "omegaconf", "open_clip", "psutil", "pydantic", "tensorboard", "webdataset")


def main() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in TRAINING_LIBRARIES:
            raise
        typer.echo(f"error: this command needs {library}: pip install 'fixclip[train]'", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
