"""Questions, and the journals that their answers are kept in."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

from fixclip_core.synthesis.accept import Answer
from fixclip_core.synthesis.prompts import Prompt
from fixclip_core.synthesis.recipe import Kind


@dataclass(frozen=True, order=True)
class Task:
    """One question: sample number `index`, asked for a caption of this kind for the `attempt`-th time (0, 1, ...)."""

    index: int
    kind: Kind
    attempt: int

    @property
    def id(self) -> str:
        """E.g. `long-0-000000012`, the custom_id of a batch line."""
        return f"{self.kind}-{self.attempt}-{self.index:09d}"

    @staticmethod
    def parse(name: Any) -> "Task":
        """The task of an id; raises ValueError."""
        kind, attempt, index = str(name).split("-")
        if kind not in ("long", "short"):
            raise ValueError(f"{name!r} names no task")
        return Task(int(index), cast(Kind, kind), int(attempt))


def journal_row(task: Task, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """A line of a journal."""
    return {"task": task.id, "prompt": prompt.id, "answer": asdict(answer)}


class Journal:
    """A file of JSON lines that only grows. A line that was cut off by a crash or a full disk counts as not written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, object) of every whole line.

        Raises:
            ValueError: a line is no JSON object; names it.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except ValueError as error:
                    raise ValueError(f"{self.path}:{number}: damaged ({error}); delete this line") from None
                yield number, row

    def begin(self, inputs: str) -> None:
        """Write a new journal's first line, the hash of the images that it is about; raises OSError."""
        if self._file is None:
            self._file = self._open()
        if not self._file.tell():
            self.append({"inputs": inputs})

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line, all or nothing.

        Raises:
            OSError: it could not be written.
        """
        if self._file is None:
            self._file = self._open()
        data = json.dumps(row).encode() + b"\n"
        start = self._file.tell()
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def _open(self) -> FileIO:
        file = FileIO(self.path, "r+" if self.path.exists() else "x+")
        content_end = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = content_end if content_end == 0 else _after_last_newline(file, content_end)
        file.truncate(whole)
        file.seek(whole)
        return file

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _after_last_newline(file: FileIO, end: int) -> int:
    """Where the last whole line ends."""
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
