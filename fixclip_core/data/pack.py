"""Captioned images -> WebDataset shards.

Packing is parallel, resumable, and gives the same bytes however often it was cut off.

Shard i holds what is usable of samples i*shard_size .. (i+1)*shard_size - 1, so no shard depends on another.
A shard is renamed into place when complete and then recorded; a resumed run keeps what is recorded.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset.writer import TarWriter

from fixclip_core.data.captions import CaptionFilters
from fixclip_core.data.cluster import on_ray
from fixclip_core.data.config import DataConfig
from fixclip_core.data.order import sample_range
from fixclip_core.data.samples import BadSampleError, Sample, Skipped, check_captions, decode_image
from fixclip_core.data.sources import Source, open_source
from fixclip_core.data.sources.shards import write_index
from fixclip_core.files import prepare_folder, write_atomically

# Stored as they are; anything else becomes a PNG.
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
JPEG_QUALITY = 95
_LOCK_SECONDS = 30


@dataclass(frozen=True)
class PackOptions:
    """What decides a shard's content.

    Attributes:
        shard_size: samples per shard, before any is skipped.
        resize: pixels that `side` of a larger image is reduced to; None keeps the files as they are.
        side: the side that `resize` speaks of.
        filters: captions to leave out; None keeps all.
        decoded_before: these very files were decoded already, so those that stay as they are are not decoded again.
    """

    shard_size: int = 1000
    resize: int | None = None
    side: Literal["shortest", "longest"] = "shortest"
    filters: CaptionFilters | None = None
    decoded_before: bool = False

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size}: it must be at least 1")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize={self.resize}: it must be at least 1 pixel")
        if self.side not in ("shortest", "longest"):
            raise ValueError(f"side={self.side!r}: choose shortest or longest")


@dataclass(frozen=True)
class PackReport:
    """What became of the samples: how many, how many written, and every one that was not."""

    samples: int
    written: int
    skipped: list[Skipped]

    def counts(self) -> dict[str, int]:
        return dict(Counter(sample.reason for sample in self.skipped).most_common())


def pack(config: DataConfig, out: Path, options: PackOptions, workers: int = 1, ray: bool = False) -> PackReport:
    """Write `out`/shard-*.tar, index.json (samples per shard) and report.json (what was skipped and why).

    Run it again after an interruption, however hard, and it goes on where it was. Where not a single sample could be
    written, no file stays behind: the same folder may be packed into with other options.

    Args:
        config: its source, image_root, start and stop say what to pack.
        out: a folder that is new, empty or from the same pack.
        options: what the shards hold.
        workers: processes; they do not change the result.
        ray: run on a Ray cluster, `workers` tasks at a time (1: as many as there are cores); `out` is on a disk that
            all its machines see.

    Raises:
        ValueError: `out` holds something else, was packed with other options or from other samples, is being
            packed by somebody else or cannot be written; or the source is malformed.
    """
    source = open_source(config)
    samples = sample_range(source.sizes, config)
    state, is_new = out / ".pack", not out.exists()
    if out.is_dir() and not state.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty and not from a pack; choose a new one")
    prepare_folder(out)
    try:
        state.mkdir(exist_ok=True)
        with FileLock(state / "lock", timeout=_LOCK_SECONDS):
            _check_options(state / "options.json", config, options, len(samples))
            report = _pack_shards(source, samples, out, options, workers, ray)
            if not report.written:
                _remove_files(out)
        if not report.written:
            shutil.rmtree(state)
            if is_new:
                out.rmdir()
        return report
    except Timeout:
        raise ValueError(f"{out}: another process is packing into this folder") from None
    except OSError as error:
        raise ValueError(f"{out}: cannot be written: {error}") from None


def _remove_files(out: Path) -> None:
    """Remove what a pack has written, all but its lock."""
    for path in [*out.glob("shard-*.tar"), out / "index.json", out / "report.json", *(out / ".pack").glob("*.json")]:
        path.unlink(missing_ok=True)


def _check_options(path: Path, config: DataConfig, options: PackOptions, count: int) -> None:
    """Record what is being packed, or refuse to mix it with something else."""
    chosen = {
        "start": config.start,
        "stop": config.stop,
        "samples": count,
        **asdict(options),
        **{name: key for name in ("image_key", "caption_key", "short_key") if (key := getattr(config, name))},
    }
    if not path.exists():
        write_atomically(path, json.dumps(chosen, indent=1).encode())
    recorded = json.loads(path.read_bytes())
    for name in dict.fromkeys([*chosen, *recorded]):
        if recorded.get(name) != chosen.get(name):
            raise ValueError(
                f"{path.parent.parent}: packed with {name}={recorded.get(name)!r}, not {chosen.get(name)!r}; "
                "choose another folder, or delete this one"
            )


def _pack_shards(
    source: Source, samples: range, out: Path, options: PackOptions, workers: int, ray: bool
) -> PackReport:
    shards = ShardPacker(source, samples, out, options)
    for leftover in [*(out / ".pack").glob("*.tmp"), *(out / ".pack").glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)
    loader: Iterable[dict[str, Any]]
    if ray:
        loader = on_ray(shards.__getitem__, range(len(shards)), workers if workers > 1 else None)
    else:
        # A slow shard holds nobody up.
        loader = DataLoader(shards, batch_size=None, num_workers=workers if workers > 1 else 0, in_order=False)
    records: dict[int, dict[str, Any]] = {}
    skipped = 0
    with tqdm(total=len(samples), desc="packing", unit="image") as bar:
        for record in loader:
            if "error" in record:
                raise ValueError(record["error"])
            records[record["shard"]] = record
            bar.update(record["samples"])
            skipped += len(record["skipped"])
            bar.set_postfix(skipped=skipped)
    ordered = [records[number] for number in range(len(shards))]
    write_index(out, {shards.name(record["shard"]): record["written"] for record in ordered})
    report = PackReport(
        samples=len(samples),
        written=sum(record["written"] for record in ordered),
        skipped=[Skipped(**skipped) for record in ordered for skipped in record["skipped"]],
    )
    write_atomically(out / "report.json", json.dumps({**asdict(report), "counts": report.counts()}, indent=1).encode())
    return report


class ShardPacker(Dataset):
    """Item `number` makes sure that a shard is there and gives its record.

    A Dataset, because torch's loader already runs items in processes, and ends those with their parent.
    """

    def __init__(self, source: Source, samples: range, out: Path, options: PackOptions) -> None:
        self.source, self.samples, self.out, self.options = source, samples, out, options

    def __len__(self) -> int:
        return -(-len(self.samples) // self.options.shard_size)

    def name(self, number: int) -> str:
        return f"shard-{number:06d}.tar"

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self._ensure(number)
        except (OSError, ValueError) as error:  # a worker's exception would reach the user as a traceback in a string
            return {"error": f"{self.out / self.name(number)}: {error}"}

    def _ensure(self, number: int) -> dict[str, Any]:
        size = self.options.shard_size
        indices = self.samples[number * size : (number + 1) * size]
        inputs = hashlib.sha256("\n".join(map(self.source.fingerprint, indices)).encode()).hexdigest()
        shard, record_path = self.out / self.name(number), self.out / ".pack" / f"shard-{number:06d}.json"
        if record_path.exists():
            record = json.loads(record_path.read_bytes())
            if record["inputs"] != inputs:
                raise ValueError(
                    "captions or images changed since it was packed; choose another folder, or delete "
                    f"{record_path} to pack this shard anew"
                )
            if shard.exists() and shard.stat().st_size == record["bytes"]:
                return record
        written, skipped = write_shard(self.source.read, indices, shard, self.options, self.out / ".pack")
        record = {
            "shard": number,
            "samples": len(indices),
            "written": written,
            "skipped": [asdict(sample) for sample in skipped],
            "bytes": shard.stat().st_size,
            "inputs": inputs,
        }
        write_atomically(record_path, json.dumps(record).encode())
        return record


def write_shard(
    read: Callable[[int], Sample], indices: Iterable[int], shard: Path, options: PackOptions, scratch: Path
) -> tuple[int, list[Skipped]]:
    """Write a tar with what is usable of some samples, its bytes a function of these alone.

    Args:
        read: gives a sample by its number, or raises BadSampleError.
        indices: their numbers.
        shard: the file; it is renamed into place when complete.
        options: what is stored of a sample; `shard_size` plays no part.
        scratch: a folder on the same disk for the unfinished file, `*.tmp`.

    Returns:
        How many samples were written, and those that could not be used.
    """
    written, skipped = 0, []
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=scratch)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, 0o644)
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for index in indices:
                try:
                    tar.write(_entry(read(index), index, options))
                    written += 1
                except BadSampleError as error:
                    skipped.append(replace(error.skipped, index=index))
        file.flush()
        os.fsync(handle)
    os.replace(temporary, shard)
    return written, skipped


def _entry(sample: Sample, index: int, options: PackOptions) -> dict[str, Any]:
    """The files of a sample in a tar, by extension; raises BadSampleError."""
    long, short = check_captions(sample, options.filters)
    extension, image = stored_image(sample, options)
    return {
        "__key__": f"{index:09d}",
        extension: image,
        "txt": long.encode(),
        "json": _further_fields(sample, short),
    }


def stored_image(sample: Sample, options: PackOptions) -> tuple[str, bytes]:
    """(extension, file) to store. Every image is decoded once, or training would find the damage."""
    resize, measure = options.resize, max if options.side == "longest" else min
    kind, size = _header(sample)
    if kind in KEPT_FORMATS and (resize is None or measure(size) <= resize):
        if not options.decoded_before:
            decode_image(sample, draft_size=1)  # a JPEG's data is read completely, its pixels at an eighth
        assert isinstance(sample.image, bytes)
        return KEPT_FORMATS[kind], sample.image
    image = decode_image(sample, draft_size=2 * resize if resize else None)
    if resize is not None and measure(image.size) > resize:
        scale = resize / measure(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    extension, saved = ("jpg", "JPEG") if kind in ("JPEG", "WEBP") else ("png", "PNG")
    buffer = io.BytesIO()
    image.save(buffer, saved, **({"quality": JPEG_QUALITY} if saved == "JPEG" else {}))
    return extension, buffer.getvalue()


def _further_fields(sample: Sample, short: str | None) -> bytes:
    fields = {"image": sample.key} | dict(sample.extra) | ({"short": short} if short else {})
    try:
        return json.dumps(fields).encode()
    except RecursionError:
        raise BadSampleError("wrong_type", sample.file, sample.key, "fields that are nested too deeply") from None


def _header(sample: Sample) -> tuple[str | None, tuple[int, int]]:
    """Format and size of an encoded image; (None, ...) where `decode_image` will say what is wrong with it."""
    if isinstance(sample.image, Tensor):
        return None, (0, 0)
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            return image.format, image.size
    except Exception:
        return None, (0, 0)
