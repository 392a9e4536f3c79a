"""WebDataset shards, local and remote."""

import bisect
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import shlex
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from tqdm import tqdm
from webdataset.cache import FileCache
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from fixclip_core.data.config import DataConfig
from fixclip_core.data.images import image_extensions, is_system_file
from fixclip_core.data.samples import BadSampleError, Sample
from fixclip_core.data.sources.rows import stamp
from fixclip_core.files import parse_json, write_atomically

logger = logging.getLogger(__name__)

Members = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class TarIndex:
    """What a tar holds.

    Attributes:
        samples: (key, {extension: (offset, size)}) of each.
        damage: where it is damaged or cut off, in words; "" where its end is where the last file ends.
    """

    samples: list[tuple[str, Members]]
    damage: str = ""


def index_tar(path: str | Path) -> TarIndex:
    """The samples of a tar: neighbouring files of the same name but for the extension, hidden and system files apart.

    A damaged header costs the file it describes; reading goes on at the next one, and `damage` says where it was. A
    name that comes again with the same extension begins another sample.

    Raises:
        OSError: the file cannot be read.
    """
    samples: list[tuple[str, Members]] = []
    damage, end = "", 0
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                for member in tar:
                    damage = damage or _damage(file, end, member.offset, len(samples))
                    end = tar.offset
                    if member.isreg() and not member.name.startswith("__") and not is_system_file(member.name):
                        _add_member(samples, member)
        except (tarfile.TarError, ValueError, EOFError) as error:
            damage = damage or f"damaged or cut off behind byte {end:,}, after {len(samples)} samples: {error}"
        size = os.fstat(file.fileno()).st_size
        damage = damage or _damage(file, end, size, len(samples))
    if not damage and size == end:
        damage = f"cut off at byte {end:,}, after {len(samples)} samples: the mark of its end is not there"
    return TarIndex(samples, damage)


def _add_member(samples: list[tuple[str, Members]], member: tarfile.TarInfo) -> None:
    key, extension = base_plus_ext(member.name)
    if key is None:
        return
    extension = extension.lower()
    if not samples or samples[-1][0] != key or extension in samples[-1][1]:
        samples.append((key, {}))
    samples[-1][1][extension] = member.offset_data, member.size


def _damage(file: BinaryIO, begin: int, end: int, samples: int) -> str:
    """Between two files of a tar there is nothing, or zeros where tars were joined: "" then, else what is wrong."""
    position = file.tell()
    file.seek(begin)
    while begin < end and (block := file.read(min(end - begin, 1 << 20))):
        begin += len(block)
        if block.strip(b"\0"):
            file.seek(position)
            return f"damaged between bytes {begin - len(block):,} and {end:,}, after {samples} samples"
    file.seek(position)
    return ""


def write_index(folder: Path, sizes: dict[str, int]) -> None:
    """Write index.json, a shard list with sample counts in the form that webdataset's wids reads."""
    shards = [{"url": name, "nsamples": size} for name, size in sizes.items()]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    write_atomically(folder / "index.json", json.dumps(index, indent=1).encode())


def shards_in(folder: Path) -> list[str]:
    """The tars in a folder; those that only its index.json names are counted in a warning."""
    missing = [name for name in _listed_sizes(str(folder)) if not (folder / name).exists()]
    if missing:
        logger.warning("%s: %d shards of its index are not there, the first is %s", folder, len(missing), missing[0])
    return sorted(str(path) for path in folder.glob("*.tar") if not is_system_file(path.name))


def matches(url: str) -> list[str]:
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
        self.image_key, self.caption_key, self.short_key = (
            key and key.removeprefix(".").lower() for key in (config.image_key, config.caption_key, config.short_key)
        )
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._warned: set[str] = set()
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
            index = index_tar(self._path(url))
        except OSError as error:
            raise ValueError(f"{url}: cannot be fetched: {error}") from None
        self._warn(url, index, len(index.samples))
        return len(index.samples)

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
            self._warn(self.urls[number], self._open[number].index, self.sizes[number])
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _warn(self, url: str, index: TarIndex, listed: int) -> None:
        """Say once what of a shard is damaged, or beyond the count of its index and so never read."""
        if url not in self._warned and (index.damage or len(index.samples) > listed):
            self._warned.add(url)
            unused = f"it holds {len(index.samples)} samples, but only the {listed} that its index counts are used"
            logger.warning("%s: %s", url, index.damage or unused)

    def _locate(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]

    def read(self, index: int) -> Sample:
        number, local = self._locate(index)
        url, shard = self.urls[number], self._shard(number)
        if shard.error:
            raise BadSampleError("unreadable_shard", url, f"#{local}", shard.error)
        if local >= len(shard.samples):
            damage = f", {shard.damage}" if shard.damage else ""
            raise BadSampleError("missing_sample", url, f"#{local}", f"the shard holds {len(shard.samples)}{damage}")
        key, members = shard.samples[local]

        def member(extension: str) -> bytes:
            data = shard.read(*members[extension])
            if len(data) < members[extension][1]:
                raise BadSampleError("truncated_shard", url, key, f".{extension} ends early")
            return data

        images = (self.image_key,) if self.image_key else image_extensions()
        extension = next((name for name in images if name in members), None)
        if extension is None:
            raise BadSampleError("missing_file", url, key, _why_no_image(shard, key, members, images))
        try:
            fields = parse_json(member("json")) if "json" in members else {}
            if not isinstance(fields, dict):
                raise ValueError(".json holds no object")
            long, short = (
                member(name).decode() if name in members else fields.get(field)
                for name, field in (
                    (self.caption_key or "txt", self.caption_key or "long"),
                    (self.short_key or "short.txt", self.short_key or "short"),
                )
            )
        except ValueError as error:
            raise BadSampleError("wrong_type", url, key, error) from None
        used = ("long", "short", self.caption_key, self.short_key)
        extra = {name: value for name, value in fields.items() if name not in used}
        place = f".{self.caption_key or 'txt'}, nor `{self.caption_key or 'long'}` in .json, among {', '.join(members)}"
        return Sample(url, key, member(extension), long, short, extra, f"{place}{_elsewhere(shard, key)}")

    def fingerprint(self, index: int) -> str:
        number, local = self._locate(index)
        url = self.urls[number]
        return json.dumps([url, local, None if _is_remote(url) else stamp(Path(url))])


class _OpenShard:
    """An open tar and where its samples lie. pread keeps no position, so forked workers may share the file."""

    def __init__(self, path: str | None, error: str = "") -> None:
        self.error = error
        self.index = index_tar(path) if path else TarIndex([])
        self.samples, self.damage = self.index.samples, self.index.damage
        self.file = open(path, "rb") if path else None  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        assert self.file is not None
        return os.pread(self.file.fileno(), size, offset)

    @functools.cached_property
    def keys(self) -> Counter[str]:
        """How often each key comes."""
        return Counter(key for key, _ in self.samples)


def _why_no_image(shard: _OpenShard, key: str, members: Members, wanted: Sequence[str]) -> str:
    """What is there in place of a picture, and the usual cause."""
    dotted = [name for name in members if "." in name and name.rsplit(".")[-1] in wanted]
    if dotted:
        return (
            f"no image among {', '.join(members)}: WebDataset takes all behind the first dot of a name for its "
            f"extension; use names without dots, or image_key={dotted[0]}"
        )
    return f"no image among {', '.join(members)}{_elsewhere(shard, key)}; image_key names another extension"


def _elsewhere(shard: _OpenShard, key: str) -> str:
    if shard.keys[key] < 2:
        return ""
    return "; files of the same name must follow each other in the tar, as `tar --sort=name` writes them"


def _listed_name(url: str) -> str:
    return url.split("?")[0] if not url.startswith("pipe:") else url


def _listed_sizes(folder: str) -> dict[str, int]:
    """Samples per shard that a folder's index.json (wids) or sizes.json (open_clip) gives."""
    for name in ("index.json", "sizes.json"):
        address = os.path.join(folder, name)
        try:
            with gopen(_readable(address)) as file:
                listed = parse_json(file.read())
            if name == "sizes.json":
                return {str(shard): int(size) for shard, size in listed.items()}
            return {os.path.basename(shard["url"]): int(shard["nsamples"]) for shard in listed["shardlist"]}
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: ignored, it is not a list of shards: %r", address, error)
    return {}
