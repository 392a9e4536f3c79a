"""What to train on and in which order: the sections `data` and `captions` of a recipe, and what a loader needs."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from fixclip_core.data.captions import CaptionFilters, ShortCaptions, ShortPolicy
from fixclip_core.section import Section


class SourceSection(Section):
    """Captioned images and the part of them to use; paths are relative to the working directory.

    `source` is shards (`data/shard-{000..099}.tar`, a folder of them, http(s)://, s3://, any `pipe:`; several joined
    by `::`), a manifest (.jsonl, .csv, .tsv), ShareGPT4V's .json, a folder of image + txt, or the procedural world:
    `scenes`, `scenes-references` and `scenes-mixed`, which is half of either.
    """

    source: str = Field(min_length=1, description="shards, manifest, ShareGPT4V's JSON, a folder, or scenes")
    image_root: str | None = Field(default=None, description="what a manifest's image paths are relative to")
    image_key: str | None = Field(
        default=None, min_length=1, description="column, or extension in shards, of the image; null: the usual ones"
    )
    caption_key: str | None = Field(
        default=None, min_length=1, description="column, or extension in folders and shards, of the long caption"
    )
    short_key: str | None = Field(default=None, min_length=1, description="the same of the short caption")
    start: int = Field(default=0, ge=0, description="first sample")
    stop: int | None = Field(default=None, ge=1, description="sample after the last; the number of `scenes`")

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.stop is not None and self.stop <= self.start:
            yield f"stop={self.stop}: it must be larger than start={self.start}"

    def refuse(self, kind: str, *names: str) -> None:
        """Raise ValueError if any of these fields is set: it would not act on this kind of source."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r} does not act on {kind}, as {self.source} is: leave it out, or null")


# Fields of a section that reads scenes, whatever it read before; the number of scenes is its `stop`.
READ_SCENES: dict[str, Any] = {
    "source": "scenes",
    "start": 0,
    **dict.fromkeys(["image_root", "image_key", "caption_key", "short_key"]),
}


class DataSection(SourceSection):
    """Captioned images and how they are read."""

    workers: int = Field(
        default=4, ge=0, description="loading processes of each training process; batches do not depend on it"
    )
    shuffle_shards: int = Field(
        default=16, ge=1, description="shards that are shuffled together; more mix better and read less locally"
    )
    max_bad_share: float = Field(default=0.01, ge=0, le=1, description="stop once more of the samples are unusable")
    cache_dir: str = Field(default="~/.cache/fixclip/shards", description="where remote shards are kept")
    cache_gb: float = Field(default=200.0, gt=0, description="how much of remote shards is kept")
    draft: bool = Field(
        default=True, description="decode JPEGs at a fraction of their size where that is still twice the model's"
    )


class CaptionsSection(Section):
    """Where the short caption comes from, and which long ones are not worth learning from.

    See `captions.ShortCaptions` and `captions.CaptionFilters` for what each field does.
    """

    short_caption: ShortPolicy = Field(
        default="random_sentences",
        description="given: the data's own; else sentences of the long caption; debiased: any but the first",
    )
    max_short_sentences: int = Field(default=3, ge=1, description="random_sentences takes 1 to this many")
    drop_short_from_long: bool = Field(
        default=False, description="the long caption lacks these sentences, unless nothing would remain"
    )
    num_short: int = Field(
        default=1, ge=1, description="short captions of an image in a step, sampled anew; their losses are averaged"
    )
    pad_short: bool = Field(default=False, description="padding before the short text, so that late positions learn")
    filter_captions: bool = Field(default=False, description="leave out long captions outside the limits below")
    min_words: int | None = Field(default=CaptionFilters.min_words, ge=1)
    max_repeated_share: float | None = Field(default=CaptionFilters.max_repeated_share, ge=0, le=1)
    max_word_run: int | None = Field(default=CaptionFilters.max_word_run, ge=1)
    min_letter_share: float | None = Field(default=CaptionFilters.min_letter_share, ge=0, le=1)
    min_words_per_clause: float | None = Field(default=CaptionFilters.min_words_per_clause, gt=0)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.num_short > 1 and self.short_caption in ("given", "first_sentence"):
            yield (
                f"num_short={self.num_short}: short_caption={self.short_caption} gives the same one each time; choose "
                "random_sentence, random_sentences or debiased"
            )
        if self.num_short > 1 and self.drop_short_from_long:
            yield (
                f"num_short={self.num_short}: with drop_short_from_long=true further short captions would be sentences "
                "that the long one keeps; set num_short=1, or drop_short_from_long=false"
            )
        if self.is_changed("max_short_sentences") and self.short_caption != "random_sentences":
            yield (
                f"max_short_sentences={self.max_short_sentences}: short_caption={self.short_caption} takes no such "
                "number; choose random_sentences, or leave it out"
            )
        for name in CaptionFilters.__dataclass_fields__:
            if self.is_changed(name) and not self.filter_captions:
                value = "null" if getattr(self, name) is None else getattr(self, name)
                yield f"{name}={value} is a limit of filter_captions, which is off; set that to true, or leave it out"

    def short_captions(self) -> ShortCaptions:
        return ShortCaptions(self.short_caption, self.max_short_sentences, self.drop_short_from_long)

    def caption_filters(self) -> CaptionFilters | None:
        limits = {name: getattr(self, name) for name in CaptionFilters.__dataclass_fields__}
        return CaptionFilters(**limits) if self.filter_captions else None


class DataConfig(DataSection, CaptionsSection):
    """Everything a loader needs: both sections of a recipe, and the order of samples.

    `last_batch` says what becomes of the samples that do not fill a batch on every rank: `drop` them (others in every
    epoch), `wrap`: fill the batch up from the start of the epoch, or `keep` it smaller (one rank only).
    """

    batch_size: int = Field(default=256, ge=1, description="samples per rank")
    seed: int = Field(default=0, ge=0, description="of order, short captions, augmentation and image masks")
    shuffle: bool = Field(default=True, description="draw a new order for every epoch")
    last_batch: Literal["drop", "wrap", "keep"] = "drop"
