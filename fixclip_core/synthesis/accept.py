"""A response -> a caption, or the reason why it is none. Pure functions: no server, no state.

    response (JSON) --read_answer--> Answer --accept--> Verdict(caption | reason)

An Answer is what is worth keeping of a response, as text was paid for; a Verdict follows from it and the recipe, so
changed filters judge old answers anew without asking again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fixclip_core.data.captions import caption_words, clean_caption, rejection, split_sentences
from fixclip_core.synthesis.language import language_probability
from fixclip_core.synthesis.prompts import Prompt
from fixclip_core.synthesis.recipe import CaptionRecipe, Kind

MAX_SHORT_SENTENCES = 2
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_MARKDOWN = re.compile(r"^#{1,6}\s+|\*\*|__", re.MULTILINE)
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay)[,.!]?\s+)?"
    r"(?:here(?: is|'s|’s)\b[^.\n:]{0,80}:|(?:image |detailed )?(?:caption|description):)\s*",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'^["“”](.*)["“”]$', re.DOTALL)
_REFUSAL = re.compile(
    r"\bas an ai\b|\bas a (?:large )?language model\b"
    r"|\bi(?:'m|’m| am) (?:sorry|unable|not able)\b|\bi apologi[sz]e\b"
    r"|\bi (?:can(?:not|'t|’t)|could ?n(?:o|'|’)t|do ?n(?:o|'|’)t) (?:\w+ )?"
    r"(?:see|view|access|assist|help|describe|identify|process|provide|fulfil|fulfill|comply)\b"
    r"|\b(?:no image (?:was|is|has been)|please (?:upload|provide|share|attach)) (?:\w+ ){0,3}"
    r"(?:provided|attached|uploaded|image|picture|photo)",
    re.IGNORECASE,
)
_FULL_STOP = re.compile(r"""[.!?…。！？｡؟۔।]["'”’»)\]」』）]*\s*$""")
_ECHO_WORDS = 5


class MalformedResponseError(ValueError):
    """The response is no chat completion."""


@dataclass(frozen=True)
class Answer:
    """What is kept of a response.

    Attributes:
        content: the text, unchanged.
        finish_reason: "stop", "length", "content_filter" or what else the server says; "" if it says nothing.
        model: the name under which the server answered.
        tokens: of the answer, by the server's count; 0 if it does not count.
        refusal: what the server says beside an empty text when its model declines.
    """

    content: str
    finish_reason: str
    model: str
    tokens: int
    refusal: str = ""


@dataclass(frozen=True)
class Verdict:
    """`caption` is the cleaned text, or None; then `reason` is a filter's name and `detail` shows why."""

    caption: str | None
    reason: str | None = None
    detail: str = ""


def read_answer(response: Any, model: str = "") -> Answer:
    """The answer in a chat completion.

    Args:
        response: the parsed JSON.
        model: the name that was asked for, where the response names none.

    Raises:
        MalformedResponseError: it is no chat completion; says what it is instead.
    """
    try:
        choice = response["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        finish_reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise MalformedResponseError(f"no chat completion: {response!r}"[:300]) from None
    if isinstance(content, list):  # parts, as some servers answer
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if not isinstance(content, str | None) or not isinstance(refusal, str | None):
        raise MalformedResponseError(f"no text in the message: {message!r}"[:300])
    usage = response.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else 0
    named = response.get("model")
    return Answer(
        content=content or "",
        finish_reason=finish_reason if isinstance(finish_reason, str) else "",
        model=named if isinstance(named, str) and named else model,
        tokens=tokens if isinstance(tokens, int) else 0,
        refusal=refusal or "",
    )


def accept(answer: Answer, prompt: Prompt, recipe: CaptionRecipe, kind: Kind = "long") -> Verdict:
    """Whether an answer is a caption; the first filter that it fails gives the reason.

    Reasons: "refusal", "cut_off", "empty_caption", "echo", those of `captions.rejection` ("too_short", "repetition",
    "not_sentences"), "too_long", "no_sentence", "wrong_language". "same_caption" needs the other answers of a shard
    and is judged there.

    Args:
        answer: what the model wrote.
        prompt: what it was asked.
        recipe: the filters and their limits.
        kind: a short caption has at most two sentences ("too_long"), and fewer words than a long one.
    """
    filters = recipe.filters
    caption = clean_answer(answer.content)
    reason = _unfinished(answer, caption, recipe)
    if reason is None and not any(character.isalnum() for character in caption):
        reason = "empty_caption"
    if reason is None and filters.max_prompt_share is not None:
        reason = "echo" if prompt_share(caption, prompt.text) > filters.max_prompt_share else None
    reason = reason or rejection(caption, filters.of_text(kind)) or _wrong_length(caption, recipe, kind)
    if reason is None and filters.language is not None:
        probability = language_probability(caption, filters.language)
        reason = "wrong_language" if probability < filters.min_language_probability else None
    if reason is None:
        return Verdict(caption)
    return Verdict(None, reason, (caption or answer.refusal or answer.finish_reason)[:200])


def _unfinished(answer: Answer, caption: str, recipe: CaptionRecipe) -> str | None:
    declined = answer.refusal or answer.finish_reason == "content_filter" or _REFUSAL.search(caption[:300])
    if recipe.filters.refusal and declined:
        return "refusal"
    return "cut_off" if recipe.filters.cut_off and answer.finish_reason == "length" else None


def _wrong_length(caption: str, recipe: CaptionRecipe, kind: Kind) -> str | None:
    sentences = [caption[start:end] for start, end in split_sentences(caption)]
    filters = recipe.filters
    too_many = kind == "short" and len(sentences) > MAX_SHORT_SENTENCES
    if too_many or (filters.max_words is not None and len(caption_words(caption)) > filters.max_words):
        return "too_long"
    whole = sum(1 for sentence in sentences if _FULL_STOP.search(sentence))
    # A short caption is often a phrase; its full stop proves nothing.
    least = filters.min_sentences if kind == "long" else None
    return "no_sentence" if least is not None and whole < least else None


def clean_answer(content: str) -> str:
    """The caption in an answer: without a model's thoughts, markdown, quotes around it and "Here is a caption:"."""
    text = _MARKDOWN.sub("", _THOUGHT.sub("", content)).strip()
    text = _PREAMBLE.sub("", text, count=1).strip()
    quoted = _QUOTED.match(text)
    return clean_caption(quoted[1] if quoted else text)


def prompt_share(caption: str, prompt: str) -> float:
    """Share of the caption's runs of five words that stand in the prompt too; 0 for a caption of fewer words."""
    runs, known = _runs(caption), set(_runs(prompt))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _runs(text: str) -> list[tuple[str, ...]]:
    words = caption_words(text)
    return [tuple(words[i : i + _ECHO_WORDS]) for i in range(len(words) - _ECHO_WORDS + 1)]
