"""`fixclip evaluate-images`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixclip_cli.app import (
    DEFAULT_OUTPUT,
    AdapterOption,
    BaseOption,
    DeviceOption,
    Encoder2Option,
    EncoderOption,
    app,
    parse_size,
    refuse,
)

if TYPE_CHECKING:
    from fixclip_diffusion.evaluation.generate import System


PROMPTS_HELP = (
    "A benchmark's folder, a text file (a prompt a line), .json or .jsonl with `prompt` and `questions`, or scenes:N."
)
BENCHMARK_HELP = "NAME FOLDER: dpg, tiif, longbench, lgbench or geneval2; else recognised by what is in the folder."
SYSTEM_HELP = (
    "NAME:encoder=...,encoder_2=...,adapter=...,lora=...,conditioning=... or NAME:pipeline=...,lora=...; repeat. "
    "Default: all that is given."
)
PIPELINE_HELP = "Any diffusers text-to-image pipeline, [NAME=]owner/name or folder, drawn with as it is; repeat."
JUDGE_HELP = (
    "URL of an OpenAI-compatible server, a vision-language model for transformers (folder or hub name), or `checker` "
    "for scenes; repeat. Default: checker, if all prompts are scenes."
)
SCORER_HELP = "CLIP for image-text cosines, as for `evaluate`; torchmetrics:MODEL for CLIPScore by a transformers CLIP."
OUTPUT_HELP = "Folder for pictures, answers and the report; goes on with what is there."

Texts = list[str] | None


@app.command("evaluate-images", short_help="Do pictures follow long prompts? Systems side by side.")
def evaluate_images(
    ctx: typer.Context,
    prompts: Annotated[str | None, typer.Argument(help=PROMPTS_HELP)] = None,
    benchmark: Annotated[tuple[str, str] | None, typer.Option(help=BENCHMARK_HELP)] = None,
    base: BaseOption = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    encoder: EncoderOption = None,
    encoder_2: Encoder2Option = None,
    adapter: AdapterOption = None,
    lora: Annotated[
        str | None, typer.Option(metavar="SOURCE[:SCALE]", help="LoRA: file, folder or hub name, and its weight.")
    ] = None,
    system: Annotated[Texts, typer.Option(help=SYSTEM_HELP)] = None,
    pipeline: Annotated[Texts, typer.Option(help=PIPELINE_HELP)] = None,
    pictures: Annotated[
        Texts, typer.Option(help="[NAME=]FOLDER of pictures made elsewhere, named as the benchmark says; repeat.")
    ] = None,
    judge: Annotated[Texts, typer.Option(help=JUDGE_HELP)] = None,
    judge_model: Annotated[Texts, typer.Option(help="Model behind each --judge URL, in their order.")] = None,
    judge_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, help="Longest reply of a judge; one that thinks needs hundreds.")
    ] = 64,
    scorer: Annotated[str | None, typer.Option(help=SCORER_HELP)] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Add the score as the benchmark's own scorer has it.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Pictures made elsewhere may be missing; they count 0.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="A B: where two finished runs differ; nothing is drawn.")
    ] = None,
    check_scenes: Annotated[
        bool | None, typer.Option(help="Read prompts as captions of scenes. Default: if all of them can be.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=999, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0.0, max=100.0, help="Guidance scale.")] = 7.5,
    size: Annotated[str | None, typer.Option(help="Side of the square pictures; default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="First seed, the same for every system.")] = 0,
    # Launchers take --num for the beginning of their own --num_processes.
    num: Annotated[
        int, typer.Option("--num", "--per-prompt", min=1, max=1000, help="Pictures of each prompt and system.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures drawn at a time.")] = 1,
    device: DeviceOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT_HELP)] = Path(f"{DEFAULT_OUTPUT}/evaluation"),
) -> None:
    """Do pictures follow long prompts? Systems side by side, by where in the prompt each question's sentence lies."""
    if compare is not None:
        others = [name for name in ctx.params if name not in ("compare", "prompts")]
        if prompts is not None:
            raise ValueError("--compare A B reads two finished runs; leave the prompts out")
        refuse(ctx, "does not act beside --compare, which reads two finished runs", *others)
        from fixclip_diffusion.evaluation.compare import compare_runs

        typer.echo(compare_runs(*compare))
        return
    if (prompts is None) == (benchmark is None):
        raise ValueError("give PROMPTS or --benchmark NAME FOLDER, one of the two")
    width_height = parse_size(size) if size else None
    if width_height and width_height[0] != width_height[1]:
        raise ValueError(f"size {size}: pictures to compare are square, give one number")
    for option, given in (("--system", system), ("--pipeline", pipeline), ("--pictures", pictures)):
        if given:
            refuse(ctx, f"does not act beside {option}, which names its own", "encoder", "encoder_2", "adapter", "lora")
    if not judge:
        refuse(ctx, "is of a --judge", "judge_model", "judge_tokens")
    import torch
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()  # it warns of casts to float32 that leave everything as it is
    from fixclip_core.device import choose_device
    from fixclip_core.scenes.world import MIN_SIDE
    from fixclip_diffusion.evaluation import benchmarks, generate, report, run

    # Prompts, systems and judges first: a wrong one should not cost loading a model.
    name, source = benchmark or (None, str(prompts))
    opened = benchmarks.open_benchmark(source, name, check_scenes)
    systems = _systems(base, encoder, encoder_2, adapter, lora, system or [], pipeline or [], pictures or [])
    processes = run.Processes.found()
    if processes.device is not None:
        refuse(ctx, "is the launcher's to choose: each of its processes has one", "device")
    device = choose_device(processes.device or device)
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    if judge is None and all(prompt.scene is not None for prompt in opened.prompts):
        judge = ["checker"]
    if "checker" in (judge or ()) and width_height and width_height[0] < MIN_SIDE:
        raise ValueError(f"--size {size}: the checker of scenes reads pictures of {MIN_SIDE} pixels and more")
    judge_dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    judges = _judges(judge or [], judge_model or [], judge_tokens, device, judge_dtype)
    if not judges and scorer is None:
        typer.echo("No --judge, no --scorer and no captions of scenes: nothing will be scored.", err=True)
    found = run.evaluate_images(
        base,
        opened,
        systems,
        generate.Drawing(steps, guidance, width_height and width_height[0], seed, num, batch_size=batch_size),
        output,
        judges=judges,
        scorer=_scorer(scorer, device) if scorer and processes.is_main else None,
        device=device,
        dtype=dtype,
        partial=partial,
        official=official,
        processes=processes,
    )
    if processes.is_main:
        typer.echo(report.markdown(found))
        files = ("report.html", "report.json", "report.md", "sheet.png", "images")
        typer.echo("\n" + ", ".join(str(output / file) for file in files if (output / file).exists()))


def _systems(
    base: str,
    encoder: str | None,
    encoder_2: str | None,
    adapter: str | None,
    lora: str | None,
    given: list[str],
    pipelines: list[str],
    pictures: list[str],
) -> "list[System]":
    from fixclip_diffusion import builtin
    from fixclip_diffusion.evaluation import generate

    systems = [generate.parse_system(text) for text in given]
    for key, values in (("pipeline", pipelines), ("pictures", pictures)):
        systems += [generate.parse_source(key, text) for text in values]
    if not systems and adapter == builtin.NO_ADAPTER:
        return generate.default_systems(builtin.base_of(base), encoder, None, lora, encoder_2)
    if not systems:
        parts = builtin.complete(base, encoder, adapter, lora)
        return generate.default_systems(parts.base, parts.encoder, parts.adapter, parts.lora, encoder_2)
    return systems


def _scorer(name: str, device: str) -> Any:
    from fixclip_core.evaluation.encoders import load_encoder
    from fixclip_diffusion.evaluation.clip_score import PREFIX, ClipScore

    if name.startswith(PREFIX):
        return ClipScore(name.removeprefix(PREFIX), device)
    return load_encoder(name, device=device)


def _judges(names: list[str], models: list[str], tokens: int, device: str, dtype: Any) -> list[Any]:
    from fixclip_diffusion.evaluation.judges import SceneChecker
    from fixclip_diffusion.evaluation.vision_judges import LocalModel, VisionServer

    urls = [name for name in names if name.startswith(("http://", "https://"))]
    if len(models) != len(urls):
        raise ValueError(f"{len(urls)} --judge URLs and {len(models)} --judge-model: give a model for each URL")
    left = list(models)
    judges: list[Any] = []
    for name in names:
        if name == "checker":
            judges.append(SceneChecker())
        elif name in urls:
            judges.append(VisionServer(name, left.pop(0), max_tokens=tokens))
        else:
            judges.append(LocalModel(name, device, dtype, max_tokens=tokens))
    return judges
