"""`fixclip-app`, the demo page; with `--base ... --encoder ... --adapter ...` on a model of your choice."""

import contextlib
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging

from fixclip_cli.app import (
    AdapterOption,
    Command,
    ConditioningOption,
    EmbeddingOption,
    Encoder2Option,
    EncoderOption,
    LoraOption,
    SchedulerOption,
    WeightsOption,
    refuse,
)
from fixclip_core.device import choose_device

from .jobs import Limits
from .model import DemoModel, DevicePool, ModelChoice, default_choice

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def load(choice: ModelChoice | None, devices: list[str] | None) -> DevicePool:
    """The chosen model, or the default one, on each device."""
    # diffusers warns of every cut prompt; what visitors write does not belong in the server's log.
    diffusers_logging.set_verbosity_error()
    names = [choose_device(name) for name in devices] if devices else [choose_device(None)]
    with default_choice() if choice is None else contextlib.nullcontext(choice) as chosen:
        return DevicePool([DemoModel(chosen, name) for name in names])


@app.command(cls=Command)
def main(
    ctx: typer.Context,
    base: Annotated[
        str | None, typer.Option(help="Stable Diffusion 1, 2 or XL: a folder, a hub name or a file.")
    ] = None,
    encoder: EncoderOption = None,
    encoder_2: Encoder2Option = None,
    adapter: AdapterOption = None,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    scheduler: SchedulerOption = None,
    weights: WeightsOption = None,
    conditioning: ConditioningOption = None,
    scenes: Annotated[
        bool | None, typer.Option(help="It draws the scenes world: show the checker. Default: as the folder says.")
    ] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu, mps, cuda:0...; repeat it to use several.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in your network in.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option(help="Make a public link through Gradio's servers.")] = False,
    max_side: Annotated[int, typer.Option(min=16, help="Largest width and height, in pixels.")] = Limits.side,
    max_waiting: Annotated[int, typer.Option(min=1, help="Jobs that may wait in line.")] = 32,
) -> None:
    """Open the demo page."""
    from .page import build, launch  # gradio, which is an extra

    if base is None:
        refuse(
            ctx,
            "needs the --base that it belongs to",
            *("encoder", "encoder_2", "adapter", "lora", "embedding", "scheduler", "weights", "conditioning", "scenes"),
        )
        choice = None
    else:
        choice = ModelChoice(
            base=base,
            encoder=encoder,
            encoder_2=encoder_2,
            adapter=adapter,
            loras=tuple(lora or ()),
            embeddings=tuple(embedding or ()),
            scheduler=scheduler,
            weights=weights,
            conditioning=conditioning,
            scenes=scenes,
        )
    page = build(load(choice, device), Limits(side=max_side), max_waiting)
    launch(page, server_name=host, server_port=port, share=share)
