"""Rows of a manifest or a folder, and the image files they name."""

import json
import reprlib
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
        try:
            data += json.dumps(row).encode()
        except RecursionError:
            raise ValueError(f"{row.get('image')}: its row is nested too deeply") from None
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
        origin = self.root / row["origin"] if "origin" in row else self.origin
        file, key = f"{origin}{line}", str(row["image"])
        if not isinstance(row["image"], str) or not row["image"]:
            raise BadSampleError("wrong_type", file, key, f"image is {reprlib.repr(row['image'])}")
        place = row.get("text", "long caption in its row")
        if "text" in row:
            short_text = row.get("short_text", short_name(row["text"]))
            long, short = (self._text(name, file, key) for name in (row["text"], short_text))
        else:
            long, short = row["long"], row["short"]
        image = read_file(self.root / row["image"], file, key)
        return Sample(file, key, image, long, short, row.get("extra", {}), place)

    def _text(self, name: str, file: str, key: str) -> str | None:
        if not (self.root / name).exists():
            return None
        try:
            return read_file(self.root / name, file, key).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("wrong_type", file, key, f"{name}: {error}") from None

    def fingerprint(self, index: int) -> str:
        row = self.rows[index]
        names = [row[name] for name in ("image", "text", "short_text") if isinstance(row.get(name), str)]
        return json.dumps([{k: v for k, v in row.items() if k != "line"}, [stamp(self.root / n) for n in names]])


def read_file(path: Path, file: str, key: str) -> bytes:
    """The content of a sample's file; raises BadSampleError "missing_file" or "unreadable_file"."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        detail = f"there is no {path}; is image_root what paths are relative to?"
        raise BadSampleError("missing_file", file, key, detail) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSampleError("unreadable_file", file, key, error) from None


def short_name(text: str) -> str:
    """The file of the short caption beside that of the long one: `0.txt` -> `0.short.txt`."""
    return str(Path(text).with_suffix(".short.txt"))


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
