"""The recipe of a captioning job: what is asked, how images are sent, and which answers are kept."""

from typing import Any, Literal

from pydantic import Field, field_validator

from fixclip_core.data.captions import CaptionFilters
from fixclip_core.section import Section
from fixclip_core.synthesis.language import languages
from fixclip_core.synthesis.prompts import LONG_PROMPTS, SHORT_PROMPTS, Prompt

ShortSource = Literal["none", "keep", "ask", "first_sentence", "random_sentence", "random_sentences"]
Kind = Literal["long", "short"]


class FiltersSection(Section):
    """Limits outside which an answer is no caption; null (false for the first two) switches one off.

    The names in quotes are those that report.json counts by.
    """

    cut_off: bool = Field(default=True, description='"cut_off": the answer ended at max_tokens, in mid-sentence')
    refusal: bool = Field(default=True, description='"refusal": the model declines or speaks of itself')
    max_prompt_share: float | None = Field(
        default=0.3, ge=0, le=1, description='"echo": largest share of five-word runs that the prompt has too'
    )
    language: str | None = Field(default="en", min_length=2, max_length=3, description="ISO 639 code, e.g. en, de, zh")
    min_language_probability: float = Field(
        default=0.2, ge=0, le=1, description='"wrong_language": its least probability against the likeliest other one'
    )
    min_sentences: int | None = Field(
        default=1, ge=1, description='"no_sentence": fewest sentences that end with a full stop or the like'
    )
    min_words: int | None = Field(default=CaptionFilters.min_words, ge=1, description='"too_short"')
    max_words: int | None = Field(default=400, ge=1, description='"too_long"')
    max_repeated_share: float | None = Field(
        default=CaptionFilters.max_repeated_share,
        ge=0,
        le=1,
        description='"repetition": share of repeated word triples',
    )
    max_word_run: int | None = Field(
        default=CaptionFilters.max_word_run, ge=1, description='"repetition": most times in a row of one word'
    )
    min_letter_share: float | None = Field(
        default=CaptionFilters.min_letter_share, ge=0, le=1, description='"not_sentences": share of letters'
    )
    min_words_per_clause: float | None = Field(
        default=CaptionFilters.min_words_per_clause,
        gt=0,
        description='"not_sentences": words between punctuation marks',
    )
    max_same: int | None = Field(
        default=3, ge=1, description='"same_caption": most images of one output shard that may share a long caption'
    )

    @field_validator("language")
    @classmethod
    def _known_language(cls, language: str | None) -> str | None:
        if language is not None and language not in languages():
            raise ValueError(f"no language {language!r}: one of {', '.join(sorted(languages()))}")
        return language

    def of_text(self, kind: Kind) -> CaptionFilters:
        """The limits that `captions` knows; a short caption may have a third of a long one's words."""
        least = self.min_words if kind == "long" or self.min_words is None else max(1, self.min_words // 3)
        return CaptionFilters(
            min_words=least,
            max_repeated_share=self.max_repeated_share,
            max_word_run=self.max_word_run,
            min_letter_share=self.min_letter_share,
            min_words_per_clause=self.min_words_per_clause,
        )


class CaptionRecipe(Section):
    """A captioning job, all but its source, its server and its model.

    `extra` are further fields of the request as the server takes them (`{top_p: 0.9}`, vLLM's
    `{chat_template_kwargs: {enable_thinking: false}}`); null leaves out a field that is sent otherwise.
    """

    seed: int = Field(default=0, ge=0, description="of the choice of prompts and of the server's sampling")
    attempts: int = Field(default=2, ge=1, description="prompts to try before a sample is given up")
    prompts: list[str] | None = Field(default=None, min_length=1, description="own prompts instead of the 20")
    short: ShortSource = Field(
        default="none",
        description="a short caption: none, the source's own (keep), asked for, or taken from the long one",
    )
    longest_side: int = Field(default=512, ge=16, description="pixels; larger images are reduced, never squashed")
    jpeg_quality: int = Field(default=90, ge=1, le=100, description="of images that are sent reduced")
    max_tokens: int = Field(default=256, ge=1, description="where an answer is cut")
    temperature: float = Field(default=0.7, ge=0, description="of the server's sampling")
    extra: dict[str, Any] = Field(default_factory=dict, description="further fields of each request")
    shard_size: int = Field(default=1000, ge=1, description="samples of an output shard, before any is left out")
    filters: FiltersSection = Field(default_factory=FiltersSection)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What a sample is asked for."""
        return ("long", "short") if self.short == "ask" else ("long",)

    def prompts_of(self, kind: Kind) -> tuple[Prompt, ...]:
        """The prompts to choose from; own ones are called own_1, own_2, ..."""
        if kind == "short":
            return SHORT_PROMPTS
        if self.prompts is None:
            return LONG_PROMPTS
        return tuple(Prompt(f"own_{number}", text) for number, text in enumerate(self.prompts, 1))
