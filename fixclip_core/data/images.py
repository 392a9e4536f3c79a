"""Pictures: which files are some, and any of Pillow's modes as 8-bit RGB."""

import functools
from pathlib import PurePath

import numpy as np
from PIL import Image

# The first of these that a sample of a shard has is its picture, and all others come after them.
_PREFERRED = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
# Pillow recognises these without decoding them, or needs another program for their vector graphics.
_NOT_DECODED = frozenset(["BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"])

SYSTEM_NAMES = frozenset(
    ["__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"]
)


def is_system_file(path: str | PurePath) -> bool:
    """Hidden files and what systems leave behind: `._0.jpg`, `.DS_Store`, `__MACOSX/0.jpg`, `Thumbs.db`."""
    parts = PurePath(path).parts
    return any((part[0] == "." and part != "..") or part.lower() in SYSTEM_NAMES for part in parts)


@functools.cache
def image_extensions() -> tuple[str, ...]:
    """Extensions of the pictures that this Pillow decodes, lower case and without the dot: "jpg", ..., "jfif", ..."""
    Image.init()
    formats = Image.registered_extensions().items()
    decoded = {extension[1:] for extension, kind in formats if kind in Image.OPEN and kind not in _NOT_DECODED}
    return (*_PREFERRED, *sorted(decoded.difference(_PREFERRED)))


def is_picture(name: str) -> bool:
    """Whether a file's name, without its folders, is that of a picture: `0.jfif`, but neither `._0.jpg` nor `0.txt`."""
    return PurePath(name).suffix[1:].lower() in image_extensions() and not is_system_file(name)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as RGB with 8 bits a channel.

    Pillow's own `convert("RGB")` clips grey of more than 8 bits at 255, so that of 16 bits (0..65535) the values 300
    and 65535 both become white. Here the format's white becomes 255: 65535 -> 255, 32896 -> 128, 300 -> 1.

    Raises:
        ValueError: 32-bit integers or floats, of which no value stands for white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey_to_rgb(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point numbers"
        raise ValueError(f"its pixels are {kind}, of which none stands for white; store it with 8 or 16 bits")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of a TIFF's BitsPerSample (tag 258); its PhotometricInterpretation (262) 0 is inverted."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(258, (16,))[0] - 1
    levels_HW = np.asarray(image).astype(np.int64)
    grey_HW = ((levels_HW * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey_HW if tags.get(262) == 0 else grey_HW).convert("RGB")
