"""Captioned images -> batches, the same ones for every number of workers, and from any point of an epoch.

Every source can read any sample by its number, so order, ranks, workers and resuming are arithmetic on numbers:
batch `n` of epoch `e` is a function of (config, e, n) alone. Shards stay cheap to read because only a few of them
are shuffled together; remote ones are fetched whole, once, into a cache.

Shape letters: B samples of this rank, C channels, H height, W width, T tokens.
"""

import bisect
import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import random
import shlex
import tarfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset.cache import FileCache
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from fixclip_core.data.captions import (
    CaptionFilters,
    ShortCaptions,
    ShortPolicy,
    caption_pair,
    clean_caption,
    rejection,
)
from fixclip_core.files import write_atomically

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
MANIFEST_EXTENSIONS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")
# A thinner strip would be enlarged to millions of pixels by "resize the shortest side".
MAX_ASPECT_RATIO = 100
# Rejected by the user's own caption filters: reported, but no sign of damaged data.
FILTER_REASONS = frozenset(["too_short", "repetition", "not_sentences"])
_NEARBY_REPLACEMENTS = 8
_MAX_REPLACEMENTS = 64


class DataConfig(BaseModel):
    """What to train on and in which order.

    Attributes:
        source: shards (`data/shard-{000..099}.tar`, a folder of them, http(s)://, s3://, any `pipe:`; several
            joined by `::`), a manifest (.jsonl, .csv, .tsv), ShareGPT4V's .json, a folder of image + txt, or
            `scenes`.
        image_root: what a manifest's image paths are relative to; its own folder by default.
        start, stop: use samples start..stop-1 only; `stop` is the size of `scenes`.
        batch_size: samples per rank.
        workers: loading processes per rank, 0 for none. Batches do not depend on it.
        seed: of order, short captions, augmentation and image masks.
        shuffle: draw a new order for every epoch.
        shuffle_shards: how many shards are shuffled together; more mix better and read less locally.
        last_batch: `drop` the samples that do not fill a batch on every rank (others in every epoch), `wrap` to
            fill it up from the start of the epoch, or `keep` it smaller (one rank only).
        max_bad_share: training stops once more than this share of the samples could not be used.
        cache_dir, cache_gb: where remote shards are kept and how much of them.
        draft: let JPEGs be decoded at a fraction of their size where that is still twice the model's.
        short_caption, max_short_sentences, drop_short_from_long: see `captions.ShortCaptions`.
        filter_captions and the limits after it: see `captions.CaptionFilters`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    source: str
    image_root: str | None = None
    start: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=256, ge=1)
    workers: int = Field(default=4, ge=0)
    seed: int = Field(default=0, ge=0)
    shuffle: bool = True
    shuffle_shards: int = Field(default=16, ge=1)
    last_batch: Literal["drop", "wrap", "keep"] = "drop"
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    cache_dir: str = "~/.cache/fixclip/shards"
    cache_gb: float = Field(default=200.0, gt=0)
    draft: bool = True
    short_caption: ShortPolicy = "first_sentence"
    max_short_sentences: int = Field(default=3, ge=1)
    drop_short_from_long: bool = False
    filter_captions: bool = False
    min_words: int | None = CaptionFilters.min_words
    max_repeated_share: float | None = CaptionFilters.max_repeated_share
    max_word_run: int | None = CaptionFilters.max_word_run
    min_letter_share: float | None = CaptionFilters.min_letter_share
    min_words_per_clause: float | None = CaptionFilters.min_words_per_clause

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop={self.stop}: it must be larger than start={self.start}")
        self.caption_filters()
        return self

    def short_captions(self) -> ShortCaptions:
        return ShortCaptions(self.short_caption, self.max_short_sentences, self.drop_short_from_long)

    def caption_filters(self) -> CaptionFilters | None:
        limits = {name: getattr(self, name) for name in CaptionFilters.__dataclass_fields__}
        filters = CaptionFilters(**limits)
        return filters if self.filter_captions else None


# -- one sample ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A sample as its source holds it: nothing is decoded or checked yet."""

    file: str
    key: str
    image: bytes | Tensor
    long: Any
    short: Any


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used: why, and where to find it."""

    reason: str
    file: str
    key: str
    detail: str
    index: int = -1


class BadSampleError(Exception):
    """One sample cannot be used; `.skipped` says why. Never more than that sample's problem."""

    def __init__(self, reason: str, file: str, key: str, detail: object = "") -> None:
        super().__init__(f"{file}: {key}: {reason} {detail}".rstrip())
        self.skipped = Skipped(reason, file, key, str(detail))


def check_captions(sample: Sample, filters: CaptionFilters | None = None) -> tuple[str, str | None]:
    """The cleaned (long, short) captions of a sample; short is None where there is none.

    Raises:
        BadSampleError: "wrong_type", "empty_caption" or one of the filters' reasons.
    """
    for name, caption in (("long", sample.long), ("short", sample.short)):
        if not isinstance(caption, str) and (name == "long" or caption is not None):
            raise BadSampleError("wrong_type", sample.file, sample.key, f"{name} is {caption!r}"[:200])
    long = clean_caption(sample.long)
    if not any(character.isalnum() for character in long):
        raise BadSampleError("empty_caption", sample.file, sample.key)
    reason = rejection(long, filters) if filters else None
    if reason:
        raise BadSampleError(reason, sample.file, sample.key, long[:100])
    return long, (clean_caption(sample.short) or None) if sample.short else None


def decode_image(sample: Sample, draft_size: int | None = None) -> Image.Image:
    """The sample's picture, upright and RGB, decoded completely.

    Args:
        sample: its `image` is an encoded file, or a uint8 tensor (3, H, W).
        draft_size: JPEGs may come back smaller than they are, but with no side below this.

    Raises:
        BadSampleError: "decompression_bomb" (more than PIL's Image.MAX_IMAGE_PIXELS), "extreme_aspect_ratio",
            "not_an_image", "truncated_image" or "corrupt_image".
    """
    if isinstance(sample.image, Tensor):
        return Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(sample.image))
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise BadSampleError("extreme_aspect_ratio", sample.file, sample.key, image.size)
            if draft_size:
                image.draft(None, (draft_size, draft_size))
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except BadSampleError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError("decompression_bomb", sample.file, sample.key, error) from None
    except Exception as error:  # PIL's readers raise nearly anything on damaged files
        reason = "truncated_image" if "truncated" in str(error) or isinstance(error, EOFError) else "corrupt_image"
        if isinstance(error, UnidentifiedImageError):
            reason, error = "not_an_image", ValueError(f"{len(sample.image)} bytes in no known image format")
        raise BadSampleError(reason, sample.file, sample.key, error) from None


# -- sources: any sample by its number -----------------------------------------------------------------------


class Source(Protocol):
    """Numbered samples, in groups that are cheap to read together (shards).

    `remote`: a group is fetched as a whole.
    """

    remote: bool

    @property
    def sizes(self) -> Sequence[int]:
        """Samples per group."""

    def read(self, index: int) -> Sample:
        """Sample number `index`; raises BadSampleError if it cannot be had."""

    def fingerprint(self, index: int) -> str:
        """Changes when the sample does; cheap, so files are judged by size and time."""


def open_source(config: DataConfig) -> Source:
    """Recognise and open what `config.source` names.

    Raises:
        ValueError: it does not exist, is of no known kind, or is malformed (names file and line).
    """
    name = config.source
    path = Path(name).expanduser()
    if name == "scenes":
        return SceneSource(config)
    if path.is_dir():
        shards = _shards_in(path)
        return ShardSource(shards, config) if shards else RowSource(_folder_rows(path), path, path)
    if path.suffix.lower() in MANIFEST_EXTENSIONS and "://" not in name:
        root = Path(config.image_root).expanduser() if config.image_root else path.parent
        return RowSource(pack_rows(read_manifest(path)), root, path)
    urls = [match for url in expand_urls(name) for match in _matches(url)]
    if all(url.startswith("pipe:") or url.split("?")[0].endswith(".tar") for url in urls):
        return ShardSource(urls, config)
    problem = "is of no known kind" if path.exists() or "://" in name else "does not exist"
    raise ValueError(
        f"source {name!r} {problem}: give .tar shards, a manifest ({', '.join(MANIFEST_EXTENSIONS)}), "
        "a folder of shards or of image + txt, or 'scenes'"
    )


# -- manifests, ShareGPT4V, folders --------------------------------------------------------------------------


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


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """Rows {"image", "long", "short", "line"} of a manifest or of ShareGPT4V's JSON; values are unchecked.

    Raises:
        ValueError: what cannot be parsed, or the wrong columns, with file and line.
    """
    readers = {".json": _json_items, ".csv": _csv_items, ".tsv": _csv_items}
    empty = True
    try:
        for line, item in readers.get(path.suffix.lower(), _jsonl_items)(path):
            if not isinstance(item, dict):
                raise ValueError(f"{path}:{line}: expected an object with `image` and `long`, got {item!r}"[:300])
            if empty and not ("image" in item and ("long" in item or "conversations" in item)):
                found = ", ".join(map(str, item))
                raise ValueError(f"{path}:{line}: expected `image`, `long` and optionally `short`, found {found}")
            empty = False
            yield {"image": item.get("image"), "long": _long(item), "short": item.get("short"), "line": line}
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


def _folder_rows(folder: Path) -> Rows:
    """Every image below a folder; its long caption is the .txt of the same name, its short one the .short.txt."""
    images = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
    )
    if not images:
        raise ValueError(f"{folder}: no .tar shards and no images ({', '.join(IMAGE_EXTENSIONS)}) in this folder")
    return pack_rows({"image": str(image), "text": str(image.with_suffix(".txt"))} for image in images)


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
            long, short = self._text(row["text"], file, key), self._short_text(row["text"], file, key)
        else:
            long, short = row["long"], row["short"]
        return Sample(file, key, self._bytes(row["image"], file, key), long, short)

    def _bytes(self, name: str, file: str, key: str) -> bytes:
        path = self.root / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise BadSampleError("missing_file", file, key, path) from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise BadSampleError("unreadable_file", file, key, error) from None

    def _text(self, name: str, file: str, key: str) -> str:
        try:
            return self._bytes(name, file, key).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("wrong_type", file, key, f"{name}: {error}") from None

    def _short_text(self, name: str, file: str, key: str) -> str | None:
        short = str(Path(name).with_suffix(".short.txt"))
        return self._text(short, file, key) if (self.root / short).exists() else None

    def fingerprint(self, index: int) -> str:
        row = self.rows[index]
        names = [row[name] for name in ("image", "text") if isinstance(row.get(name), str)]
        return json.dumps([{k: v for k, v in row.items() if k != "line"}, [_stamp(self.root / n) for n in names]])


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


# -- WebDataset shards ---------------------------------------------------------------------------------------

Members = dict[str, tuple[int, int]]


def index_tar(path: str | Path) -> list[tuple[str, Members]]:
    """The samples of a tar: (key, {extension: (offset, size)}). What follows a damaged header is left out."""
    samples: list[tuple[str, Members]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isreg() or key is None or member.name.startswith("__"):
                    continue
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1].setdefault(extension.lower(), (member.offset_data, member.size))
    except tarfile.TarError as error:
        logger.warning("%s: damaged after %d samples: %s", path, len(samples), error)
    return samples


def write_index(folder: Path, sizes: dict[str, int]) -> None:
    """Write index.json, a shard list with sample counts in the form that webdataset's wids reads."""
    shards = [{"url": name, "nsamples": size} for name, size in sizes.items()]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    write_atomically(folder / "index.json", json.dumps(index, indent=1).encode())


def _shards_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def _matches(url: str) -> list[str]:
    """The files that a local pattern with * stands for; anything else stands for itself."""
    if _is_remote(url):
        return [url]
    path = os.path.expanduser(url.removeprefix("file://"))
    return sorted(glob.glob(path)) or [path]


def _is_remote(url: str) -> bool:
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))


def _readable(url: str) -> str:
    """The URL as webdataset opens it: it has no scheme of its own for S3, so its pipe does that."""
    return f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url


class ShardSource:
    """WebDataset shards: an image, a .txt (or `long` in .json) and perhaps a .short.txt (or `short` in .json).

    Samples per shard come from index.json or sizes.json beside the shards; without one, shards are counted.
    """

    def __init__(self, urls: Sequence[str], config: DataConfig) -> None:
        self.urls = list(urls)
        missing = [url for url in self.urls if not _is_remote(url) and not os.path.isfile(url)]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.urls)} shards do not exist, the first is {missing[0]}")
        self.remote = any(map(_is_remote, self.urls))
        self.cache_dir, self.cache_gb = os.path.expanduser(config.cache_dir), config.cache_gb
        self.max_open = config.shuffle_shards + 4
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self.sizes = self._sizes()
        self.starts = [0, *itertools.accumulate(self.sizes)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _sizes(self) -> list[int]:
        listed: dict[str, int] = {}
        for folder in dict.fromkeys(os.path.dirname(_listed_name(u)) for u in self.urls if not u.startswith("pipe:")):
            listed |= {f"{folder}/{name}": size for name, size in _listed_sizes(folder).items()}
        unlisted = [url for url in self.urls if _listed_name(url) not in listed]
        if unlisted:
            logger.warning("%d shards are in no index.json: counting their samples", len(unlisted))
            with ThreadPoolExecutor(8) as pool:
                counts = tqdm(pool.map(self._count, unlisted), "counting", len(unlisted), unit="shard")
                listed |= dict(zip(map(_listed_name, unlisted), counts, strict=True))
        return [listed[_listed_name(url)] for url in self.urls]

    def _count(self, url: str) -> int:
        try:
            return len(index_tar(self._path(url)))
        except OSError as error:
            raise ValueError(f"{url}: cannot be fetched: {error}") from None

    def _path(self, url: str) -> str:
        """A local file with the shard's content."""
        if not _is_remote(url):
            return url
        cache = FileCache(
            self.cache_dir,
            url_to_name=lambda address: hashlib.sha256(address.encode()).hexdigest() + ".tar",
            validator=None,
            cache_size=int(self.cache_gb * 1e9),
        )
        name = cache.url_to_name(_readable(url))
        os.makedirs(self.cache_dir, exist_ok=True)
        with FileLock(os.path.join(self.cache_dir, f"{name}.lock")):
            return cache.get_file(_readable(url))

    def _shard(self, number: int) -> "_OpenShard":
        if number not in self._open:
            try:
                self._open[number] = _OpenShard(self._path(self.urls[number]))
            except OSError as error:
                self._open[number] = _OpenShard(None, str(error))
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _locate(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]

    def read(self, index: int) -> Sample:
        number, local = self._locate(index)
        url, shard = self.urls[number], self._shard(number)
        if shard.error:
            raise BadSampleError("unreadable_shard", url, f"#{local}", shard.error)
        if local >= len(shard.samples):
            raise BadSampleError("missing_sample", url, f"#{local}", f"the shard holds {len(shard.samples)}")
        key, members = shard.samples[local]

        def member(extension: str) -> bytes:
            data = shard.read(*members[extension])
            if len(data) < members[extension][1]:
                raise BadSampleError("truncated_shard", url, key, f".{extension} ends early")
            return data

        extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
        if extension is None:
            raise BadSampleError("missing_file", url, key, f"no image among {', '.join(members)}")
        try:
            extra = json.loads(member("json")) if "json" in members else {}
            if not isinstance(extra, dict):
                raise ValueError(".json holds no object")
            long = member("txt").decode() if "txt" in members else extra.get("long")
            short = member("short.txt").decode() if "short.txt" in members else extra.get("short")
        except ValueError as error:
            raise BadSampleError("wrong_type", url, key, error) from None
        return Sample(url, key, member(extension), long, short)

    def fingerprint(self, index: int) -> str:
        number, local = self._locate(index)
        url = self.urls[number]
        return json.dumps([url, local, None if _is_remote(url) else _stamp(Path(url))])


class _OpenShard:
    """An open tar and where its samples lie. pread keeps no position, so forked workers may share the file."""

    def __init__(self, path: str | None, error: str = "") -> None:
        self.error = error
        self.samples = index_tar(path) if path else []
        self.file = open(path, "rb") if path else None  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        assert self.file is not None
        return os.pread(self.file.fileno(), size, offset)


def _listed_name(url: str) -> str:
    return url.split("?")[0] if not url.startswith("pipe:") else url


def _listed_sizes(folder: str) -> dict[str, int]:
    """Samples per shard that a folder's index.json (wids) or sizes.json (open_clip) gives."""
    for name in ("index.json", "sizes.json"):
        address = os.path.join(folder, name)
        try:
            with gopen(_readable(address)) as file:
                listed = json.loads(file.read())
            if name == "sizes.json":
                return {str(shard): int(size) for shard, size in listed.items()}
            return {os.path.basename(shard["url"]): int(shard["nsamples"]) for shard in listed["shardlist"]}
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: ignored, it is not a list of shards: %r", address, error)
    return {}


# -- the procedural world ------------------------------------------------------------------------------------


class SceneSource:
    """Procedural scenes, drawn when they are read; scene number i of a seed is always the same."""

    remote = False

    def __init__(self, config: DataConfig) -> None:
        if config.stop is None:
            raise ValueError("source 'scenes' is endless: set `stop` to the number of scenes to use")
        self.seed, self.sizes = 0, [config.stop]

    def read(self, index: int) -> Sample:
        from fixclip_core.scenes import world as scenes

        scene = scenes.scene_at(self.seed, index)
        long, short = scenes.long_caption(scene, index), scenes.short_caption(scene, index)
        return Sample("scenes", str(index), scenes.render(scene), long.text, short.text)

    def fingerprint(self, index: int) -> str:
        return f"scenes/{self.seed}/{index}"


# -- order ---------------------------------------------------------------------------------------------------


def sample_range(sizes: Sequence[int], config: DataConfig) -> range:
    """The samples that `start` and `stop` choose.

    Raises:
        ValueError: the source has fewer.
    """
    total = sum(sizes)
    stop = total if config.stop is None else config.stop
    for name, value, most in (("stop", stop, total), ("start", config.start, total - 1)):
        if value > most:
            raise ValueError(f"{name}={value}: {config.source} has only {total} samples")
    return range(config.start, stop)


class EpochOrder:
    """Which sample stands at which position of an epoch, computed a window of groups at a time.

    Groups (shards) are put in random order, and the samples of `window` neighbours are mixed. Reading goes
    through few groups at a time, memory does not grow with the number of samples, and any position can be
    asked for without the ones before it.
    """

    def __init__(self, sizes: Sequence[int], config: DataConfig) -> None:
        chosen = sample_range(sizes, config)
        ends = np.minimum(np.cumsum(sizes, dtype=np.int64), chosen.stop)
        begins = np.maximum(np.concatenate([[0], ends[:-1]]), chosen.start)
        kept = ends > begins
        self.begins, self.sizes = begins[kept], (ends - begins)[kept]
        self.total = len(chosen)
        self.seed, self.shuffle, self.window = config.seed, config.shuffle, config.shuffle_shards
        self._cache: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.total

    def index(self, epoch: int, position: int) -> int:
        """Number of the sample at a position, 0..len-1, of an epoch."""
        begin, order = self.window_at(epoch, position)
        return int(order[position - begin])

    def window_at(self, epoch: int, position: int) -> tuple[int, np.ndarray]:
        """The window that holds a position: its first position, and its sample numbers in order."""
        for (cached_epoch, _), (begin, order) in self._cache.items():
            if cached_epoch == epoch and begin <= position < begin + len(order):
                return begin, order
        groups = self._group_order(epoch)
        ends = np.cumsum(self.sizes[groups])
        first = int(np.searchsorted(ends, position, "right")) // self.window * self.window
        chosen = groups[first : first + self.window]
        order = np.concatenate([np.arange(self.begins[g], self.begins[g] + self.sizes[g]) for g in chosen])
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, 1, first]).permutation(order)
        begin = int(ends[first - 1]) if first else 0
        while len(self._cache) >= 3:
            self._cache.pop(next(iter(self._cache)))
        self._cache[epoch, first] = begin, order
        return begin, order

    def _group_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.sizes))
        return np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.sizes))

    def replacement(self, epoch: int, position: int, attempt: int, taken: range) -> int:
        """Another position to take a sample from, outside `taken` where possible; nearby at first."""
        begin, size = 0, self.total
        if attempt < _NEARBY_REPLACEMENTS:
            begin, order = self.window_at(epoch, position)
            size = len(order)
        rng = np.random.default_rng([self.seed, epoch, 2, position, attempt])
        low, high = max(begin, taken.start), min(begin + size, taken.stop)
        free = size - max(0, high - low)
        if free <= 0:
            return begin + int(rng.integers(size))
        drawn = begin + int(rng.integers(free))
        return drawn if drawn < low or high <= low else drawn + high - low


def sample_seeds(seed: int, epoch: int, index: int) -> tuple[int, int, int]:
    """Independent seeds of one sample's captions, augmentation and mask, each below 2**63."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(3, np.uint64)
    captions, augmentation, mask = (int(word >> np.uint64(1)) for word in words)
    return captions, augmentation, mask


# -- batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        image: (B, C, H, W) float, as the transform gives it.
        long_ids, short_ids: (B, T) int64.
        seeds: (B,) int64, one per sample, for the model's masks.
        keys: B names for reports.
        skipped: samples that were to stand here and could not; others were taken in their place.
    """

    image: Tensor
    long_ids: Tensor
    short_ids: Tensor
    seeds: Tensor
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        image, long_ids, short_ids = function(self.image), function(self.long_ids), function(self.short_ids)
        return Batch(image, long_ids, short_ids, function(self.seeds), self.keys, self.skipped)


# image, long caption, short caption, mask seed, key
LoadedSample = tuple[Tensor, str, str, int, str]


class Batches(Dataset):
    """Item (epoch, number) is a batch; nothing else decides what it holds."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        rank: int,
        world_size: int,
        draft_size: int | None,
    ) -> None:
        self.source, self.config, self.transform, self.tokenizer = source, config, transform, tokenizer
        self.rank, self.world_size, self.draft_size = rank, world_size, draft_size
        self.order = EpochOrder(source.sizes, config)
        self.short_captions, self.filters = config.short_captions(), config.caption_filters()
        if config.last_batch == "keep" and world_size > 1:
            raise ValueError("last_batch='keep' needs a single rank, as ranks must agree in size: drop or wrap")
        if not len(self):
            raise ValueError(
                f"{len(self.order)} samples do not fill one batch of {config.batch_size} on {world_size} rank(s): "
                "use a smaller batch size (in a recipe train.batch_size), or more samples"
            )

    def __len__(self) -> int:
        """Batches in an epoch, the same for every rank."""
        whole, rest = divmod(len(self.order), self.config.batch_size * self.world_size)
        return whole if self.config.last_batch == "drop" else whole + bool(rest)

    def positions(self, number: int) -> tuple[list[int], range]:
        """The epoch's positions that form a batch, and the range of positions that no replacement may come from.

        Ranks share each global batch, so that what is trained on does not depend on their number. Where shards
        are remote, each rank has its own part of the epoch instead, so that each node fetches its own shards.
        """
        size = self.config.batch_size
        if self.source.remote:
            begin = (self.rank * len(self) + number) * size
            taken = range(begin, begin + size)
        else:
            begin = (number * self.world_size + self.rank) * size
            taken = range(begin - self.rank * size, begin + (self.world_size - self.rank) * size)
        positions = range(begin, begin + size)
        if self.config.last_batch == "keep":
            return list(positions)[: len(self.order) - begin], taken
        return [position % len(self.order) for position in positions], taken

    def __getitem__(self, item: tuple[int, int]) -> Batch | list[Skipped]:
        """The batch, or what was tried in vain to fill it: an error raised here would reach the user garbled."""
        epoch, number = item
        skipped: list[Skipped] = []
        positions, taken = self.positions(number)
        loaded = [self._usable_sample(epoch, position, taken, skipped) for position in positions]
        samples = [sample for sample in loaded if sample is not None]
        if len(samples) < len(loaded):
            return skipped
        images, longs, shorts, seeds, keys = map(list, zip(*samples, strict=True))
        ids_BT = self.tokenizer(longs + shorts)
        return Batch(
            image=torch.stack(images),
            long_ids=ids_BT[: len(longs)],
            short_ids=ids_BT[len(longs) :],
            seeds=torch.tensor(seeds, dtype=torch.int64),
            keys=keys,
            skipped=skipped,
        )

    def _usable_sample(self, epoch: int, position: int, taken: range, skipped: list[Skipped]) -> LoadedSample | None:
        """The sample at a position, or another in its place: a batch keeps its size whatever happens."""
        for attempt in range(_MAX_REPLACEMENTS):
            index = self.order.index(epoch, position)
            if attempt:
                index = self.order.index(epoch, self.order.replacement(epoch, position, attempt, taken))
            try:
                return self.load(epoch, index)
            except BadSampleError as error:
                skipped.append(replace(error.skipped, index=index))
        return None

    def load(self, epoch: int, index: int) -> LoadedSample:
        """Sample number `index` as it is in an epoch; raises BadSampleError if it cannot be used."""
        sample, long, short = self.captions(epoch, index)
        picture = decode_image(sample, self.draft_size)
        _, augmentation_seed, mask_seed = sample_seeds(self.config.seed, epoch, index)
        with seeded(augmentation_seed):
            return self.transform(picture), long, short, mask_seed, sample.key

    def captions(self, epoch: int, index: int) -> tuple[Sample, str, str]:
        """The sample, its picture not yet decoded, and its long and short captions; raises BadSampleError."""
        sample = self.source.read(index)
        long, short = check_captions(sample, self.filters)
        if self.short_captions.policy == "given" and not short:
            raise BadSampleError("no_short_caption", sample.file, sample.key)
        caption_seed, _, _ = sample_seeds(self.config.seed, epoch, index)
        return sample, *caption_pair(long, short, self.short_captions, random.Random(caption_seed))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators that image transforms draw from, and put them back afterwards."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


class Loader:
    """Epochs of batches for one rank; see `build_loader`.

    Attributes:
        skipped: every sample that could not be used so far, by its number.
    """

    def __init__(self, batches: Batches, pin_memory: bool) -> None:
        self.batches, self.config, self.pin_memory = batches, batches.config, pin_memory
        self.skipped: dict[int, Skipped] = {}
        self.seen = 0

    def __len__(self) -> int:
        """Batches in an epoch, the same for every rank."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`.. of an epoch; starting late costs nothing and gives the batches it would have given.

        Raises:
            ValueError: `start` is beyond the epoch, or more than `max_bad_share` of the samples are bad.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start={start}: an epoch has {len(self)} batches")
        # More workers than cores only get in each other's way; batches do not depend on their number.
        workers = min(self.config.workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 64)
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=[(epoch, number) for number in range(start, len(self))],
            num_workers=workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.config.seed),  # leaves the global one alone
        )
        for batch in loader:
            self._account(batch)
            yield batch

    def _account(self, batch: Batch | list[Skipped]) -> None:
        skipped = batch if isinstance(batch, list) else batch.skipped
        for sample in skipped:
            if sample.index not in self.skipped and sample.reason not in self.counts():
                logger.warning("first %s: %s: %s %s", sample.reason, sample.file, sample.key, sample.detail)
            self.skipped[sample.index] = sample
        self.seen += len(batch) if isinstance(batch, Batch) else 0
        bad = [sample for sample in self.skipped.values() if sample.reason not in FILTER_REASONS]
        looked_at = min(max(self.seen, 1000), len(self.batches.order))
        if len(bad) > self.config.max_bad_share * looked_at:
            raise ValueError(
                f"{len(bad)} samples of {self.config.source} cannot be used, more than max_bad_share="
                f"{self.config.max_bad_share:g} of {looked_at}: {describe_skipped(bad)}"
            )
        if isinstance(batch, list):
            raise ValueError(f"no usable sample among {len(batch)} of {self.config.source}: {describe_skipped(batch)}")

    def counts(self) -> dict[str, int]:
        """How many samples were skipped, by reason."""
        return dict(Counter(sample.reason for sample in self.skipped.values()))


def describe_skipped(skipped: Iterable[Skipped]) -> str:
    """One line: each reason with its count and an example."""
    examples: dict[str, Skipped] = {}
    counts: Counter[str] = Counter()
    for sample in skipped:
        examples.setdefault(sample.reason, sample)
        counts[sample.reason] += 1
    return "; ".join(
        f"{count} {reason} (e.g. {examples[reason].file}: {examples[reason].key} {examples[reason].detail})"
        for reason, count in counts.most_common()
    )


def build_loader(
    config: DataConfig,
    *,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    rank: int = 0,
    world_size: int = 1,
    image_size: int | None = None,
    pin_memory: bool = False,
) -> Loader:
    """A deterministic, resumable loader of one rank's batches.

    Args:
        config: what to load.
        transform: RGB picture -> float (C, H, W), e.g. `FixClip.preprocess(train=True)`. Its randomness is seeded
            per sample.
        tokenizer: list of B texts -> (B, T) ids, e.g. `FixClip.tokenizer()`.
        rank, world_size: this process among those that train together.
        image_size: the model's; lets large JPEGs be decoded at a fraction of their size (`DataConfig.draft`).
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        ValueError: the source cannot be opened, or does not fill one batch.
    """
    draft_size = 2 * image_size if config.draft and image_size else None
    source = open_source(config)
    batches = Batches(source, config, transform, tokenizer, rank, world_size, draft_size)
    return Loader(batches, pin_memory)
