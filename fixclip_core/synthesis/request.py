"""A sample and a prompt -> the body of an OpenAI chat completion. A pure function: no server, no state."""

import base64
import io
from typing import Any

from PIL import Image
from torch import Tensor

from fixclip_core.data.samples import Sample, decode_image
from fixclip_core.synthesis.prompts import Prompt, stable_hash
from fixclip_core.synthesis.recipe import CaptionRecipe

# What every server reads; other formats are sent as PNG.
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112  # EXIF tag
# What Pillow finds in a file that says nothing of its maker. EXIF and text hold places, names and prompts.
_HARMLESS = {
    "JPEG": {
        "jfif",
        "jfif_version",
        "jfif_unit",
        "jfif_density",
        "adobe",
        "adobe_transform",
        "progressive",
        "progression",
    },
    "PNG": {"aspect", "gamma", "srgb", "chromaticity", "transparency", "interlace"},
    "WEBP": {"loop", "background", "timestamp", "duration"},
}


def request(sample: Sample, prompt: Prompt, recipe: CaptionRecipe, model: str, attempt: int = 0) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions` that asks for one caption.

    Args:
        sample: its image is sent as a data URL, no side longer than `recipe.longest_side`.
        prompt: what to ask.
        recipe: max_tokens, temperature and extra fields. The sampling seed is a hash of its seed, the sample's key
            and the prompt.
        model: as the server calls it.
        attempt: which try this is; another one draws another sampling seed.

    Raises:
        BadSampleError: the image cannot be used; reasons as in `decode_image`.
    """
    content = [
        {"type": "image_url", "image_url": {"url": data_url(sample, recipe.longest_side, recipe.jpeg_quality)}},
        {"type": "text", "text": prompt.text},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": recipe.max_tokens,
        "temperature": recipe.temperature,
        "seed": stable_hash("sampling", recipe.seed, sample.key, prompt.id, attempt) % 2**31,
        **recipe.extra,
    }
    return {name: value for name, value in body.items() if value is not None}


def data_url(sample: Sample, longest_side: int, jpeg_quality: int = 90) -> str:
    """The sample's image as `data:image/...;base64,...`.

    A JPEG, PNG or WebP that is small enough, upright and without metadata (EXIF, XMP, text, comments) is sent as it is,
    after it was decoded at a fraction of its size to find damage. Any other is decoded, turned upright and reduced by
    one factor for both sides: 1024x768 becomes 512x384 for a longest side of 512. JPEGs stay JPEGs, all else becomes
    PNG without loss.

    Raises:
        BadSampleError: see `decode_image`.
    """
    kind, fits = _header(sample, longest_side)
    if fits and kind in _SENT_AS_THEY_ARE:
        decode_image(sample, draft_size=1)
        return _url(_SENT_AS_THEY_ARE[kind], sample.image)  # type: ignore[arg-type]
    # Both sides of a draft stay at least this long, so the longer one never needs to be enlarged.
    image = decode_image(sample, draft_size=longest_side)
    scale = longest_side / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, "JPEG", quality=jpeg_quality)
        return _url("image/jpeg", buffer.getvalue())
    image.save(buffer, "PNG", compress_level=1)
    return _url("image/png", buffer.getvalue())


def _header(sample: Sample, longest_side: int) -> tuple[str, bool]:
    """Format of the image, and whether it can be sent without a change."""
    if isinstance(sample.image, Tensor):
        return "PNG", False
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            fits = image.getexif().get(_ORIENTATION, 1) == 1 and max(image.size) <= longest_side
            if fits and image.format == "PNG":
                image.load()  # text may stand behind the pixels
            kind = image.format or ""
            return kind, fits and set(image.info) <= {"dpi", "icc_profile"} | _HARMLESS.get(kind, set())
    except Exception:  # decode_image says what is wrong with it
        return "", False


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
