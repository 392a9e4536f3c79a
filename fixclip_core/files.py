"""Writing files so that no reader meets half of one, and finding out in time that they cannot be written."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write a file that is, at any moment, either absent, the old one or complete.

    Args:
        path: the file; its folder exists.
        content: its bytes, or a function that writes them to the path it is given.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        temporary.chmod(mode)  # safetensors makes its files private
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def prepare_output(path: Path) -> None:
    """Make the folder that `path` is to be written into and try it out: before the work, not after it.

    Raises:
        ValueError: `path` is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output {str(path)!r} cannot be written: {error}") from error
