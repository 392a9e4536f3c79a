"""`fixclip caption`: long captions by a multimodal model."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fixclip_cli.app import ImageKey, ImageRoot, Start, Stop, app, errors_exit_with

if TYPE_CHECKING:
    from fixclip_core.synthesis.job import Job

BUILTIN = "builtin:scenes"


@app.command()
def caption(
    source: Annotated[str, typer.Argument(help="Images: a folder, manifest, shards, ... or scenes:200.")],
    out: Annotated[Path, typer.Argument(help="Folder for shards, or a .jsonl manifest beside the images.")],
    server: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server, e.g. http://127.0.0.1:8000; its key: $OPENAI_API_KEY. "
            f"{BUILTIN} describes scenes:N."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Multimodal model, as the server calls it.")] = None,
    recipe: Annotated[
        str, typer.Option(help="YAML file; a copy of the built-in one to begin with.")
    ] = "builtin:captions",
    field: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the recipe; repeatable.")
    ] = None,
    short: Annotated[
        str | None, typer.Option(help="Short captions too: ask, keep, or first_sentence and the like [recipe's].")
    ] = None,
    write_batch: Annotated[Path | None, typer.Option(help="Write what is to ask as OpenAI batch JSONL.")] = None,
    read_batch: Annotated[list[Path] | None, typer.Option(help="Read a batch's output; repeatable.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at the same time.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a request is sent again.")] = 4,
    image_root: ImageRoot = None,
    image_key: ImageKey = None,
    start: Start = 0,
    stop: Stop = None,
) -> None:
    """Write long captions by a multimodal model, filtered; run it again after an interruption and it goes on."""
    from fixclip_core.data.config import DataConfig
    from fixclip_core.synthesis.job import Job
    from fixclip_core.synthesis.recipe import CaptionRecipe
    from fixclip_core.training.recipe import load_recipe

    if (server is not None) + (write_batch is not None) + bool(read_batch) != 1:
        raise ValueError("give one of --server URL, --write-batch FILE and --read-batch FILE")
    if server is not None and server.startswith("builtin:") and server != BUILTIN:
        raise ValueError(f"--server {server}: the only captioner that comes with the package is {BUILTIN}")
    if model is None and server != BUILTIN:
        raise ValueError("give --model, the name that the server knows the multimodal model by")
    if server == BUILTIN and not source.startswith("scenes"):
        warning = f"{BUILTIN} describes any picture as a scene of its world; photos need a --server URL and --model"
        typer.echo(f"Warning: {warning}", err=True)
    overrides = [*(field or []), *([f"short={short}"] if short else [])]
    chosen = load_recipe(CaptionRecipe, recipe, overrides)
    config = DataConfig(source=source, image_root=image_root, image_key=image_key, start=start, stop=stop)
    job = Job(config, out, chosen, model or "scenes")
    if write_batch is not None:
        _write_batch(job, write_batch)
    elif read_batch:
        _read_batch(job, read_batch)
    else:
        _ask_server(job, str(server), concurrency, timeout, retries)


def _ask_server(job: "Job", url: str, concurrency: int, timeout: float, retries: int) -> None:
    from fixclip_core.synthesis.drivers.server import ServerLostError, ServerOptions, caption
    from fixclip_core.synthesis.scenes_server import ScenesServer

    with ExitStack() as stack:
        if url == BUILTIN:
            url = stack.enter_context(ScenesServer().running()).url
        try:
            report = caption(job, ServerOptions(url, concurrency, timeout, retries))
        except ServerLostError:
            with errors_exit_with(1):
                raise
    _print_report(job, report)
    if report["failed"]:
        typer.echo(f"the requests of {report['failed']:,} images failed; the same command makes them again")


def _write_batch(job: "Job", file: Path) -> None:
    from fixclip_core.synthesis.drivers.batch import write_batch

    files, requests = write_batch(job, file)
    for path in files:
        typer.echo(path)
    typer.echo(f"{requests:,} requests written" if files else "nothing is left to ask; --read-batch made the output")


def _read_batch(job: "Job", files: list[Path]) -> None:
    from fixclip_core.synthesis.drivers.batch import read_batch

    reading = read_batch(job, files)
    failed = ", ".join(f"{count:,} {reason}" for reason, count in reading.failed.items())
    typer.echo(f"{reading.answers:,} new answers" + (f"; without a usable one: {failed}" if failed else ""))
    for failure in reading.failures:
        typer.echo(f"  {failure}")
    if reading.skipped:
        others = f", and {len(reading.skipped) - 3:,} more" if len(reading.skipped) > 3 else ""
        typer.echo(f"skipped lines: {len(reading.skipped):,}; {'; '.join(reading.skipped[:3])}{others}")
    if reading.pending:
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in reading.again.items())
        again = f", with another prompt where the answer was rejected: {rejected}" if rejected else ""
        typer.echo(f"{reading.pending:,} requests are still to make{again}; --write-batch FILE writes them")
    if reading.report is not None:
        _print_report(job, reading.report)


def _print_report(job: "Job", report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    left_out = sum(report["counts"].values())
    listed = " and every image left out" if left_out else ""
    if left_out:
        table = Table("reason", "images left out")
        for reason, count in report["counts"].items():
            table.add_row(reason, f"{count:,}")
        Console().print(table)
    typer.echo(f"{report['written']:,} of {report['samples']:,} images captioned, in {job.out}")
    tokens = f"{report['tokens']:,} tokens written by {job.model}; " if report["tokens"] else ""
    typer.echo(f"{tokens}{report['report']} has the counts{listed}")
    if not report["written"]:
        with errors_exit_with(1):
            raise ValueError(f"{job.out}: not a single image got a caption; {report['report']} says why")
