"""Train the encoder: `accelerate launch train_encoder.py RECIPE [section.key=value ...]`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from fixclip_core.training.recipe import EncoderRecipe, load_recipe, recipe_diff

PAPER = Path(__file__).parent / "pipelines/vit_b16_sharegpt4v/encoder.yaml"


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. pipelines/vit_b16_sharegpt4v/encoder.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="any field: optim.lr=1e-5 method=longclip")] = None,
    resume: Annotated[str, typer.Option(help="auto, none, or a checkpoint's folder")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps, random weights, generated data.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    diff: Annotated[bool, typer.Option("--recipe-diff", help="Print what differs from the paper's setting.")] = False,
) -> None:
    """Train a FIX-CLIP encoder as a recipe says; run it with `accelerate launch` for several GPUs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("fixclip_core").setLevel(logging.INFO)
    try:
        chosen = load_recipe(EncoderRecipe, recipe, overrides or [])
        if diff:
            print_diff(chosen)
            return
        from accelerate import PartialState

        from fixclip_core.training.encoder import trainer as train

        if dry_run:
            plan = train.plan(train.prepare(chosen))
            PartialState().print(plan)
        elif smoke:
            train.smoke(chosen)
            PartialState().print(
                "Smoke test passed: random weights, generated samples, two steps, a checkpoint, an evaluation."
            )
        else:
            folder = train.train(chosen, resume=resume)
            PartialState().print(f"Done: {folder}")
    except (ValueError, FloatingPointError) as error:
        if traceback:
            raise
        raise SystemExit(f"Error: {error}") from None


def print_diff(chosen: EncoderRecipe) -> None:
    for key, mine, papers in recipe_diff(chosen, load_recipe(EncoderRecipe, PAPER)):
        print(f"{key}: {mine!r} (paper's setting: {papers!r})")


if __name__ == "__main__":
    typer.run(main)
