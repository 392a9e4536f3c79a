"""A folder of images with captions in text files beside them, or in metadata files as Hugging Face's imagefolder."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fixclip_core.data.config import DataConfig
from fixclip_core.data.images import image_extensions, is_picture, is_system_file
from fixclip_core.data.sources.manifest import METADATA_NAMES, read_manifest
from fixclip_core.data.sources.rows import short_name

logger = logging.getLogger(__name__)


def folder_rows(folder: Path, config: DataConfig, captioned: bool = True) -> Iterator[dict[str, Any]]:
    """A row for every image below a folder.

    Its long caption is the .txt of the same name (or `caption_key`, an extension), its short one the .short.txt (or
    `short_key`); rows are {"image", "text"}, and "short_text" where that is another name. Where no image has a caption
    and there are metadata.jsonl, .csv or .parquet files, their rows are the samples instead. What else is in the
    folder is counted in a warning.

    Raises:
        ValueError: there are no images, or a folder or metadata file cannot be read.
    """
    files = sorted(_list_files(folder), key=lambda name: name.split(os.sep))
    images = [name for name in files if is_picture(name)]
    if not images:
        raise ValueError(f"{folder}: {_describe_without_images(files)}")
    extension = (config.caption_key or "txt").removeprefix(".")
    short_extension = (config.short_key or f"short.{extension}").removeprefix(".")
    texts, others = _captions_beside(images, files, (short_extension, extension))
    metadata = [name for name in others if os.path.basename(name).lower() in METADATA_NAMES]
    if metadata and not texts:
        yield from _metadata_rows(folder, metadata, set(images), config, captioned)
        return
    config.refuse("a folder of images and text files", "image_key")
    if others:
        hint = "" if texts else _caption_hint(images, others)
        logger.warning("%s: other files than images are left out: %s%s", folder, count_extensions(others), hint)
    for image in images:
        text, short = (_find(image, name, texts) for name in (extension, short_extension))
        row = {"image": image, "text": text}
        yield row if short == short_name(text) else row | {"short_text": short}


def _list_files(folder: Path) -> Iterator[str]:
    """Files below a folder, relative to it, without hidden and system ones; linked folders are not followed."""

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}")

    linked = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not is_system_file(name)]
        linked += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
        yield from (os.path.relpath(os.path.join(parent, name), folder) for name in names if not is_system_file(name))
    if linked:
        logger.warning("%s: %d linked folders are not followed, the first is %s", folder, len(linked), linked[0])


def _captions_beside(
    images: Iterable[str], files: Iterable[str], extensions: tuple[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Text files that belong to an image, by their names and these in lower case, and all other files but images."""
    images = set(images)
    stems = {os.path.splitext(image)[0] for image in images}
    texts: dict[str, str] = {}
    others = []
    for name in (name for name in files if name not in images):
        endings = [ending for ending in extensions if name.lower().endswith(f".{ending.lower()}")]
        if any(name[: -len(ending) - 1] in stems for ending in endings):
            texts[name] = name
            texts.setdefault(name.lower(), name)
        else:
            others.append(name)
    return texts, others


def _caption_hint(images: Iterable[str], others: Iterable[str]) -> str:
    """Where no image has a caption: the extension of files beside them that may hold it."""
    stems = {os.path.splitext(image)[0] for image in images}
    beside = Counter(_extension(name) for name in others if os.path.splitext(name)[0] in stems).most_common(1)
    return f"; are the captions in the .{beside[0][0]}? Then caption_key={beside[0][0]}" if beside else ""


def _find(image: str, extension: str, texts: dict[str, str]) -> str:
    """The image's text file: `0.TXT` where there is no `0.txt`, and `0.txt` where there is neither."""
    name = f"{os.path.splitext(image)[0]}.{extension}"
    return texts.get(name) or texts.get(name.lower(), name)


def _metadata_rows(
    folder: Path, metadata: Sequence[str], images: set[str], config: DataConfig, captioned: bool
) -> Iterator[dict[str, Any]]:
    """Rows of Hugging Face's imagefolder; each metadata file names images relative to its own folder."""
    unnamed = set(images)
    for name in metadata:
        for row in read_manifest(folder / name, config, captioned):
            if isinstance(row["image"], str):
                row["image"] = os.path.normpath(os.path.join(os.path.dirname(name), row["image"]))
                unnamed.discard(row["image"])
            yield row | {"origin": name}
    if unnamed:
        logger.warning("%s: %d of %d images are in no metadata file", folder, len(unnamed), len(images))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def count_extensions(names: Iterable[str]) -> str:
    """ "3 .heic, 1 .mp4": how many files there are of each kind, the five most frequent."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in names).most_common()
    more = sum(count for _, count in counts[5:])
    return ", ".join(f"{count:,} {kind}" for kind, count in counts[:5]) + (f", {more:,} others" if more else "")


def _describe_without_images(files: Sequence[str]) -> str:
    text = f"no .tar shards and no images ({', '.join(image_extensions()[:4])}, ...) in this folder"
    if any(_extension(name) in ("parquet", "arrow") for name in files):
        text += '; of a Hugging Face dataset use a saved split: `load_dataset(...)["train"].save_to_disk(FOLDER)`'
    return f"{text}; it holds {count_extensions(files)}" if files else text
