"""WebDataset shards, local and remote."""

import bisect
import glob
import hashlib
import itertools
import json
import logging
import os
import shlex
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm
from webdataset.cache import FileCache
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from fixclip_core.data.config import DataConfig
from fixclip_core.data.samples import IMAGE_EXTENSIONS, BadSampleError, Sample
from fixclip_core.data.sources.rows import stamp
from fixclip_core.files import write_atomically

logger = logging.getLogger(__name__)

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


def shards_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


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
        extra = {name: value for name, value in extra.items() if name not in ("long", "short")}
        return Sample(url, key, member(extension), long, short, extra)

    def fingerprint(self, index: int) -> str:
        number, local = self._locate(index)
        url = self.urls[number]
        return json.dumps([url, local, None if _is_remote(url) else stamp(Path(url))])


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
