"""Captions on a Ray cluster: `python pipelines/captions/ray_caption.py SOURCE OUT --model M (--server URL | --vllm)`.

Start it on a machine of the cluster (`ray job submit`, or with RAY_ADDRESS set); without a cluster it uses this
machine's cores. SOURCE and OUT are on a disk that every machine sees. Interrupted, it goes on where it was.
"""

from pathlib import Path
from typing import Annotated

import typer

from fixclip_core.data.config import DataConfig
from fixclip_core.synthesis.drivers.ray import caption_by_engine, caption_by_servers, vllm_engine
from fixclip_core.synthesis.drivers.server import ServerOptions
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.recipe import CaptionRecipe
from fixclip_core.training.recipe import load_recipe


def main(
    source: Annotated[str, typer.Argument(help="Images: shards, a manifest, a folder, ...")],
    out: Annotated[Path, typer.Argument(help="Folder for shards, or a .jsonl manifest beside the images.")],
    model: Annotated[str, typer.Option(help="The multimodal model: the server's name for it, or a hub name.")],
    server: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, or a balancer before many.")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="vLLM on the cluster's GPUs, by ray.data.llm.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --vllm: engines at the same time.")] = 1,
    engine: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="With --vllm: e.g. max_model_len=4096; repeatable.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Shards at the same time [as many as cores].")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --server: requests of each task at a time.")] = 16,
    recipe: Annotated[str, typer.Option(help="YAML file.")] = "builtin:captions",
    field: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Of the recipe.")] = None,
    image_root: Annotated[str | None, typer.Option(help="What image paths are relative to.")] = None,
    start: Annotated[int, typer.Option(min=0, help="First sample to use.")] = 0,
    stop: Annotated[int | None, typer.Option(min=1, help="Sample to stop before.")] = None,
) -> None:
    """Write long captions on a Ray cluster."""
    try:
        if (server is not None) == vllm:
            raise ValueError("give --server URL or --vllm, one of the two")
        kwargs = dict(pair.split("=", 1) for pair in engine or [] if "=" in pair)
        if len(kwargs) < len(engine or []) or not all(value.isdecimal() for value in kwargs.values()):
            raise ValueError(f"--engine {' '.join(engine or [])}: give NAME=NUMBER, like max_model_len=4096")
        config = DataConfig(source=source, image_root=image_root, start=start, stop=stop)
        job = Job(config, out, load_recipe(CaptionRecipe, recipe, field or []), model)
        if server is not None:
            report = caption_by_servers(job, ServerOptions(server, concurrency), tasks)
        else:
            options = {name: int(value) for name, value in kwargs.items()}
            report = caption_by_engine(job, vllm_engine(job, replicas, **options), tasks)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{report['written']:,} of {report['samples']:,} images captioned, in {out}; see {report['report']}")


if __name__ == "__main__":
    typer.run(main)
