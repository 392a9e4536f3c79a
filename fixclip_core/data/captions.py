"""Captions: cleaning, sentences, short captions from long ones, and filters.

Needs only the standard library and ftfy, so inference can use it too.
"""

import html
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Literal, get_args

import ftfy

ShortPolicy = Literal["given", "first_sentence", "random_sentence", "random_sentences", "debiased"]
SHORT_POLICIES: tuple[str, ...] = get_args(ShortPolicy)

Span = tuple[int, int]

_CLOSING = r"""["'”’»)\]}]*"""
_LIST_ITEM = r"(?:[-*•]|\d{1,3}[.)])[ \t]"
_BLOCK_END = re.compile(rf"\n(?:\s*\n\s*|\s*(?={_LIST_ITEM}))")
_SENTENCE_END = re.compile(
    rf"(?<![.!?…؟۔।])(?P<latin>[.!?…؟۔।]++)(?P<closing>{_CLOSING}+)(?:\s+|$)"
    r"|[。！？｡]+[」』”’》）】)]*\s*"
    rf"|(?P<block>{_BLOCK_END.pattern})"
)
_CLAUSE_END = re.compile(rf"[,;:]{_CLOSING}\s+|\s[–—-]\s+|[，、；：]\s*")
_NUMBERED_ENTITY = re.compile(r"&#0*([0-9]{1,9})[0-9]*")
_WORD_BEFORE_STOP = re.compile(r"[\w.]+$")
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W_]+(?:['’-][^\W_]+)*")

# A stop after these never ends a sentence; after the second kind it does where a capital follows.
_NEVER_FINAL = re.compile(r"mr|mrs|ms|dr|prof|rev|gen|sen|st|mt|ft|vs|cf|fig|approx|e\.g|i\.e|eg|ie", re.IGNORECASE)
_SELDOM_FINAL = re.compile(r"etc|inc|ltd|co|corp|jr|sr|am|pm|ca|al|dept|est|(?:[a-z]\.)+[a-z]", re.IGNORECASE)
_BEFORE_A_NUMBER = re.compile(r"nos?|vol|pp?|ch|sec|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec", re.IGNORECASE)


@lru_cache(maxsize=4096)
def shared_tokens(ids: tuple[int, ...], other: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the tokens that two wordings of a caption share, in `ids` and in `other`: the longest common runs.

    For example (5, 1, 2, 9) and (5, 2, 3, 9) share the tokens 5, 2 and 9, at (0, 2, 3) and (0, 1, 3).
    """
    if ids == other:
        return (tuple(range(len(ids))),) * 2
    blocks = SequenceMatcher(None, ids, other, autojunk=False).get_matching_blocks()
    own = tuple(block.a + i for block in blocks for i in range(block.size))
    return own, tuple(block.b + i for block in blocks for i in range(block.size))


def clean_caption(text: str) -> str:
    """Mend the encoding, resolve HTML entities and collapse white space, as CLIP's tokenizers do.

    Paragraphs and list items stay apart by a blank line, because they end a sentence that has no full stop.
    """
    text = _unescape(_unescape(ftfy.fix_text(text)))
    blocks = (" ".join(block.split()) for block in _BLOCK_END.split(text))
    return "\n\n".join(block for block in blocks if block)


def _unescape(text: str) -> str:
    """`html.unescape`, which raises ValueError where "&#" is followed by more than 4,300 digits; 9 mean the same."""
    return html.unescape(_NUMBERED_ENTITY.sub(r"&#\1", text))


def split_sentences(text: str) -> list[Span]:
    """Sentences as character spans (start, end) that tile the text: joined, they give it back.

    White space belongs to the sentence before it. Abbreviations, initials, decimals, numbered items and
    quotes inside a sentence do not end it; a blank line or a list item does; 。！？ need no white space.
    """
    return _spans(text, [m.end() for m in _SENTENCE_END.finditer(text) if _ends_sentence(text, m)])


def split_clauses(text: str) -> list[Span]:
    """Like `split_sentences`, but also after commas, semicolons, colons and dashes between words."""
    return [
        (start + a, start + b)
        for start, end in split_sentences(text)
        for a, b in _spans(text[start:end], [m.end() for m in _CLAUSE_END.finditer(text[start:end])])
    ]


def _spans(text: str, ends: list[int]) -> list[Span]:
    """Spans between the cuts; a span with no letter or digit joins the one before it, at the beginning the one after.

    Each character is looked at once: before the first span, only what follows the last cut can have content.
    """
    spans: list[Span] = []
    start = looked_at = 0
    for end in [*ends, len(text)]:
        if end <= looked_at:
            continue
        has_content = _has_content(text[looked_at:end])
        looked_at = end
        if spans and not has_content:
            spans[-1] = (spans[-1][0], end)
        elif end == len(text) or has_content:
            spans.append((start, end))
        else:
            continue
        start = end
    return spans


def _has_content(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    stops, following = match["latin"], text[match.end() : match.end() + 1]
    if stops is None or not following:
        return True
    if _BLOCK_END.match(text, match.end("closing")):
        return True
    if (match["closing"] or len(stops) > 1 or "…" in stops) and following.islower():
        return False  # "Stop!" he said; wait... and see
    if stops != ".":
        return True
    before = _WORD_BEFORE_STOP.search(text, max(0, match.start() - 40), match.start())
    word = before[0] if before else ""
    return not _is_abbreviation(word, following) and not _is_item_number(text, match.start(), word)


def _is_abbreviation(word: str, following: str) -> bool:
    if _NEVER_FINAL.fullmatch(word) or (len(word) == 1 and word.isupper() and word != "I"):
        return True
    if _BEFORE_A_NUMBER.fullmatch(word):
        return following.isdigit()
    return bool(_SELDOM_FINAL.fullmatch(word)) and not following.isupper()


def _is_item_number(text: str, stop: int, word: str) -> bool:
    """Whether this is the "1." that opens a list item rather than a number that closes a sentence."""
    if not word.isdigit() or len(word) > 3:
        return False
    start = stop - len(word)
    while start and text[start - 1] in " \t":
        start -= 1
    if start and text[start - 1] == "\n":
        return True
    while start and text[start - 1].isspace():
        start -= 1
    return start == 0


@dataclass(frozen=True)
class ShortCaptions:
    """How a sample's short caption comes about.

    Attributes:
        policy: `given` takes the data's; the others take sentences of the long caption.
        max_sentences: `random_sentences` takes 1 to this many, in the order of the text. `debiased` takes any number
            of all but the first, which sums the others up, in random order: of sentences s_0..s_n-1 the short caption
            is s_i1 .. s_ik, k drawn from 1 to n - 1 and the i from 1 to n - 1 without replacement. The long caption
            keeps all n (DeBias-CLIP, arXiv 2602.22419, CVPR 2026).
        drop_from_long: leave the sentences used as the short caption out of the long one, unless nothing
            would remain.
    """

    policy: ShortPolicy = "first_sentence"
    max_sentences: int = 3
    drop_from_long: bool = False

    def __post_init__(self) -> None:
        if self.policy not in SHORT_POLICIES:
            raise ValueError(f"short caption policy {self.policy!r}: choose one of {', '.join(SHORT_POLICIES)}")
        if self.max_sentences < 1:
            raise ValueError(f"max_sentences={self.max_sentences}: it must be at least 1")


def caption_pair(long: str, given_short: str | None, options: ShortCaptions, rng: random.Random) -> tuple[str, str]:
    """The (long, short) captions to train on.

    Args:
        long: the cleaned long caption.
        given_short: the data's own short caption, used by the policy `given` only.
        options: the policy.
        rng: the sample's own generator, the only source of randomness.

    Raises:
        ValueError: the long caption is empty, or the policy is `given` and there is no short caption.
    """
    sentences = [text for start, end in split_sentences(long) if (text := long[start:end].strip())]
    if not sentences:
        raise ValueError("the long caption is empty")
    chosen = _choose(sentences, given_short, options, rng)
    short = given_short if options.policy == "given" else " ".join(sentences[i] for i in chosen)
    assert short is not None
    if options.drop_from_long and 0 < len(chosen) < len(sentences):
        dropped = set(chosen)
        long = " ".join(text for i, text in enumerate(sentences) if i not in dropped)
    return long, short


def _choose(sentences: list[str], given_short: str | None, options: ShortCaptions, rng: random.Random) -> list[int]:
    """Indices of the sentences that make up the short caption, in its order."""
    if options.policy == "given":
        if not given_short or not given_short.strip():
            raise ValueError("the policy is 'given', and there is no short caption")
        same = {given_short[a:b].strip().casefold() for a, b in split_sentences(given_short)}
        return [i for i, text in enumerate(sentences) if text.casefold() in same]
    if options.policy == "first_sentence":
        return [0]
    if options.policy == "random_sentence":
        return [rng.randrange(len(sentences))]
    if options.policy == "debiased":
        rest = range(1, len(sentences)) if len(sentences) > 1 else range(1)
        return rng.sample(rest, rng.randint(1, len(rest)))
    count = rng.randint(1, min(options.max_sentences, len(sentences)))
    return sorted(rng.sample(range(len(sentences)), count))


@dataclass(frozen=True)
class CaptionFilters:
    """Limits outside which a long caption is not worth learning from; None switches one off.

    Attributes:
        min_words: fewest words ("too_short"); a CJK character counts as a word.
        max_repeated_share: largest share of word triples that occurred before ("repetition").
        max_word_run: most times in a row that one word may occur ("repetition").
        min_letter_share: smallest share of letters among the visible characters ("not_sentences").
        min_words_per_clause: smallest mean length between punctuation marks; tag lists have fewer
            ("not_sentences").
    """

    min_words: int | None = 8
    max_repeated_share: float | None = 0.4
    max_word_run: int | None = 3
    min_letter_share: float | None = 0.6
    min_words_per_clause: float | None = 2.5

    def __post_init__(self) -> None:
        for name in ("max_repeated_share", "min_letter_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: it must lie between 0 and 1, or be None to switch it off")
        for name in ("min_words", "max_word_run", "min_words_per_clause"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"{name}={limit}: it must be positive, or None to switch it off")


# The limits that may have left out a caption, by the reason that is reported.
LIMITS = {
    "too_short": ("min_words",),
    "repetition": ("max_word_run", "max_repeated_share"),
    "not_sentences": ("min_letter_share", "min_words_per_clause"),
}


def rejection(text: str, filters: CaptionFilters) -> str | None:
    """Why the cleaned caption is filtered out: "too_short", "repetition", "not_sentences", or None."""
    words = caption_words(text)
    checks: tuple[tuple[str, float | None, Callable[[float], bool]], ...] = (
        ("too_short", filters.min_words, lambda limit: len(words) < limit),
        ("repetition", filters.max_word_run, lambda limit: longest_run(words) > limit),
        ("repetition", filters.max_repeated_share, lambda limit: repeated_share(words) > limit),
        ("not_sentences", filters.min_letter_share, lambda limit: letter_share(text) < limit),
        ("not_sentences", filters.min_words_per_clause, lambda limit: words_per_clause(text) < limit),
    )
    return next((reason for reason, limit, fails in checks if limit is not None and fails(limit)), None)


def caption_words(text: str) -> list[str]:
    """Lower-case words without punctuation; each CJK character is one."""
    return [word.lower() for word in _WORD.findall(text)]


def longest_run(words: list[str]) -> int:
    """How many times in a row one word occurs at most."""
    return max(_run_lengths(words), default=0)


def _run_lengths(words: list[str]) -> Iterator[int]:
    length = 0
    for i, word in enumerate(words):
        length = length + 1 if i and word == words[i - 1] else 1
        yield length


def repeated_share(words: list[str], size: int = 3) -> float:
    """Share of the runs of `size` words that occurred before: 0 if all are new, near 1 for a loop."""
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def letter_share(text: str) -> float:
    """Share of letters among the characters that are not white space; 0 for an empty text."""
    visible = [character for character in text if not character.isspace()]
    return sum(character.isalpha() for character in visible) / len(visible) if visible else 0.0


def words_per_clause(text: str) -> float:
    """Mean number of words between punctuation marks; 0 for an empty text."""
    clauses = split_clauses(text)
    return len(caption_words(text)) / len(clauses) if clauses else 0.0
