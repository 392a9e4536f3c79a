"""`fixclip generate` and `fixclip tokens`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fixclip_cli.app import (
    DEFAULT_OUTPUT,
    AdapterOption,
    BaseOption,
    ConditioningOption,
    DeviceOption,
    EmbeddingOption,
    Encoder2Option,
    EncoderOption,
    LoraOption,
    SchedulerOption,
    WeightsOption,
    app,
    check_text,
    is_given,
    parse_size,
    read_prompt,
    refuse,
)
from fixclip_cli.models import (
    ModelOptions,
    base_options,
    embedding_tokens,
    has_adapter,
    has_lora,
    has_own_parts,
    load_pipeline,
    offer_builtin,
)
from fixclip_cli.pictures import label_row, names_picture, options_of, output_files, read_settings, save_png


def _draw_again(ctx: typer.Context, picture: Path | None) -> Path | None:
    """The settings of a picture become the defaults of all options."""
    if picture is not None:
        ctx.default_map = {**(ctx.default_map or {}), **options_of(read_settings(picture))}
    return picture


@app.command()
def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt, of any length; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Many prompts: a text file with one a line, or .jsonl with `prompt`.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_draw_again, is_eager=True, help="Draw a picture again: its settings, but for options given here."
        ),
    ] = None,
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoder: EncoderOption = None,
    encoder_2: Encoder2Option = None,
    adapter: AdapterOption = None,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show; of any length too.")] = "",
    weights: WeightsOption = None,
    conditioning: ConditioningOption = None,
    steps: Annotated[int, typer.Option(min=1, max=999, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, max=100.0, help="Guidance scale.")] = 7.5,
    scheduler: SchedulerOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Picture i starts from seed + i.")] = 0,
    size: Annotated[str | None, typer.Option(help="512 or 512x768 (width x height); default: the model's own.")] = None,
    num: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each prompt.")] = 1,
    device: DeviceOption = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Default: float16 on cuda, else float32.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="One sheet, the same seed: stock | chunks | overlap | the encoder's own, if trained."
        ),
    ] = False,
    output: Annotated[str, typer.Option("--output", "-o", help="A .png file or a folder.")] = DEFAULT_OUTPUT,
) -> None:
    """Make pictures from prompts of any length."""
    texts = _texts(ctx, prompt, prompt_file, prompts)
    check_text(negative, "negative prompt")
    if negative and guidance <= 1 and (is_given(ctx, "negative") or is_given(ctx, "guidance")):
        raise ValueError(f"--negative acts with a --guidance above 1 only, and it is {guidance:g}")
    if compare:
        refuse(ctx, "does not act with --compare, which draws with each of them", "conditioning")
    width_height = parse_size(size) if size else None
    numbers = [""] if prompts is None else [f"{index:05d}-" for index in range(len(texts))]
    files = output_files(output, [f"{number}seed{seed + i}" for number in numbers for i in range(num)])
    options = ModelOptions(
        base=base,
        encoder=encoder,
        encoder_2=encoder_2,
        adapter=adapter,
        loras=tuple(lora or ()),
        embeddings=tuple(embedding or ()),
        scheduler=scheduler,
        weights=weights,
        conditioning=conditioning,
    )
    pipe = load_pipeline(options, device, dtype)
    if is_given(ctx, "embedding"):
        _check_embeddings_act(pipe, [*texts, negative])
    settings = {
        "negative_prompt": negative,
        "steps": steps,
        "guidance_scale": guidance,
        "size": width_height or default_size(pipe),
        **describe_model(options, pipe),
    }
    systems: dict[str, Callable[..., Any]] = {pipe.conditioning: pipe}
    if compare:
        systems = comparison(options, pipe, device, dtype)
        del settings["conditioning"]  # one for each of the systems
    if negative:
        typer.echo(f"negative prompt: {pipe.token_report(negative)}")
    for number, text in enumerate(texts):
        typer.echo(pipe.token_report(text))
        for i, file in enumerate(files[number * num : (number + 1) * num]):
            draw_and_save(systems, {"prompt": text, "seed": seed + i, **settings}, file, not names_picture(output))


def _texts(ctx: typer.Context, prompt: str | None, prompt_file: Path | None, prompts: str | None) -> list[str]:
    source = ctx.get_parameter_source("prompt")
    if source is not None and source.name == "DEFAULT_MAP" and (prompt_file or prompts):
        prompt = None  # that of --config
    if prompts is None and prompt is None and prompt_file is None:
        raise ValueError(
            "give a PROMPT (- for standard input), --prompt-file FILE, --prompts FILE, or a --config with one"
        )
    if prompts is None:
        return [read_prompt(prompt, prompt_file)]
    if prompt is not None or prompt_file is not None:
        raise ValueError("give a PROMPT, --prompt-file or --prompts, one of them")
    from fixclip_diffusion.evaluation.prompts import read_prompts

    return [check_text(item.text, "prompt") for item in read_prompts(prompts, check_scenes=False)]


def _check_embeddings_act(pipe: Any, texts: list[str]) -> None:
    read = {token_id for ids in pipe.tokenizer(texts).input_ids for token_id in ids}
    for token in embedding_tokens(pipe):
        if pipe.tokenizer.convert_tokens_to_ids(token) not in read:
            raise ValueError(f"--embedding: its token {token!r} is in no prompt, so it would not act; write it there")


def describe_model(options: ModelOptions, pipe: Any) -> dict[str, Any]:
    """What is recorded of the model in a picture: enough to load it again."""
    from importlib.metadata import version

    return {
        "base": options.base,
        "encoder": options.encoder,
        "encoder_2": options.encoder_2,
        "adapter": options.adapter,
        "loras": list(options.loras),
        "embeddings": list(options.embeddings),
        "conditioning": options.conditioning or pipe.conditioning,
        "weights": options.weights,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "version": version("fixclip"),
    }


def comparison(
    options: ModelOptions, pipe: Any, device: str | None = None, dtype: str | None = None
) -> dict[str, Callable[..., Any]]:
    """Every conditioning that needs no training, on the base's own encoder, and `pipe` if it has more than that.

    Raises:
        ValueError: the base's own encoder has no original positions.
    """
    from fixclip_diffusion.conditioning import CONDITIONINGS

    plain = base_options(options)
    has_own = has_own_parts(pipe) or replace(options, conditioning=None, adapter=plain.adapter) != plain
    reference = load_pipeline(plain, device, dtype) if has_own else pipe
    if not reference.text_encoder.short_context_length:
        raise ValueError(f"--compare: the encoder of {plain.base!r} was trained for long texts and cannot show others")
    systems: dict[str, Callable[..., Any]] = {
        name: lambda name=name, **kwargs: reference(conditioning=name, **kwargs)
        for name, item in CONDITIONINGS.items()
        if item.needs_short
    }
    if has_own:
        systems[own_label(pipe)] = pipe
    return systems


def own_label(pipe: Any) -> str:
    """`trained encoder + adapter + LoRA`, as far as a pipeline has them; "overlap + adapter" on a base's encoder."""
    parts = ["trained encoder" if pipe.text_encoder.is_trained else pipe.conditioning]
    parts += ["adapter"] if has_adapter(pipe) else []
    parts += ["LoRA"] if has_lora(pipe) else []
    return " + ".join(parts)


def default_size(pipe: Any) -> tuple[int, int]:
    """Width and height that the UNet was trained with, in pixels."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return side, side


def draw(system: Callable[..., Any], settings: dict[str, Any]) -> Any:
    """One picture of one system; the same settings give the same starting noise to each.

    Raises:
        ValueError: out of memory.
    """
    import torch

    width, height = settings["size"]
    try:
        return system(
            prompt=settings["prompt"],
            negative_prompt=settings["negative_prompt"] or None,  # Stable Diffusion XL has zeros for none
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            width=width,
            height=height,
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
        ).images[0]
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory at {width}x{height}: try a smaller --size, or --dtype float16") from error


def draw_and_save(systems: dict[str, Callable[..., Any]], settings: dict[str, Any], file: Path, fresh: bool) -> None:
    """Make one picture of each system and write it, or the row of them, as soon as it is there; see `save_png`."""
    images = [draw(system, settings) for system in systems.values()]
    image = images[0] if len(images) == 1 else label_row(images, list(systems))
    typer.echo(save_png(image, file, {**settings, "systems": list(systems)}, fresh))


@app.command(short_help="Count a prompt's tokens.")
def tokens(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file.")] = None,
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoder: EncoderOption = None,
    encoder_2: Encoder2Option = None,
    adapter: AdapterOption = None,
    conditioning: ConditioningOption = None,
    weights: WeightsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Count a prompt's tokens and show how `fixclip generate` with the same options would read it.

    Needs tokenizer and configurations only, no weights.
    """
    text = read_prompt(prompt, prompt_file)
    from dataclasses import asdict

    from fixclip_diffusion.prompt_reader import PromptReader

    with offer_builtin():
        reader = PromptReader.from_pretrained(base, encoder, adapter, conditioning, weights, encoder_2)
    report = reader.report(text)
    typer.echo(json.dumps(asdict(report), ensure_ascii=False, indent=1) if as_json else report)
