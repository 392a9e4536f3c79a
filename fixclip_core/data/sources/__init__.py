"""Sources of captioned images: any sample by its number."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from webdataset.shardlists import expand_urls

from fixclip_core.data.config import DataConfig
from fixclip_core.data.samples import Sample
from fixclip_core.data.sources.arrow import ArrowSource, is_dataset
from fixclip_core.data.sources.folder import folder_rows
from fixclip_core.data.sources.manifest import MANIFEST_EXTENSIONS, read_manifest
from fixclip_core.data.sources.rows import RowSource, pack_rows
from fixclip_core.data.sources.scenes import NAMES as SCENES
from fixclip_core.data.sources.scenes import SceneSource
from fixclip_core.data.sources.shards import ShardSource, matches, shards_in


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


def open_source(config: DataConfig, captioned: bool = True) -> Source:
    """Recognise and open what `config.source` names.

    Args:
        config: its source, image_root, start and stop; `scenes:200` are the first 200 scenes.
        captioned: whether a manifest must have long captions; images alone are enough to write captions for.

    Raises:
        ValueError: it does not exist, is of no known kind, or is malformed (names file and line).
    """
    name = config.source
    path = Path(name).expanduser()
    if name.partition(":")[0] in SCENES:
        config.refuse("scenes", "image_root", "image_key", "caption_key", "short_key")
        return SceneSource(config)
    if path.is_dir():
        return _open_folder(path, config, captioned)
    if path.suffix.lower() in MANIFEST_EXTENSIONS and "://" not in name:
        root = Path(config.image_root).expanduser() if config.image_root else path.parent
        return RowSource(pack_rows(read_manifest(path, config, captioned)), root, path)
    config.refuse("shards", "image_root")
    urls = [match for url in expand_urls(name) for match in matches(url)]
    if all(url.startswith("pipe:") or url.split("?")[0].endswith(".tar") for url in urls):
        return ShardSource(urls, config)
    problem = "is of no known kind" if path.exists() or "://" in name else "does not exist"
    near = difflib.get_close_matches(name.partition(":")[0], SCENES, 1)
    if near:
        problem += f"; did you mean {near[0]}?"
    raise ValueError(
        f"source {name!r} {problem}: give .tar shards, a manifest ({', '.join(MANIFEST_EXTENSIONS)}), "
        f"a folder of shards or of image + txt, or {' or '.join(SCENES)}"
    )


def _open_folder(path: Path, config: DataConfig, captioned: bool) -> Source:
    if is_dataset(path):
        return ArrowSource(path, config, captioned)
    config.refuse("a folder", "image_root")
    shards = shards_in(path)
    if shards:
        return ShardSource(shards, config)
    return RowSource(pack_rows(folder_rows(path, config, captioned)), path, path)
