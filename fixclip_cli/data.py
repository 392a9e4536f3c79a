"""`fixclip data`: pack, check and index captioned images."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fixclip_cli.app import (
    CaptionKey,
    Commands,
    ImageKey,
    ImageRoot,
    ShortKey,
    Start,
    Stop,
    app,
    errors_exit_with,
    format_columns,
    refuse,
)

if TYPE_CHECKING:
    from fixclip_core.data.captions import CaptionFilters
    from fixclip_core.data.pack import PackOptions
    from fixclip_core.data.samples import Skipped

data_app = typer.Typer(cls=Commands, rich_markup_mode=None, help="Prepare captioned images.")
app.add_typer(data_app, name="data")

SourceArgument = Annotated[
    str, typer.Argument(help="Manifest (.jsonl, .csv, ...), ShareGPT4V .json, folder of image + txt, shards, data set.")
]
MinWords = Annotated[int, typer.Option(help="Fewest words of a caption; 0 switches the filter off.")]
MaxRepeated = Annotated[float, typer.Option(help="Largest share of repeated word triples; 1 is off.")]
MaxRun = Annotated[int, typer.Option(help="Most times in a row that a word may occur; 0 is off.")]
MinLetters = Annotated[float, typer.Option(help="Smallest share of letters in a caption; 0 is off.")]
MinPerClause = Annotated[float, typer.Option(help="Fewest words between punctuation marks on average; 0 is off.")]


FILTER_OPTIONS = ("min_words", "max_repeated_share", "max_word_run", "min_letter_share", "min_words_per_clause")


def _filters(words: int, repeated: float, run: int, letters: float, per_clause: float) -> "CaptionFilters":
    from fixclip_core.data.captions import CaptionFilters

    return CaptionFilters(words or None, repeated, run or None, letters, per_clause or None)


def _print_skipped(counts: dict[str, int], skipped: "Sequence[Skipped]") -> None:
    examples = {sample.reason: sample for sample in reversed(skipped)}
    rows = [
        (reason, f"{count:,}", examples[reason].file, examples[reason].key, " ".join(examples[reason].detail.split()))
        for reason, count in counts.items()
    ]
    header = ("reason", "samples", "for example: file", "key", "detail")
    typer.echo(format_columns([header, *rows]) if rows else "nothing skipped")


@data_app.command("sampler")
def sampler_command(
    samples: Annotated[int, typer.Option(min=1, help="Samples of the data.")] = 30_000_000,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 10_000,
    ranks: Annotated[int, typer.Option(min=1, help="Training processes.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step of each process.")] = 256,
    shuffle_shards: Annotated[int, typer.Option(min=1, help="As data.shuffle_shards of a recipe.")] = 16,
    resume_ranks: Annotated[int | None, typer.Option(min=1, help="Go on with so many; default: half.")] = None,
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
) -> None:
    """Dry run of the order of remote shards: who reads what, is every sample read once; reads nothing."""
    from fixclip_core.data.simulation import RANKS_OF_A_NODE, Cluster, simulate

    again = resume_ranks or max(1, ranks // 2)
    cluster = Cluster(samples, shard_size, ranks, batch_size, shuffle_shards, again, seed)
    found = simulate(cluster, epoch)
    mean, most = found.shards_of_rank
    rows = [
        ("every sample", f"read once an epoch of {found.steps:,} steps; {found.unread:,} fill no step"),
        ("resumed", f"in the middle with {again} ranks instead of {ranks}: every sample read once, too"),
        ("shards of a rank", f"{mean:.1f} of {-(-samples // shard_size):,}, at most {most}"),
        ("mixed at a time", f"up to {found.open_shards} shards by a rank: fetched before its first batch is whole"),
        ("fetched", f"{found.fetched_by_rank:.2f} times the data by ranks alone, {found.fetched_by_node:.2f} times by "
         f"nodes of {RANKS_OF_A_NODE} ranks with one cache"),
        ("shared", f"{found.foreign_shards:.1%} of the open shards are read by two nodes at a time; each fetches its "
         "own copy, none waits"),
    ]  # fmt: skip
    typer.echo(format_columns(rows))


@data_app.command("pack")
def pack_command(
    ctx: typer.Context,
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster, --workers tasks at once.")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 1000,
    resize: Annotated[int | None, typer.Option(min=1, help="Reduce larger images to this many pixels.")] = None,
    side: Annotated[
        Literal["shortest", "longest"], typer.Option(help="The side that --resize speaks of.")
    ] = "shortest",
    image_root: ImageRoot = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    short_key: ShortKey = None,
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

    if resize is None:
        refuse(ctx, "says which side --resize speaks of, and there is none", "side")
    if not filter:
        refuse(ctx, "does not act beside --no-filter", *FILTER_OPTIONS)
    limits = _filters(min_words, max_repeated_share, max_word_run, min_letter_share, min_words_per_clause)
    options = PackOptions(shard_size, resize, side, limits if filter else None)
    config = DataConfig(
        source=source,
        image_root=image_root,
        image_key=image_key,
        caption_key=caption_key,
        short_key=short_key,
        start=start,
        stop=stop,
    )
    report = pack(config, out, options, workers, ray)
    _print_skipped(report.counts(), report.skipped)
    if not report.written:
        why = _why_nothing(report.skipped, options)
        raise ValueError(f"{source}: not a single sample could be packed, and no file was left: {why}")
    typer.echo(f"{report.written:,} of {report.samples:,} samples packed; {out / 'report.json'} lists the others")


def _why_nothing(skipped: "Sequence[Skipped]", options: "PackOptions") -> str:
    """What left out most samples; of a filter its option, and the one that switches all off."""
    from fixclip_core.data.captions import LIMITS
    from fixclip_core.data.samples import describe_skipped

    names = LIMITS.get(Counter(sample.reason for sample in skipped).most_common(1)[0][0], ())
    text = describe_skipped(skipped)
    if not names:
        return text
    limits = " ".join(f"--{name.replace('_', '-')} {getattr(options.filters, name)}" for name in names)
    return f"{text}; the caption filters leave out most ({limits}), --no-filter keeps all"


@data_app.command("check")
def check_command(
    source: SourceArgument,
    limit: Annotated[int, typer.Option(min=0, help="Look at this many samples, evenly spread; 0 for all.")] = 10_000,
    decode: Annotated[bool, typer.Option(help="Decode the images, to find damaged ones.")] = True,
    examples: Annotated[int, typer.Option(min=0, help="Captions to print.")] = 3,
    image_root: ImageRoot = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    short_key: ShortKey = None,
    start: Start = 0,
    stop: Stop = None,
    min_words: MinWords = 8,
    max_repeated_share: MaxRepeated = 0.4,
    max_word_run: MaxRun = 3,
    min_letter_share: MinLetters = 0.6,
    min_words_per_clause: MinPerClause = 2.5,
) -> None:
    """Count samples, damage and caption lengths, and what the filters would leave out."""
    from fixclip_core.data.check import check_source
    from fixclip_core.data.config import DataConfig
    from fixclip_core.data.samples import describe_skipped

    limits = _filters(min_words, max_repeated_share, max_word_run, min_letter_share, min_words_per_clause)
    config = DataConfig(
        source=source,
        image_root=image_root,
        image_key=image_key,
        caption_key=caption_key,
        short_key=short_key,
        start=start,
        stop=stop,
    )
    report = check_source(config, limits, limit=limit or None, decode=decode, examples=examples)
    typer.echo(f"{report.samples:,} samples, {report.checked:,} looked at")
    _print_skipped(report.counts(), report.skipped)
    usable = len(report.tokens)
    typer.echo(f"{usable:,} usable, {report.short_captions:,} with a short caption of their own")
    if not usable:
        with errors_exit_with(1):
            raise ValueError(f"{source}: not a single sample can be used: {describe_skipped(report.skipped)}")
    over = {limit: (report.tokens > limit).mean() for limit in (77, 248)}
    typer.echo(
        f"CLIP tokens per long caption: mean {report.tokens.mean():.1f}, largest {report.tokens.max()}, "
        f"over 77: {over[77]:.1%}, over 248 (cut): {over[248]:.1%}"
    )
    typer.echo(f"the filters would leave out: {json.dumps(report.filtered)}")
    for key, caption in report.examples:
        typer.echo(f"  {key}: {caption}")


@data_app.command("preview")
def preview_command(
    source: SourceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("outputs/preview.html"),
    limit: Annotated[int, typer.Option(min=1, help="Show this many samples, evenly spread.")] = 200,
    image_root: ImageRoot = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    short_key: ShortKey = None,
    start: Start = 0,
    stop: Stop = None,
    min_words: MinWords = 8,
    max_repeated_share: MaxRepeated = 0.4,
    max_word_run: MaxRun = 3,
    min_letter_share: MinLetters = 0.6,
    min_words_per_clause: MinPerClause = 2.5,
) -> None:
    """Show images, captions, where 77 tokens end and what the filters say, on one HTML page."""
    from fixclip_core.data.config import DataConfig
    from fixclip_core.data.preview import write_preview

    limits = _filters(min_words, max_repeated_share, max_word_run, min_letter_share, min_words_per_clause)
    config = DataConfig(
        source=source,
        image_root=image_root,
        image_key=image_key,
        caption_key=caption_key,
        short_key=short_key,
        start=start,
        stop=stop,
    )
    shown = write_preview(config, output, limits, limit)
    typer.echo(f"{output}: {shown:,} samples")


@data_app.command("index")
def index_command(folder: Annotated[Path, typer.Argument(help="Folder of .tar shards.")]) -> None:
    """Write index.json, which spares every training run the counting of somebody else's shards."""
    from tqdm import tqdm

    from fixclip_core.data.sources.shards import index_tar, shards_in, write_index

    shards = shards_in(folder)
    if not shards:
        raise ValueError(f"{folder}: there are no .tar shards in this folder")
    indices = {Path(shard).name: index_tar(shard) for shard in tqdm(shards, "counting", unit="shard")}
    damaged = [f"{name}: {index.damage}" for name, index in indices.items() if index.damage]
    if damaged:
        raise ValueError(
            f"{folder}: no index was written, {len(damaged)} of {len(shards)} shards are damaged: "
            f"{'; '.join(damaged[:3])}; fetch them again, or keep what can be read of them with: "
            "fixclip data pack FOLDER NEW_FOLDER --no-filter"
        )
    sizes = {name: len(index.samples) for name, index in indices.items()}
    write_index(folder, sizes)
    typer.echo(f"{sum(sizes.values()):,} samples in {len(sizes):,} shards; wrote {folder / 'index.json'}")
