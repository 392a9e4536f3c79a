"""Manifests (.jsonl, .csv, .tsv) and ShareGPT4V's .json."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST_EXTENSIONS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")


def read_manifest(path: Path, captioned: bool = True) -> Iterator[dict[str, Any]]:
    """Rows {"image", "long", "short", "line", "extra"} of a manifest or of ShareGPT4V's JSON; values are unchecked.

    Args:
        path: the manifest.
        captioned: whether it must have long captions; images alone are enough to write captions for.

    Raises:
        ValueError: what cannot be parsed, or the wrong columns, with file and line.
    """
    readers = {".json": _json_items, ".csv": _csv_items, ".tsv": _csv_items}
    empty = True
    try:
        for line, item in readers.get(path.suffix.lower(), _jsonl_items)(path):
            if not isinstance(item, dict):
                raise ValueError(f"{path}:{line}: expected an object with `image` and `long`, got {item!r}"[:300])
            if empty and not ("image" in item and ("long" in item or "conversations" in item or not captioned)):
                found = ", ".join(map(str, item))
                columns = "`image`, `long` and optionally `short`" if captioned else "`image`"
                raise ValueError(f"{path}:{line}: expected {columns}, found {found}")
            empty = False
            row = {"image": item.get("image"), "long": _long(item), "short": item.get("short"), "line": line}
            extra = {name: value for name, value in item.items() if name not in {*row, "conversations", "id"}}
            yield row | ({"extra": extra} if extra else {})
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if empty:
        raise ValueError(f"{path}: it holds no sample")


def _long(item: dict[str, Any]) -> Any:
    """The long caption: `long`, or the answer in ShareGPT4V's conversation."""
    if "conversations" not in item:
        return item.get("long")
    try:
        return item["conversations"][1]["value"]
    except (IndexError, KeyError, TypeError):
        return None


def _jsonl_items(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                item = json.loads(text) if text else None
            except ValueError as error:  # of the decoding and of the JSON
                raise ValueError(f"{path}:{number}: not a line of JSON in UTF-8: {error}") from None
            if text:
                yield number, item


def _csv_items(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for item in reader:
                if None in item:
                    raise ValueError(f"more than {len(reader.fieldnames or [])} columns; is a quote missing?")
                yield reader.line_num, {**item, "short": item.get("short") or None}
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}:{max(reader.line_num, 1)}: not a row of CSV in UTF-8: {error}") from None


def _json_items(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list, one at a time: the whole list of a million would take several times the file."""
    text, decoder = _read_text(path), json.JSONDecoder()
    position, line, counted = _skip_space(text, 0), 1, 0
    if text[position : position + 1] != "[":
        raise ValueError(f"{path}:1: expected a JSON list of objects with `image` and `conversations`")
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        yield line, item
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}:{text.count(chr(10), 0, position) + 1}: expected a comma or the list's end")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason}") from None


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position
