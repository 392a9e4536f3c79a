"""Pictures on disk: where they go, what is written into them, several of them in a row."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from fixclip_core.files import prepare_output, write_atomically

_OTHER_TYPES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def names_picture(output: str) -> bool:
    """Whether an output names a .png file, which is replaced, and no folder, whose pictures never are."""
    return not _names_folder(output) and Path(output).suffix.lower() == ".png"


def _names_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def output_files(output: str, names: list[str]) -> list[Path]:
    """Where the pictures go: a name ending in .png is a file (numbered if there are several), else a folder.

    Args:
        output: as typed: `dir.png/`, with a slash at its end or as a folder that exists, is a folder.
        names: of the pictures in a folder, without .png.

    Raises:
        ValueError: nothing is named, another file type, or the folder cannot be made or written to.
    """
    if not output.strip():
        raise ValueError(f"output {output!r}: name a .png file or a folder")
    path = Path(output)
    if names_picture(output):
        files = [path] if len(names) == 1 else [path.with_stem(f"{path.stem}-{name}") for name in names]
    elif not _names_folder(output) and path.suffix.lower() in _OTHER_TYPES:
        raise ValueError(f"output {output!r}: pictures are written as .png, which carries prompt and settings")
    else:
        files = [path / f"{name}.png" for name in names]
    prepare_output(files[0])
    return files


def free_name(path: Path) -> Path:
    """NAME.png, or NAME-2.png and so on: pictures of an earlier run are not overwritten."""
    tries = (path.with_stem(f"{path.stem}-{count}") if count > 1 else path for count in itertools.count(1))
    return next(file for file in tries if not file.exists())


def save_png(image: Any, path: Path, settings: dict[str, Any], fresh: bool = False) -> Path:
    """Write a PNG with its prompt and settings as text chunks, in one step: never half a file.

    Args:
        image: the picture.
        path: where to.
        settings: what it was drawn of.
        fresh: never over another picture: to NAME-2.png and so on where NAME.png exists.

    Returns:
        Where it is.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", settings["prompt"])
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt("fixclip", json.dumps(settings, ensure_ascii=False))
    if fresh:
        path = _reserve(path)
    try:
        write_atomically(path, lambda partial: image.save(partial, format="png", pnginfo=info))
    except BaseException:
        if fresh:
            path.unlink(missing_ok=True)
        raise
    return path


def _reserve(path: Path) -> Path:
    """The first free name of a picture, as an empty file, so that no other process takes it."""
    while True:
        free = free_name(path)
        try:
            free.touch(exist_ok=False)
            return free
        except FileExistsError:
            continue


def read_settings(path: Path) -> dict[str, Any]:
    """What `save_png` wrote into a picture.

    Raises:
        ValueError: the file is no picture, or carries no settings of this program.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get("fixclip")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: it cannot be read as a picture: {error}") from error
    try:
        settings = json.loads(text or "")
        if not isinstance(settings["prompt"], str):
            raise TypeError("its prompt is no text")
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: it carries no settings of `fixclip generate`") from error
    return settings


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings as parameters of `generate`; those of version 0.1 too."""
    compared = len(settings.get("systems") or ()) > 1
    size = settings.get("size")
    found = {
        "prompt": settings["prompt"],
        "negative": settings.get("negative_prompt"),
        "guidance": settings.get("guidance_scale"),
        "size": None if size is None else f"{size[0]}x{size[1]}",
        "lora": settings.get("loras"),
        "embedding": settings.get("embeddings"),
        "conditioning": None if compared else settings.get("conditioning", settings.get("long_prompt")),
        "compare": compared or None,
    }
    same = ("steps", "seed", "base", "encoder", "encoder_2", "adapter", "weights", "scheduler", "dtype")
    found |= {name: settings.get(name) for name in same}
    return {name: value for name, value in found.items() if value is not None}


def parameters_text(settings: dict[str, Any]) -> str:
    """The settings in the layout that common Stable Diffusion front ends read from a PNG."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    width, height = settings["size"]
    lines.append(
        f"Steps: {settings['steps']}, CFG scale: {settings['guidance_scale']}, Seed: {settings['seed']}, "
        f"Size: {width}x{height}, Model: {settings['base']}"
    )
    return "\n".join(lines)


def label_row(images: list[Any], labels: list[str], smallest: int = 256) -> Any:
    """Pictures side by side, each under its label; tiny ones are enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1, -(-smallest // images[0].width))
    width, height = images[0].width * scale, images[0].height * scale
    font_size = max(14, width // 20)
    font = ImageFont.load_default(size=font_size)
    bar, gap = 2 * font_size, 8
    sheet = Image.new("RGB", (len(images) * (width + gap) - gap, height + bar), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = index * (width + gap)
        draw.text((left + width // 2, bar // 2), label, fill="black", font=font, anchor="mm")
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, bar))
    return sheet
