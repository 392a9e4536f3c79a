"""Running the command `fixclip` in tests, which see 40 columns, no colours and long paths (conftest.py)."""

from typer.testing import CliRunner

from fixclip_cli.main import app


def run(*arguments, **kwargs):
    """`fixclip ARGUMENTS`; the result has exit_code, output, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)


def error_of(result, code=2):
    """The one line of an error, the last one of stderr, after a look at the exit code."""
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], result.output
    assert "Traceback" not in result.output
    return lines[-1].removeprefix("error: ")
