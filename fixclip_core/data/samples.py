"""One sample: what a source holds, its captions checked, its picture decoded, or why it was skipped."""

import hashlib
import io
import reprlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fixclip_core.data.captions import LIMITS, CaptionFilters, clean_caption, rejection
from fixclip_core.data.images import to_rgb

# A thinner strip would be enlarged to millions of pixels by "resize the shortest side".
MAX_ASPECT_RATIO = 100
# Rejected by the user's own caption filters: reported, but no sign of damaged data.
FILTER_REASONS = frozenset(LIMITS)


@dataclass(frozen=True)
class Sample:
    """A sample as its source holds it: nothing is decoded or checked yet.

    `extra` are further fields of a manifest's row or a shard's .json (where a caption came from, say); packing keeps
    them. `caption_place` is where the long caption was looked for, e.g. "0.txt", for the report of one that is missing.
    """

    file: str
    key: str
    image: bytes | Tensor
    long: Any
    short: Any
    extra: Mapping[str, Any] = field(default_factory=dict)
    caption_place: str = "long caption"

    @property
    def plain(self) -> Any:
        """The long caption worded so that each of its sentences can be understood alone, where the data have a field of
        that name; state alignment takes its targets from it."""
        return self.extra.get("plain")


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
        BadSampleError: "no_caption", "wrong_type", "empty_caption" or one of the filters' reasons.
    """
    if sample.long is None:
        raise BadSampleError("no_caption", sample.file, sample.key, f"there is no {sample.caption_place}")
    for name, caption in (("long", sample.long), ("short", sample.short)):
        if caption is not None and not isinstance(caption, str):
            raise BadSampleError("wrong_type", sample.file, sample.key, f"{name} is {reprlib.repr(caption)}")
    long = clean_caption(sample.long)
    if not any(character.isalnum() for character in long):
        raise BadSampleError("empty_caption", sample.file, sample.key)
    reason = rejection(long, filters) if filters else None
    if reason:
        raise BadSampleError(reason, sample.file, sample.key, long[:100])
    return long, (clean_caption(sample.short) or None) if sample.short else None


def decode_image(sample: Sample, draft_size: int | None = None) -> Image.Image:
    """The sample's picture, upright and RGB, decoded completely; `info["original_size"]` is (width, height) of the
    file's picture.

    Args:
        sample: its `image` is an encoded file, or a uint8 tensor (3, H, W).
        draft_size: JPEGs may come back smaller than they are, but with no side below this.

    Raises:
        BadSampleError: "decompression_bomb" (more than PIL's Image.MAX_IMAGE_PIXELS), "extreme_aspect_ratio",
            "not_an_image", "truncated_image", "corrupt_image" or "unsupported_image" (see `to_rgb`).
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
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
            image.info["original_size"] = image.size[::-1] if is_turned else image.size
            if draft_size:
                image.draft(None, (draft_size, draft_size))
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return _rgb(sample, image)
    except BadSampleError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError("decompression_bomb", sample.file, sample.key, error) from None
    except Exception as error:  # PIL's readers raise nearly anything on damaged files
        reason = "truncated_image" if "truncated" in str(error) or isinstance(error, EOFError) else "corrupt_image"
        if isinstance(error, UnidentifiedImageError):
            reason, error = "not_an_image", ValueError(f"{len(sample.image)} bytes in no known image format")
        raise BadSampleError(reason, sample.file, sample.key, error) from None


def _rgb(sample: Sample, image: Image.Image) -> Image.Image:
    try:
        return to_rgb(image)
    except ValueError as error:  # also Pillow's own: a mode that it cannot convert
        raise BadSampleError("unsupported_image", sample.file, sample.key, error) from None


def picture_digest(sample: Sample) -> str:
    """What tells a sample's picture from others: samples with the very same one are one image with several captions."""
    content = sample.image.numpy().tobytes() if isinstance(sample.image, Tensor) else sample.image
    return hashlib.blake2b(content, digest_size=16).hexdigest()


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
