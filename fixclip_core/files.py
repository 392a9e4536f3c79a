"""Files: written so that no reader meets half of one, in folders that one process at a time writes to; safe JSON."""

import glob
import json
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

_GIB = 2**30
LOCK = ".lock"
HOLDER = ".lock.json"
LOCK_PATIENCE = 6.0  # seconds; the loading processes of a killed training hold its lock for up to 5 more


def write_atomically(path: Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write a file that is, at any moment, either absent, the old one or complete.

    What a killed process of this machine left of an earlier try is removed.

    Args:
        path: the file; its folder exists.
        content: its bytes, or a function that writes them to the path it is given.

    Raises:
        OSError: the disk is full or gone, with the file's name; what was there before is untouched.
    """
    _remove_abandoned(path)
    temporary = path.with_name(_temporary_name(path, os.getpid()))
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        if type(error).__name__ == "SafetensorError":  # its only word for a full disk
            raise OSError(f"{path}: {error}") from error
        raise


def _temporary_name(path: Path, pid: int | str) -> str:
    return f".{path.name}.{platform.node()}.{pid}.tmp"


def _remove_abandoned(path: Path) -> None:
    start, end = _temporary_name(path, "|").split("|")
    for other in path.parent.glob(f"{glob.escape(start)}*{end}"):
        pid = other.name.removeprefix(start).removesuffix(end)
        if pid.isdecimal() and not is_running(int(pid)):
            other.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


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
        raise ValueError(f"output {str(path)!r} cannot be written: {path.parent}: {error.strerror}") from error


def prepare_folder(
    folder: Path, needed_bytes: int = 0, *, way_out: str = "choose another folder", empty: bool = False
) -> None:
    """Make an output folder, try it out and compare its free space: before the work, not at hour nine.

    Args:
        folder: to write into.
        needed_bytes: that will be written.
        way_out: what to do where the disk has less.
        empty: refuse a folder that holds anything.

    Raises:
        ValueError: it is a file, holds something although it must be empty, cannot be made or written to, or has less
            than `needed_bytes` left.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder")
        if empty and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is not empty; nothing was written")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from None
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"{folder}: too little disk space: {free / _GIB:.2f} GiB free, {needed_bytes / _GIB:.2f} GiB needed; "
            f"{way_out}"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """An output folder that is new or empty; one that did not exist goes away if the block fails with nothing in it.

    Raises:
        ValueError: see `prepare_folder`.
    """
    existed = folder.exists()
    prepare_folder(folder, empty=True)
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def lock_folder(folder: Path, *, wait: bool = False) -> "BaseFileLock":
    """Hold a folder for this process until `release()`, or until the process ends, by kill -9 too.

    Args:
        folder: it exists; `.lock` in it is held through the operating system, `.lock.json` says by whom.
        wait: until another process that holds it is done, however long that takes.

    Raises:
        ValueError: another process holds it, and this one is not to wait; the message says which.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        if not wait:
            raise ValueError(
                f"{folder}: {_holder(folder)} is writing there; wait for it, end it, or choose another output folder"
            ) from None
        logger.warning("%s: %s is writing there; waiting until it is done", folder, _holder(folder))
        lock.acquire()
    entry = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": shlex.join(sys.argv),
    }
    write_atomically(folder / HOLDER, json.dumps(entry).encode())
    return lock


def _holder(folder: Path) -> str:
    try:
        entry = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {entry['pid']} on {entry['host']} ({entry['command']}, since {entry['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for files of others.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply (100,000 brackets), where json raises RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
