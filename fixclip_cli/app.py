"""The command `fixclip`: the app that the commands join, the one way errors are shown, options that commands share."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

UsageError: Any = typer.BadParameter.__base__  # click's, wherever this version of typer keeps it
TRAINING_LIBRARIES = ("matplotlib", "omegaconf", "open_clip", "psutil", "pydantic", "tensorboard", "webdataset")


class Commands(TyperGroup):
    """A group of commands whose errors are one line on stderr, `error: ...`, never wrapped and never in a box.

    Errors are usage errors (exit code 2), ValueError and OSError (exit code 2, or that of `errors_exit_with`) and a
    missing extra (2). Any other exception is a bug and keeps its traceback. `--traceback` anywhere on the command
    line shows the traceback of an error too. Without arguments the group shows its help.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def main(self, args: Any = None, standalone_mode: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        options = args[: args.index("--")] if "--" in args else args
        with_traceback = "--traceback" in options
        if with_traceback:
            args.remove("--traceback")
        try:
            code = super().main(args, standalone_mode=False, **kwargs)
        except (UsageError, ValueError, OSError, ModuleNotFoundError) as error:
            message = describe(error)
            if with_traceback:
                traceback.print_exc()
            typer.echo(f"error: {message}", err=True)
            code = getattr(error, "exit_code", 2)
        except typer.Abort:
            code = 130
        if code == 130:
            typer.echo("interrupted", err=True)
        if standalone_mode:
            sys.exit(code)
        return code


def describe(error: Exception) -> str:
    """One line for a user.

    Raises:
        ModuleNotFoundError: `error` is one, and not of an extra.
    """
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").split(".")[0]
        if library not in TRAINING_LIBRARIES:
            raise error
        return f"this command needs {library}: pip install 'fixclip[train]'"
    if isinstance(error, UsageError):
        ctx = getattr(error, "ctx", None)
        message = error.format_message()
        return f"{message.rstrip('.')}; see {ctx.command_path} --help" if ctx is not None else message
    return " ".join(line.strip() for line in str(error).splitlines())


@contextmanager
def errors_exit_with(code: int) -> Iterator[None]:
    """Errors of the body end the command with this exit code instead of 2: 1 for work that ran for hours."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.exit_code = code  # type: ignore[union-attr]
        raise


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fixclip {version('fixclip')}")
        raise typer.Exit


@app.callback()
def fixclip(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error arose; for every command.")
    ] = False,
) -> None:
    """Long prompts in Stable Diffusion, and the long-text CLIP behind them."""


# -- options that commands share -----------------------------------------------------------------------------

DEFAULT_OUTPUT = Path("outputs")

BaseOption = Annotated[str, typer.Option(help="Stable Diffusion 1.x or 2.x: a folder, a hub name or builtin:scenes.")]
EncoderOption = Annotated[str | None, typer.Option(help="FIX-CLIP or Long-CLIP text encoder: a folder or hub name.")]
AdapterOption = Annotated[str | None, typer.Option(help="Adapter on the text states: a folder or hub name.")]

ImageRoot = Annotated[str | None, typer.Option(help="What image paths are relative to [manifest's folder].")]
Start = Annotated[int, typer.Option(min=0, help="First sample to use.")]
Stop = Annotated[int | None, typer.Option(min=1, help="Sample to stop before.")]

ModelNameOption = Annotated[
    str | None,
    typer.Option(help="open_clip model name, for weight files that do not tell their activation."),
]


def parse_size(value: str) -> tuple[int, int]:
    """`512` or `512x768` (width x height) to (width, height).

    Raises:
        ValueError: not numbers, not multiples of 8, or out of 8..4096.
    """
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{value!r}: give one number or WIDTHxHEIGHT, like 512 or 512x768")
    width, height = int(parts[0]), int(parts[-1])
    if any(side % 8 or not 8 <= side <= 4096 for side in (width, height)):
        raise ValueError(f"{value!r}: width and height must be multiples of 8 between 8 and 4096")
    return width, height


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the command line, a file, or standard input (`-`).

    Raises:
        ValueError: none or both were given, the file is not readable UTF-8 text, or the text is empty.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give a PROMPT (- for standard input) or --prompt-file FILE, one of the two")
    try:
        if prompt_file is not None:
            text = prompt_file.read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if prompt == "-" else str(prompt)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise ValueError(f"{prompt_file or 'standard input'}: {reason}") from error
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text.strip()
