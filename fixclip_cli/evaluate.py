"""`fixclip evaluate`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fixclip_cli.app import (
    CaptionKey,
    DeviceOption,
    ImageKey,
    ImageRoot,
    ModelNameOption,
    ShortKey,
    Start,
    Stop,
    app,
    refuse,
)
from fixclip_core.files import prepare_output


@app.command(short_help="Retrieval or zero-shot classification.")
def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="FixClip, CLIP or Long-CLIP folder or file, or open_clip model name.")],
    data: Annotated[
        str | None,
        typer.Option(help="Shards, manifest, folder of image + txt, scenes:N, scenes-twins:N; a benchmark's folder."),
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="A published benchmark, whose folder --data names.")] = None,
    classify: Annotated[Path | None, typer.Option(help="Zero-shot classification: FOLDER/CLASS/IMAGE.")] = None,
    classnames: Annotated[Path | None, typer.Option(help="JSON object: class folder to class name.")] = None,
    templates: Annotated[Literal["openai", "simple"], typer.Option(help="Prompts of a class.")] = "openai",
    caption: Annotated[Literal["long", "short"], typer.Option(help="Which captions of --data to retrieve.")] = "long",
    image_root: ImageRoot = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    short_key: ShortKey = None,
    start: Start = 0,
    stop: Stop = None,
    partial: Annotated[bool, typer.Option("--partial", help="Evaluate an incomplete benchmark, labelled so.")] = False,
    model_name: ModelNameOption = None,
    pretrained: Annotated[str | None, typer.Option(help="Weights of an open_clip model name.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report as JSON.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or texts a step.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Of the encoder's passes; auto: bf16 where the device has instructions for it."),
    ] = "fp32",
    device: DeviceOption = None,
) -> None:
    """Retrieval (R@1, 5, 10 both ways) on your data or a benchmark, or zero-shot classification."""
    if (data is None) == (classify is None):
        raise ValueError("give --data (retrieval) or --classify (classification), one of the two")
    of_own_data = ("caption", "image_root", "image_key", "caption_key", "short_key", "start", "stop")
    if classify is not None:
        refuse(ctx, "needs its folder: --data FOLDER", "benchmark")
        refuse(ctx, "acts on --data only", *of_own_data)
    else:
        refuse(ctx, "acts on --classify only", "classnames", "templates")
    twins = data is not None and data.partition(":")[0] == "scenes-twins" and not benchmark
    if twins:
        refuse(ctx, "does not act on scenes-twins", *of_own_data)
    if benchmark is None:
        refuse(ctx, "acts on a --benchmark only", "partial")
    else:
        refuse(ctx, "does not act on a benchmark, which fixes its images and texts", *of_own_data)
    if output is not None:
        prepare_output(output)
    from fixclip_core.data.config import DataConfig
    from fixclip_core.data.sources import open_source
    from fixclip_core.device import choose_device, choose_precision
    from fixclip_core.evaluation.benchmarks import load_benchmark
    from fixclip_core.evaluation.classification import classification_report, read_classnames
    from fixclip_core.evaluation.encoders import load_encoder
    from fixclip_core.evaluation.items import BenchmarkItems, SourceItems
    from fixclip_core.evaluation.report import format_table, write_json
    from fixclip_core.evaluation.retrieval import retrieval_report
    from fixclip_core.evaluation.twins import format_choices, twin_scenes, twins_report

    device = choose_device(device)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": workers,
        "precision": choose_precision(precision, device),
    }
    # Data first: a wrong folder should not cost loading a model.
    chosen = load_benchmark(benchmark, data or "", partial) if benchmark else None
    source = None
    number = twin_scenes(str(data)) if twins else 0
    if data and not benchmark and not twins:
        keys = {"image_key": image_key, "caption_key": caption_key, "short_key": short_key}
        part = {"image_root": image_root, "start": start, "stop": stop}
        source = open_source(DataConfig.model_validate({"source": data, **keys, **part}))
    names = read_classnames(classnames) if classnames else None
    encoder = load_encoder(model, model_name=model_name, pretrained=pretrained, device=device)
    if chosen is not None:
        items: Any = BenchmarkItems(chosen, encoder.preprocess)
        report = retrieval_report(encoder, items, chosen.name, chosen.protocol, **options)
    elif twins:
        report = twins_report(encoder, number, **options)
    elif source is not None:
        items = SourceItems(source, encoder.preprocess, caption, start, stop)
        protocol = f"{caption} captions; rows with the same picture are one image"
        report = retrieval_report(encoder, items, str(data), protocol, **options)
    else:
        report = classification_report(encoder, str(classify), templates=templates, classnames=names, **options)
    if output is not None:
        write_json(report, output)
    typer.echo(format_table(report))
    if twins:
        typer.echo(format_choices(report))
