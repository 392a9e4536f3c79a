"""Manifests (.jsonl, .csv, .tsv, .parquet), ShareGPT4V's .json, and the metadata of Hugging Face's imagefolder."""

import csv
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixclip_core.data.config import DataConfig
from fixclip_core.files import parse_json

MANIFEST_EXTENSIONS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Names that others give the columns, for the hint in an error.
_IMAGE_NAMES = frozenset(
    ["image", "images", "img", "file", "files", "filename", "filepath", "imagepath", "imagefile", "path", "url"]
)
_CAPTION_NAMES = frozenset(["long", "caption", "captions", "longcaption", "text", "title", "description", "prompt"])


def read_manifest(path: Path, config: DataConfig | None = None, captioned: bool = True) -> Iterator[dict[str, Any]]:
    """Rows {"image", "long", "short", "line", "extra"} of a manifest or of ShareGPT4V's JSON; values are unchecked.

    Args:
        path: the manifest.
        config: its image_key, caption_key and short_key name the columns; by default `image`, `long` and `short`, and
            in metadata files also Hugging Face's `file_name` and `text`.
        captioned: whether it must have long captions; images alone are enough to write captions for.

    Raises:
        ValueError: what cannot be parsed, or the wrong columns, with file and line.
    """
    readers = {".json": _json_items, ".csv": _csv_items, ".tsv": _csv_items, ".parquet": _parquet_items}
    columns: Columns | None = None
    try:
        for line, item in readers.get(path.suffix.lower(), jsonl_items)(path):
            if not isinstance(item, dict):
                raise ValueError(f"{path}:{line}: expected an object with `image` and `long`, got {reprlib.repr(item)}")
            if columns is None:
                first = 1 if path.suffix.lower() in (".csv", ".tsv") else line  # of a table its header
                usual = path.name.lower() in METADATA_NAMES
                columns = find_columns(f"{path}:{first}", list(item), config, captioned, usual)
            row = {name: item.get(column) for name, column in vars(columns).items()} | {"line": line}
            if path.suffix.lower() in (".csv", ".tsv"):
                row["short"] = row["short"] or None
            if columns.long == "long" and "conversations" in item:
                row["long"] = _answer(item["conversations"])
            extra = {name: value for name, value in item.items() if name not in columns.known}
            yield row | ({"extra": extra} if extra else {})
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if columns is None:
        raise ValueError(f"{path}: it holds no sample")


@dataclass(frozen=True)
class Columns:
    """The columns of a manifest that hold an image's path, its long and its short caption."""

    image: str
    long: str
    short: str

    @property
    def known(self) -> set[str]:
        """Columns that are no further fields of a sample."""
        return {self.image, self.long, self.short, "image", "long", "short", "line", "conversations", "id"}


def find_columns(
    where: str, found: list[str], config: DataConfig | None, captioned: bool = True, hugging_face: bool = False
) -> Columns:
    """The columns that `config` names by image_key, caption_key and short_key, else `image`, `long` and `short`.

    Args:
        where: the file and line that an error names.
        found: the names that are there.
        config: None for the default names.
        captioned: whether there must be long captions.
        hugging_face: whether `file_name` and `text` are taken where the default names are not there.

    Raises:
        ValueError: there are no such columns; it says what is there and how to name it.
    """
    chosen = {name: getattr(config, name, None) for name in ("image_key", "caption_key", "short_key")}
    for option, name in chosen.items():
        if name is not None and name not in found:
            raise ValueError(f"{where}: {option}={name!r} names no column; there are {', '.join(map(str, found))}")
    image, long, short = chosen["image_key"] or "image", chosen["caption_key"] or "long", chosen["short_key"] or "short"
    if hugging_face and not chosen["image_key"] and "image" not in found:
        image = "file_name"
    if hugging_face and not chosen["caption_key"] and "long" not in found:
        long = "text"
    has_caption = long in found or (long == "long" and "conversations" in found)
    if image in found and (has_caption or not captioned):
        return Columns(image, long, short)
    expected = f"`{image}`, `{long}` and optionally `{short}`" if captioned else f"`{image}`"
    raise ValueError(f"{where}: expected {expected}, found {', '.join(map(str, found))}{_column_hint(found)}")


def _column_hint(found: list[str]) -> str:
    """What is usually meant by such columns, and how to say so."""
    if len(found) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
            if separator in str(found[0]):
                way = {"\t": "name the file .tsv", ",": "name the file .csv"}.get(separator, "save it with commas")
                return f"; its columns are separated by {name}: {way}"
    image, caption = (
        next((name for name in found if re.sub(r"[\W_]", "", str(name)).lower() in names), None)
        for names in (_IMAGE_NAMES, _CAPTION_NAMES)
    )
    return (
        f"; name the columns: image_key={image or '...'!s} caption_key={caption or '...'!s} "
        "(in a recipe data.image_key, on the command line --image-key)"
    )


def _answer(conversation: Any) -> Any:
    """The long caption in ShareGPT4V's conversation: its second turn."""
    try:
        return conversation[1]["value"]
    except (IndexError, KeyError, TypeError):
        return None


# -- readers: (line, item) of each item of a file ------------------------------------------------------------


def jsonl_items(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, item) of a file of one JSON value a line; blank lines are passed over.

    Raises:
        ValueError: a line is not JSON in UTF-8, or nested too deeply.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                item = parse_json(text) if text else None
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at column {error.colno}"
                raise ValueError(f"{path}:{number}: not a line of JSON: {problem}") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a line of JSON in UTF-8: {error}") from None
            if text:
                yield number, item


class _RowLines:
    """Lines of a file, and those that the row being read is made of."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines, self.row, self.ended = iter(lines), list[str](), False

    def __iter__(self) -> "_RowLines":
        return self

    def __next__(self) -> str:
        try:
            self.row.append(next(self.lines))
        except StopIteration:
            self.ended = True
            raise
        return self.row[-1]


def _csv_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows by the header's names. Their line is their last, and that of an unclosed quote the one it is opened in."""
    options: dict[str, Any] = {"delimiter": "\t" if path.suffix.lower() == ".tsv" else ","}
    header: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _RowLines(file)
        reader = csv.reader(lines, **options)
        try:
            for cells in reader:
                if _has_open_quote(lines, options):
                    line = reader.line_num - len(lines.row) + 1
                    raise ValueError(f"{path}:{line}: a quote that is opened here is not closed")
                lines.row.clear()
                if not header:
                    header = _csv_header(cells)
                elif len(cells) > len(header):
                    raise csv.Error(f"more than {len(header)} columns; is a quote missing?")
                elif cells:
                    yield reader.line_num, dict.fromkeys(header) | dict(zip(header, cells, strict=False))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{_undecodable_line(path)}: not UTF-8: {error.reason}") from None
        except csv.Error as error:
            raise ValueError(f"{path}:{max(reader.line_num, 1)}: not a row of CSV: {error}") from None


def _csv_header(cells: list[str]) -> list[str]:
    twice = [name for name, count in Counter(cells).items() if count > 1]
    if twice:
        raise csv.Error(f"there is more than one column {twice[0]!r}")
    return cells


def _has_open_quote(lines: _RowLines, options: dict[str, Any]) -> bool:
    """Whether the row just read has swallowed others: Python's reader takes all up to the next quote for one cell.

    Then the file has ended within the row, or text follows a closing quote in a row of several lines.
    """
    if lines.ended or len(lines.row) < 2:
        return lines.ended
    try:
        next(csv.reader(lines.row, strict=True, **options))
    except csv.Error:
        return True
    return False


def _undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


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
        except RecursionError:
            raise ValueError(f"{path}:{line}: JSON that is nested too deeply") from None
        yield line, item
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}:{text.count(chr(10), 0, position) + 1}: expected a comma or the list's end")
    position = _skip_space(text, position + 1)
    if position < len(text):
        line = text.count("\n", 0, position) + 1
        raise ValueError(f"{path}:{line}: something follows the end of the list; a manifest is one list")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{_undecodable_line(path)}: not UTF-8: {error.reason}") from None


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _parquet_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows by their number, 1 for the first; what JSON cannot hold (bytes, dates) is left out."""
    pyarrow = import_pyarrow(path)
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            pictures = [name for name, value in row.items() if isinstance(value, dict) and "bytes" in value]
            if pictures:
                raise ValueError(
                    f"{path}: column {pictures[0]!r} holds the pictures themselves: save the data set with "
                    '`datasets.load_dataset("parquet", data_files=..., split="train").save_to_disk(FOLDER)`'
                )
            yield number, {name: value for name, value in row.items() if is_plain(value)}
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from None


def is_plain(value: Any) -> bool:
    """Whether a value is text, a number, a truth value or nothing: what a further field of a sample can be."""
    return value is None or isinstance(value, str | int | float | bool)


def import_pyarrow(path: Path) -> Any:
    """The library pyarrow, which only parquet files and Hugging Face's data sets need.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading it needs pyarrow: pip install 'fixclip[parquet]'") from None
    return pyarrow
