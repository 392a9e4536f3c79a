"""What to train on and in which order."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fixclip_core.data.captions import CaptionFilters, ShortCaptions, ShortPolicy


class DataConfig(BaseModel):
    """What to train on and in which order.

    Attributes:
        source: shards (`data/shard-{000..099}.tar`, a folder of them, http(s)://, s3://, any `pipe:`; several
            joined by `::`), a manifest (.jsonl, .csv, .tsv), ShareGPT4V's .json, a folder of image + txt, or
            `scenes`.
        image_root: what a manifest's image paths are relative to; its own folder by default.
        start, stop: use samples start..stop-1 only; `stop` is the size of `scenes`.
        batch_size: samples per rank.
        workers: loading processes per rank, 0 for none. Batches do not depend on it.
        seed: of order, short captions, augmentation and image masks.
        shuffle: draw a new order for every epoch.
        shuffle_shards: how many shards are shuffled together; more mix better and read less locally.
        last_batch: `drop` the samples that do not fill a batch on every rank (others in every epoch), `wrap` to
            fill it up from the start of the epoch, or `keep` it smaller (one rank only).
        max_bad_share: training stops once more than this share of the samples could not be used.
        cache_dir, cache_gb: where remote shards are kept and how much of them.
        draft: let JPEGs be decoded at a fraction of their size where that is still twice the model's.
        short_caption, max_short_sentences, drop_short_from_long: see `captions.ShortCaptions`.
        filter_captions and the limits after it: see `captions.CaptionFilters`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    source: str
    image_root: str | None = None
    start: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=256, ge=1)
    workers: int = Field(default=4, ge=0)
    seed: int = Field(default=0, ge=0)
    shuffle: bool = True
    shuffle_shards: int = Field(default=16, ge=1)
    last_batch: Literal["drop", "wrap", "keep"] = "drop"
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    cache_dir: str = "~/.cache/fixclip/shards"
    cache_gb: float = Field(default=200.0, gt=0)
    draft: bool = True
    short_caption: ShortPolicy = "first_sentence"
    max_short_sentences: int = Field(default=3, ge=1)
    drop_short_from_long: bool = False
    filter_captions: bool = False
    min_words: int | None = CaptionFilters.min_words
    max_repeated_share: float | None = CaptionFilters.max_repeated_share
    max_word_run: int | None = CaptionFilters.max_word_run
    min_letter_share: float | None = CaptionFilters.min_letter_share
    min_words_per_clause: float | None = CaptionFilters.min_words_per_clause

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop={self.stop}: it must be larger than start={self.start}")
        self.caption_filters()
        return self

    def short_captions(self) -> ShortCaptions:
        return ShortCaptions(self.short_caption, self.max_short_sentences, self.drop_short_from_long)

    def caption_filters(self) -> CaptionFilters | None:
        limits = {name: getattr(self, name) for name in CaptionFilters.__dataclass_fields__}
        filters = CaptionFilters(**limits)
        return filters if self.filter_captions else None
