"""`fixclip train`: every training by a recipe, with the same options and the same errors.

    fixclip train encoder RECIPE [section.key=value ...]
    accelerate launch train_encoder.py RECIPE [section.key=value ...]      the same for several GPUs

RECIPE is a YAML file or the name of one in the package, such as `builtin:own_data`; `fixclip train --list` shows them.
"""

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fixclip_cli.app import Commands, app, errors_exit_with, format_columns, refuse
from fixclip_core.files import is_running

if TYPE_CHECKING:
    from fixclip_core.training.recipe import Section
    from fixclip_core.training.trainer import Trainer

RecipeArgument = Annotated[str, typer.Argument(help="YAML file, or a builtin:NAME of `fixclip train --list`.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Any field of the recipe: optim.lr=1e-5 train.steps=100")]
Resume = Annotated[str, typer.Option(help="auto, none, or a checkpoint's folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Two steps on generated data in a temporary folder.")]
Plan = Annotated[bool, typer.Option("--plan", help="Print what a training on --gpus GPUs needs, stop.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs to plan for.")]
Gpu = Annotated[str, typer.Option(help="Their kind: h100, h200, a100, l40s or rtx4090.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Samples of the data, if it is not at hand.")]
Rate = Annotated[float | None, typer.Option(min=0.001, help="Samples/s of one GPU, as a benchmark of yours says.")]
Utilisation = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of a GPU's peak, if it says nothing.")]
SampleKb = Annotated[float | None, typer.Option(min=0.001, help="KB of a stored sample.")]
Price = Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour.")]
PLANNING = ("gpus", "gpu", "samples", "samples_per_second", "utilisation", "sample_kb", "price")
Diff = Annotated[bool, typer.Option("--recipe-diff", help="Print what differs from the recipe of reference, stop.")]


@dataclass(frozen=True)
class Kind:
    """A training of the package: `module:class` of its recipe and trainer, and the recipe that others are held to."""

    schema: str
    trainer: str
    reference: str
    help: str


KINDS = {
    "encoder": Kind(
        "fixclip_core.training.encoder.recipe:EncoderRecipe",
        "fixclip_core.training.encoder.trainer:EncoderTrainer",
        "builtin:vit_b16_sharegpt4v",
        "Train a FIX-CLIP encoder as a recipe says.",
    ),
    "adapter": Kind(
        "fixclip_diffusion.adapter_training.recipe:AdapterRecipe",
        "fixclip_diffusion.adapter_training.trainer:AdapterTrainer",
        "builtin:vit_l14_stable_diffusion",
        "Train an adapter on the text states, and a LoRA on demand, as a recipe says.",
    ),
}

train_app = typer.Typer(cls=Commands, help="Train an encoder or an adapter as a recipe says.")
app.add_typer(train_app, name="train")


@train_app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    listed: Annotated[bool, typer.Option("--list", help="Show the recipes in the package.")] = False,
) -> None:
    """Train an encoder or an adapter as a recipe says."""
    if listed and context.invoked_subcommand is not None:
        raise ValueError(
            f"--list shows the recipes and trains nothing; leave it out before {context.invoked_subcommand}"
        )
    if listed:
        from fixclip_core.training.recipe import builtin_recipes

        for name, kind in KINDS.items():
            for recipe, path in builtin_recipes(imported(kind.schema)).items():
                about = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
                typer.echo(f"{name:8} {recipe:32} {about}")


def command(kind: Kind) -> Callable[..., None]:
    """The command of one kind; all of them have the same options."""

    def train(
        ctx: typer.Context,
        recipe: RecipeArgument,
        overrides: Overrides = None,
        resume: Resume = "auto",
        dry_run: DryRun = False,
        smoke: Smoke = False,
        diff: Diff = False,
        plan: Plan = False,
        gpus: Gpus = 8,
        gpu: Gpu = "h100",
        samples: Samples = None,
        samples_per_second: Rate = None,
        utilisation: Utilisation = 0.35,
        sample_kb: SampleKb = None,
        price: Price = None,
    ) -> None:
        if not plan:
            refuse(ctx, "is of --plan", *PLANNING)
        elif kind is not KINDS["encoder"]:
            raise ValueError("--plan is for the encoder; --dry-run prints what an adapter's training needs")
        else:
            refuse(ctx, "does not act beside --plan, which trains nothing", "resume", "dry_run", "smoke", "diff")
        if samples_per_second is not None:
            refuse(ctx, "does not act beside --samples-per-second", "utilisation")
        if diff:
            refuse(ctx, "does not act beside --recipe-diff, which trains nothing", "resume", "dry_run", "smoke")
        if smoke:
            refuse(ctx, "does not act beside --smoke, which begins anew", "resume")
        with training_errors():
            from fixclip_core.training.recipe import load_recipe, naming_places, recipe_diff

            schema = imported(kind.schema)
            refuse_another_kind(recipe, kind)
            # The smoke test generates its data, whatever the recipe reads.
            chosen = load_recipe(schema, recipe, overrides or [], {"data.source": "scenes"} if smoke else None)
            if diff:
                for key, value, reference in recipe_diff(chosen, load_recipe(schema, kind.reference)):
                    echo(f"{key}: {value!r} ({kind.reference}: {reference!r})")
            elif plan:
                from fixclip_core.training.encoder.plan import Cluster, cluster_plan

                cluster = Cluster(gpus, gpu, samples, samples_per_second, utilisation, sample_kb, price)
                typer.echo("Building the model and measuring memory, which takes up to a minute ...", err=True)
                echo(format_columns(cluster_plan(chosen, cluster)))
            else:
                with naming_places(chosen, recipe, overrides or []):
                    run(imported(kind.trainer), chosen, resume=resume, dry_run=dry_run, smoke=smoke)

    train.__doc__ = kind.help
    return train


def refuse_another_kind(recipe: str, kind: Kind) -> None:
    """Raises:
    ValueError: it is a built-in recipe of the other kind and none of this one, or a file with sections of the other
        kind alone.
    """
    from fixclip_core.training.recipe import builtin_recipes, sections_of

    own = imported(kind.schema)
    if recipe in builtin_recipes(own):
        return
    foreign = sections_of(own, recipe) - own.model_fields.keys()
    for name, other in KINDS.items():
        schema = imported(other.schema)
        if recipe in builtin_recipes(schema) or (foreign and foreign <= schema.model_fields.keys()):
            raise ValueError(f"{recipe} is a recipe of fixclip train {name}")


@contextmanager
def leaving_no_folder(folder: Path) -> Iterator[None]:
    """Remove the folder again, and those above it, where the block made them and left nothing in them."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


for _name, _kind in KINDS.items():
    train_app.command(_name)(command(_kind))


def imported(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(import_module(module), attribute)


def run(trainer: "type[Trainer]", recipe: "Section", *, resume: str, dry_run: bool, smoke: bool) -> None:
    """Train, or plan, or train two steps; the main process says what came of it.

    Raises:
        ValueError, FloatingPointError, OSError: see `Trainer.train`.
    """
    from fixclip_core.device import limit_threads
    from fixclip_core.training import trainer as training

    limit_threads()
    if dry_run and smoke:
        raise ValueError("--dry-run trains nothing and --smoke trains two steps; give one of the two")
    if dry_run:
        with leaving_no_folder(Path(cast(Any, recipe).output.folder)):
            echo(trainer(recipe).prepare(resume).plan())
    elif smoke:
        training.smoke(trainer, recipe)
        echo("Smoke test passed: two steps on generated data, a checkpoint, and the files that come out.")
    else:
        made = trainer(recipe)
        with failing_once_begun(made):
            echo(f"Done: {made.train(resume)}")


@contextmanager
def failing_once_begun(trainer: "Trainer") -> Iterator[None]:
    """Exit code 1 for what ends a training: from its first step on, or whatever is no wrong input, as a full disk."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        with errors_exit_with(1 if trainer.has_begun or not isinstance(error, ValueError) else 2):
            raise


@contextmanager
def training_errors() -> Iterator[None]:
    """Log from the main process; print an error from the first process that fails, and 130 after Ctrl-C.

    The others end with the same exit code and without a word: where a recipe is wrong, all of them fail alike.
    """
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.ERROR if rank else logging.WARNING, format="%(levelname)s %(message)s")
    for package in ("fixclip_core", "fixclip_diffusion"):
        logging.getLogger(package).setLevel(logging.ERROR if rank else logging.INFO)
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_first_to_fail():
            raise typer.Exit(getattr(error, "exit_code", 2)) from None
        if rank:
            error.args = (f"process {rank}: {error}",)
        raise
    except KeyboardInterrupt as error:
        raise typer.Abort(str(error) or "interrupted before the first step") from None


def is_first_to_fail() -> bool:
    """Whether no other process of this launcher, on this machine, has failed before: by a file that one can make.

    The launcher is the parent of all of them. It may restart them (`--max-restarts`), and each try has its own file.
    Files of launchers that have ended are removed.
    """
    folder, start = Path(tempfile.gettempdir()), "fixclip-failed-"
    for other in folder.glob(f"{start}*"):
        pid = other.name.removeprefix(start).partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            other.unlink(missing_ok=True)
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")]
    digest = hashlib.sha256("\n".join(launch).encode()).hexdigest()[:16]
    try:
        (folder / f"{start}{os.getppid()}-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk: better twice than never
        return True
    return True


def echo(text: str) -> None:
    """Print it from one process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(text)


def launch(kind: str) -> None:
    """What the launchers `train_encoder.py` and `train_adapter.py` call."""
    app(["train", kind, *sys.argv[1:]])
