"""The command `fixclip`: the app that the commands join, the one way errors are shown, options that commands share.

An error is one line on stderr, `error: ...`, never wrapped and never in a box: it can be searched for, copied and read
in a log. Mistakes in a recipe have a line each. Exit codes: 0 done; 2 wrong usage or input; 1 work that ran for hours
failed, or a check found nothing usable (`errors_exit_with`); 130 interrupted. A bug keeps its traceback, and
`--traceback` shows that of an error too.
"""

import io
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

UsageError: Any = typer.BadParameter.__base__  # click's, wherever this version of typer keeps it
USER_ERRORS = (UsageError, ValueError, OSError, FloatingPointError)
TRAINING_LIBRARIES = ("matplotlib", "omegaconf", "open_clip", "psutil", "pydantic", "tensorboard", "webdataset")
EXTRAS = dict.fromkeys(TRAINING_LIBRARIES, "train") | {
    "openai": "caption",
    "py3langid": "caption",
    "ray": "ray",
    "gradio": "app",
}


class Command(TyperCommand):
    """A command that is an app of its own, such as `fixclip-app`."""

    def main(self, args: Any = None, standalone_mode: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        return _with_one_line_errors(super().main, args, standalone_mode, **kwargs)


class Commands(TyperGroup):
    """A group of commands; without arguments it shows its help."""

    def main(self, args: Any = None, standalone_mode: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        return _with_one_line_errors(super().main, args, standalone_mode, **kwargs)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


def _with_one_line_errors(
    main: Callable[..., Any], args: Sequence[str] | None, standalone_mode: bool, **kwargs: Any
) -> Any:
    """Run click's `main`, print an error and end the process with its code, or return the code."""
    for stream in (sys.stdout, sys.stderr):  # a file name that is not UTF-8 is printed with escapes, and ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = list(sys.argv[1:] if args is None else args)
    options = args[: args.index("--")] if "--" in args else args
    with_traceback = "--traceback" in options
    if with_traceback:
        args.remove("--traceback")
    interrupted = "interrupted"
    try:
        refuse_other_encodings(args)
        code = main(args, standalone_mode=False, **kwargs)
    except (*USER_ERRORS, ModuleNotFoundError) as error:
        messages = getattr(error, "problems", None) or [describe(error)]
        if with_traceback:
            traceback.print_exc()
        for message in messages:
            typer.echo(f"error: {message}", err=True)
        code = getattr(error, "exit_code", 2)
    except typer.Abort as error:
        code, interrupted = 130, str(error) or interrupted
    if code == 130:
        typer.echo(interrupted, err=True)
    if standalone_mode:
        sys.exit(code)
    return code


def refuse_other_encodings(args: Sequence[str]) -> None:
    """Refuse arguments that were no UTF-8: no file, no picture's metadata and no tokenizer could hold them.

    Raises:
        ValueError: names the argument, with its foreign bytes as \\udcXX.
    """
    for argument in args:
        if not argument.isascii() and not _is_text(argument):
            raise ValueError(f"argument {argument!a} is not UTF-8; look at the terminal's encoding (LANG)")


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def describe(error: Exception) -> str:
    """One line for a user.

    Raises:
        ModuleNotFoundError: `error` is one, and of no extra: the installation is broken.
    """
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").split(".")[0]
        if library not in EXTRAS:
            raise error
        return f"this command needs {library}: pip install 'fixclip[{EXTRAS[library]}]'"
    if isinstance(error, UsageError):
        ctx = getattr(error, "ctx", None)
        message = error.format_message()
        return f"{message.rstrip('.')}; see {ctx.command_path} --help" if ctx is not None else message
    if hasattr(error, "errors"):  # pydantic's ValidationError, which is a ValueError
        lines = [_describe_field(details) for details in error.errors()]
    else:
        lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def _describe_field(details: dict[str, Any]) -> str:
    name, message = ".".join(map(str, details["loc"])), details["msg"].removeprefix("Value error, ")
    return f"{name}={details['input']!r}: {message}" if name else message


@contextmanager
def errors_exit_with(code: int) -> Iterator[None]:
    """Errors of the body end the command with this exit code instead of 2."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        error.exit_code = code  # type: ignore[union-attr]
        raise


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line, and not a default or a picture's setting."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse(ctx: typer.Context, reason: str, *names: str) -> None:
    """No option is ignored silently: refuse those that would not act beside the others.

    Args:
        ctx: of the command.
        reason: words behind the option's name, e.g. "acts on --data only".
        names: the options, as parameters of the command.

    Raises:
        ValueError: one of them is on the command line.
    """
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name in names:
        if is_given(ctx, name):
            raise ValueError(f"{options[name]} {reason}")


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, a row a line, however long: nothing is wrapped or cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

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

DEFAULT_OUTPUT = "outputs"

BaseOption = Annotated[
    str,
    typer.Option(
        help="Stable Diffusion 1, 2 or XL: a folder, a hub name, one file, its URL on the hub or builtin:scenes."
    ),
]
EncoderOption = Annotated[str | None, typer.Option(help="FIX-CLIP or Long-CLIP text encoder: a folder or hub name.")]
Encoder2Option = Annotated[
    str | None,
    typer.Option("--encoder-2", help="The same for the second text encoder of Stable Diffusion XL (ViT-bigG/14)."),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(help="Adapter on the text states: a folder or hub name; none: without what the base holds, LoRA too."),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SOURCE[:SCALE]", help="LoRA: file, folder or hub name, like style.safetensors:0.7; repeat."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the fastest there is.")]
EmbeddingOption = Annotated[
    list[str] | None, typer.Option(help="Textual inversion: a file, whose name is its token, or a hub name; repeat.")
]
SchedulerOption = Annotated[
    str | None, typer.Option(help="A scheduler of diffusers, like EulerAncestralDiscrete; default: the model's own.")
]
WeightsOption = Annotated[
    Literal["a1111", "compel", "literal"] | None,
    typer.Option(help="Prompt weights: a1111 (word:1.3), compel word++, literal none; default: the base's, else none."),
]
# The registry's names and those of version 0.1, for an answer before a library is imported; a test compares them.
CONDITIONING_NAMES = ("stock", "chunks", "overlap", "one_pass")
OLD_CONDITIONING_NAMES = ("overlap_77", "windows_77", "truncate_77", "windows", "truncate")


def _check_conditioning(name: str | None) -> str | None:
    if name is not None and name not in (*CONDITIONING_NAMES, *OLD_CONDITIONING_NAMES):
        raise ValueError(f"conditioning={name!r}: valid are {', '.join(CONDITIONING_NAMES)}")
    return name


ConditioningOption = Annotated[
    str | None,
    typer.Option(
        "--conditioning",
        "--long-prompt",
        callback=_check_conditioning,
        help="How more than 77 tokens are read: overlap, one_pass, chunks or stock; default: as the encoder says.",
    ),
]

ImageRoot = Annotated[str | None, typer.Option(help="What image paths are relative to [manifest's folder].")]
ImageKey = Annotated[str | None, typer.Option(help="Column or, in shards, extension of the image.")]
CaptionKey = Annotated[str | None, typer.Option(help="Column, or extension of the text file, of the long caption.")]
ShortKey = Annotated[str | None, typer.Option(help="The same of the short caption.")]
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
    return check_text(text.strip(), "prompt")


def check_text(text: str, name: str) -> str:
    """Pass a text through that can be written to a file; a terminal of another encoding can pass half characters.

    Raises:
        ValueError: it holds lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is not a text in UTF-8: {text!r}") from error
    return text
