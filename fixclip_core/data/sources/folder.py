"""A folder of images with captions in text files beside them."""

from pathlib import Path

from fixclip_core.data.samples import IMAGE_EXTENSIONS
from fixclip_core.data.sources.rows import Rows, pack_rows


def folder_rows(folder: Path) -> Rows:
    """Every image below a folder; its long caption is the .txt of the same name, its short one the .short.txt."""
    images = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
    )
    if not images:
        raise ValueError(f"{folder}: no .tar shards and no images ({', '.join(IMAGE_EXTENSIONS)}) in this folder")
    return pack_rows({"image": str(image), "text": str(image.with_suffix(".txt"))} for image in images)
