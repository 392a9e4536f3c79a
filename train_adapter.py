"""Train the adapter: `accelerate launch train_adapter.py RECIPE [section.key=value ...]`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from fixclip_core.training.recipe import load_recipe
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. pipelines/vit_l14_stable_diffusion/adapter.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="any field: optim.lr=1e-5 adapter.kind=mlp")] = None,
    resume: Annotated[str, typer.Option(help="auto, none, or a checkpoint's folder")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps, generated data, random weights.")] = False,
) -> None:
    """Train an adapter on the text states as a recipe says; run it with `accelerate launch` for several GPUs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for package in ("fixclip_core", "fixclip_diffusion"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        chosen = load_recipe(AdapterRecipe, recipe, overrides or [])
        from fixclip_diffusion.adapter_training import trainer as train

        if dry_run:
            print(train.plan(train.prepare(chosen)))
        elif smoke:
            train.smoke(chosen)
            print("Smoke test passed: generated samples, two steps, a checkpoint, an adapter.")
        else:
            print(f"Done: {train.train(chosen, resume=resume)}")
    except ValueError as error:
        logging.debug("where it was raised:", exc_info=True)
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    typer.run(main)
