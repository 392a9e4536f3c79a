"""Rows of a manifest or a folder, and the image files they name."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fixclip_core.data.samples import BadSampleError, Sample


class Rows:
    """Many small dicts in two arrays: worker processes share them, while touching a list of dicts copies it."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin = self.ends[index - 1] if index else 0
        return json.loads(self.data[begin : self.ends[index]].tobytes())


def pack_rows(rows: Iterable[dict[str, Any]]) -> Rows:
    data, ends = bytearray(), []
    for row in rows:
        data += json.dumps(row).encode()
        ends.append(len(data))
    return Rows(np.frombuffer(data, np.uint8), np.array(ends, np.int64))


class RowSource:
    """Image files and their captions. A sample's key is its image's path as the manifest gives it."""

    remote = False

    def __init__(self, rows: Rows, root: Path, origin: Path) -> None:
        self.rows, self.root, self.origin = rows, root, origin
        self.sizes = [len(rows)]

    def read(self, index: int) -> Sample:
        row = self.rows[index]
        line = f":{row['line']}" if "line" in row else ""
        file, key = f"{self.origin}{line}", str(row["image"])
        if not isinstance(row["image"], str) or not row["image"]:
            raise BadSampleError("wrong_type", file, key, f"image is {row['image']!r}"[:200])
        if "text" in row:
            short_text = str(Path(row["text"]).with_suffix(".short.txt"))
            long, short = (self._text(name, file, key) for name in (row["text"], short_text))
        else:
            long, short = row["long"], row["short"]
        return Sample(file, key, self._bytes(row["image"], file, key), long, short, row.get("extra", {}))

    def _bytes(self, name: str, file: str, key: str) -> bytes:
        path = self.root / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise BadSampleError("missing_file", file, key, path) from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise BadSampleError("unreadable_file", file, key, error) from None

    def _text(self, name: str, file: str, key: str) -> str | None:
        if not (self.root / name).exists():
            return None
        try:
            return self._bytes(name, file, key).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("wrong_type", file, key, f"{name}: {error}") from None

    def fingerprint(self, index: int) -> str:
        row = self.rows[index]
        names = [row[name] for name in ("image", "text") if isinstance(row.get(name), str)]
        return json.dumps([{k: v for k, v in row.items() if k != "line"}, [stamp(self.root / n) for n in names]])


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
