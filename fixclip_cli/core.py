"""Commands of `fixclip` that work on data, encoders and their numbers.

Every command imports what it needs when it runs, so `fixclip --help` stays free of open_clip and webdataset.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fixclip_core.data.captions import CaptionFilters
    from fixclip_core.data.samples import Skipped

app = typer.Typer(no_args_is_help=True)
data_app = typer.Typer(no_args_is_help=True, help="Prepare captioned images.")
app.add_typer(data_app, name="data")


@contextmanager
def user_errors() -> Iterator[None]:
    """Show a ValueError as one clear message instead of a traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


SourceArgument = Annotated[
    str, typer.Argument(help="Manifest (.jsonl, .csv, .tsv), ShareGPT4V .json, folder of image + txt, or shards.")
]
ImageRoot = Annotated[str | None, typer.Option(help="What image paths are relative to [manifest's folder].")]
Start = Annotated[int, typer.Option(min=0, help="First sample to use.")]
Stop = Annotated[int | None, typer.Option(min=1, help="Sample to stop before.")]
MinWords = Annotated[int, typer.Option(help="Fewest words of a caption; 0 switches the filter off.")]
MaxRepeated = Annotated[float, typer.Option(help="Largest share of repeated word triples; 1 is off.")]
MaxRun = Annotated[int, typer.Option(help="Most times in a row that a word may occur; 0 is off.")]
MinLetters = Annotated[float, typer.Option(help="Smallest share of letters in a caption; 0 is off.")]
MinPerClause = Annotated[float, typer.Option(help="Fewest words between punctuation marks on average; 0 is off.")]


def _filters(words: int, repeated: float, run: int, letters: float, per_clause: float) -> "CaptionFilters":
    from fixclip_core.data.captions import CaptionFilters

    return CaptionFilters(words or None, repeated, run or None, letters, per_clause or None)


def _print_skipped(counts: dict[str, int], skipped: "Iterable[Skipped]") -> None:
    from rich.console import Console
    from rich.table import Table

    examples = {sample.reason: sample for sample in reversed(list(skipped))}
    table = Table("reason", "samples", "for example: file", "key")
    for reason, count in counts.items():
        table.add_row(reason, f"{count:,}", examples[reason].file, examples[reason].key)
    Console().print(table if counts else "nothing skipped")


@data_app.command("pack")
def pack_command(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 1000,
    resize: Annotated[int | None, typer.Option(min=1, help="Reduce larger images to this many pixels.")] = None,
    side: Annotated[
        Literal["shortest", "longest"], typer.Option(help="The side that --resize speaks of.")
    ] = "shortest",
    image_root: ImageRoot = None,
    start: Start = 0,
    stop: Stop = None,
    filter: Annotated[bool, typer.Option(help="Leave out captions past the limits below.")] = True,
    min_words: MinWords = 8,
    max_repeated_share: MaxRepeated = 0.4,
    max_word_run: MaxRun = 3,
    min_letter_share: MinLetters = 0.6,
    min_words_per_clause: MinPerClause = 2.5,
) -> None:
    """Pack captioned images into WebDataset shards; run it again after an interruption and it goes on."""
    from fixclip_core.data.config import DataConfig
    from fixclip_core.data.pack import PackOptions, pack

    with user_errors():
        limits = _filters(min_words, max_repeated_share, max_word_run, min_letter_share, min_words_per_clause)
        options = PackOptions(shard_size, resize, side, limits if filter else None)
        config = DataConfig(source=source, image_root=image_root, start=start, stop=stop)
        report = pack(config, out, options, workers)
        _print_skipped(report.counts(), report.skipped)
        typer.echo(f"{report.written:,} of {report.samples:,} samples packed; {out / 'report.json'} lists the others")
        if not report.written:
            raise ValueError(f"{source}: not a single sample could be packed")


@data_app.command("check")
def check_command(
    source: SourceArgument,
    limit: Annotated[int, typer.Option(min=0, help="Look at this many samples, evenly spread; 0 for all.")] = 10_000,
    decode: Annotated[bool, typer.Option(help="Decode the images, to find damaged ones.")] = True,
    examples: Annotated[int, typer.Option(min=0, help="Captions to print.")] = 3,
    image_root: ImageRoot = None,
    start: Start = 0,
    stop: Stop = None,
    min_words: MinWords = 8,
    max_repeated_share: MaxRepeated = 0.4,
    max_word_run: MaxRun = 3,
    min_letter_share: MinLetters = 0.6,
    min_words_per_clause: MinPerClause = 2.5,
) -> None:
    """Count samples, damage and caption lengths, and what the filters would leave out."""
    from fixclip_core.data.config import DataConfig
    from fixclip_core.data.pack import check_source

    with user_errors():
        limits = _filters(min_words, max_repeated_share, max_word_run, min_letter_share, min_words_per_clause)
        config = DataConfig(source=source, image_root=image_root, start=start, stop=stop)
        report = check_source(config, limits, limit=limit or None, decode=decode, examples=examples)
    typer.echo(f"{report.samples:,} samples, {report.checked:,} looked at")
    _print_skipped(report.counts(), report.skipped)
    usable = len(report.tokens)
    typer.echo(f"{usable:,} usable, {report.short_captions:,} with a short caption of their own")
    if usable:
        over = {limit: (report.tokens > limit).mean() for limit in (77, 248)}
        typer.echo(
            f"CLIP tokens per long caption: mean {report.tokens.mean():.1f}, largest {report.tokens.max()}, "
            f"over 77: {over[77]:.1%}, over 248 (cut): {over[248]:.1%}"
        )
        typer.echo(f"the filters would leave out: {json.dumps(report.filtered)}")
    for key, caption in report.examples:
        typer.echo(f"  {key}: {caption}")


@data_app.command("index")
def index_command(folder: Annotated[Path, typer.Argument(help="Folder of .tar shards.")]) -> None:
    """Write index.json, which spares every training run the counting of somebody else's shards."""
    from tqdm import tqdm

    from fixclip_core.data.sources.shards import index_tar, write_index

    with user_errors():
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise ValueError(f"{folder}: there are no .tar shards in this folder")
        sizes = {shard.name: len(index_tar(shard)) for shard in tqdm(shards, "counting", unit="shard")}
        write_index(folder, sizes)
    typer.echo(f"{sum(sizes.values()):,} samples in {len(sizes):,} shards; wrote {folder / 'index.json'}")


ModelNameOption = Annotated[
    str | None,
    typer.Option(help="open_clip model name, for weight files that do not tell their activation."),
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A CLIP: OpenAI, open_clip, transformers or Long-CLIP.")],
    output: Annotated[Path, typer.Argument(help="FixClip folder to write.")],
    model_name: ModelNameOption = None,
    field: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of FixClipConfig, e.g. num_prompts=0."),
    ] = None,
) -> None:
    """Make a FixClip folder of any CLIP; one of 77 tokens is stretched to 248."""
    with user_errors():
        from fixclip_core.weights.read import load_fixclip

        fields = parse_fields(field or [])
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} exists and is not empty; nothing was written")
        model = load_fixclip(source, model_name, **fields)
        model.save_pretrained(output)
        typer.echo(f"{output}: {model.config.context_length} tokens, {model.config.num_prompts} regional prompts")


def parse_fields(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE strings to fields of FixClipConfig; a value is JSON where it can be, else text.

    Raises:
        ValueError: no `=`, or an unknown name.
    """
    from dataclasses import fields

    from fixclip_core.model.config import FixClipConfig

    known = sorted({field.name for field in fields(FixClipConfig)} - {"clip", "preprocess", "context_length"})
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {pair}: expected NAME=VALUE with a name of {', '.join(known)}")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A training run's folder, or a FixClip folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="fixclip, transformers, diffusers, open_clip or clip_l; repeatable."),
    ] = None,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
) -> None:
    """Write an encoder in the formats of transformers, diffusers, open_clip and ComfyUI (all by default)."""
    with user_errors():
        import torch

        from fixclip_core.weights.read import find_fixclip, load_fixclip
        from fixclip_core.weights.write import FORMATS
        from fixclip_core.weights.write import export as write

        if find_fixclip(run) is None:
            best = f"; the best so far is in {run / 'best'}" if find_fixclip(run / "best") else ""
            raise ValueError(f"{run}: no FixClip there; expected model/ or config.json and model.safetensors{best}")
        for line in write(load_fixclip(run), output, formats or FORMATS, getattr(torch, dtype)):
            typer.echo(line)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="FixClip, CLIP or Long-CLIP folder or file, or open_clip model name.")],
    data: Annotated[
        str | None,
        typer.Option(help="Shards, manifest, ShareGPT4V's JSON, folder of image + txt, scenes; a benchmark's folder."),
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="A published benchmark, whose folder --data names.")] = None,
    classify: Annotated[Path | None, typer.Option(help="Zero-shot classification: FOLDER/CLASS/IMAGE.")] = None,
    classnames: Annotated[Path | None, typer.Option(help="JSON object: class folder to class name.")] = None,
    templates: Annotated[Literal["openai", "simple"], typer.Option(help="Prompts of a class.")] = "openai",
    caption: Annotated[Literal["long", "short"], typer.Option(help="Which captions of --data to retrieve.")] = "long",
    image_root: ImageRoot = None,
    start: Start = 0,
    stop: Stop = None,
    partial: Annotated[bool, typer.Option("--partial", help="Evaluate an incomplete benchmark, labelled so.")] = False,
    model_name: ModelNameOption = None,
    pretrained: Annotated[str | None, typer.Option(help="Weights of an open_clip model name.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report as JSON.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or texts a step.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the encoder's passes.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest there is.")] = None,
) -> None:
    """Retrieval (R@1, 5, 10 both ways) on your data or a benchmark, or zero-shot classification."""
    with user_errors():
        if (data is None) == (classify is None):
            raise ValueError("give --data (retrieval) or --classify (classification), one of the two")
        if benchmark is not None and data is None:
            raise ValueError(f"--benchmark {benchmark} needs its folder: --data FOLDER")
        import torch

        from fixclip_core.data.config import DataConfig
        from fixclip_core.data.sources import open_source
        from fixclip_core.evaluation import retrieval as evaluation
        from fixclip_core.evaluation.benchmarks import load_benchmark

        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "precision": precision}
        # Data first: a wrong folder should not cost loading a model.
        chosen = load_benchmark(benchmark, data or "", partial) if benchmark else None
        config = DataConfig(source=data or "", image_root=image_root, start=start, stop=stop)
        source = open_source(config) if data and not benchmark else None
        names = evaluation.read_classnames(classnames) if classnames else None
        encoder = evaluation.load_encoder(model, model_name=model_name, pretrained=pretrained, device=device or best)
        if chosen is not None:
            items: Any = evaluation.BenchmarkItems(chosen, encoder.preprocess)
            report = evaluation.retrieval_report(encoder, items, chosen.name, chosen.protocol, **options)
        elif source is not None:
            items = evaluation.SourceItems(source, encoder.preprocess, caption, start, stop)
            protocol = f"{caption} captions; rows with the same picture are one image"
            report = evaluation.retrieval_report(encoder, items, str(data), protocol, **options)
        else:
            report = evaluation.classification_report(
                encoder, str(classify), templates=templates, classnames=names, **options
            )
        if output is not None:
            evaluation.write_json(report, output)
        typer.echo(evaluation.format_table(report))
