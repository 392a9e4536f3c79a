"""A prompt as tokens: cleaned, weights parsed, textual inversions expanded, and the places where a pass may end."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from fixclip_core.data.captions import split_clauses, split_sentences
from fixclip_diffusion.conditioning import Break, Context, PromptTokens, short_length
from fixclip_diffusion.prompt_weights import Fragment, parse_weights
from fixclip_diffusion.tokenizer import CleanText, FixClipTokenizer

Span = tuple[int, int]


def tokenize_prompt(tokenizer: FixClipTokenizer, prompt: str, weights: str | None = None) -> PromptTokens:
    """Text to tokens.

    Args:
        tokenizer: gives the ids; its added tokens NAME, NAME_1, NAME_2, ... are the vectors of a textual inversion NAME
            and are all used where the text names NAME, in whatever case.
        prompt: any text; a `CleanText` is taken as it is.
        weights: syntax of prompt weights, "a1111" or "compel"; None takes all characters literally.

    Raises:
        ValueError: the prompt is not text, or its weights cannot be parsed.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text, got {type(prompt).__name__}: {prompt!r}")
    fragments = parse_weights(tokenizer.clean(prompt), weights)
    text = CleanText("".join(fragment.text for fragment in fragments))
    ids: list[int] = []
    spans: list[Span] = []
    factors: list[float] = []
    joints: set[int] = set()  # places inside a textual inversion
    forced: set[int] = set()  # places of BREAK
    begin = 0
    for fragment in fragments:
        for vector_ids, span in _tokens(tokenizer, fragment):
            joints.update(range(len(ids), len(ids) + len(vector_ids) - 1))
            ids += vector_ids
            spans += [(span[0] + begin, span[1] + begin)] * len(vector_ids)
            factors += [fragment.weight] * len(vector_ids)
        begin += len(fragment.text)
        if fragment.ends_pass and ids:
            forced.add(len(ids) - 1)
    breaks = [
        Break.ALWAYS if place in forced else Break.NEVER if place in joints else level
        for place, level in enumerate(places_to_break(text, spans))
    ]
    return PromptTokens(str(text), tuple(ids), tuple(spans), tuple(breaks), tuple(factors))


def context_of(encoder: Any, tokenizer: FixClipTokenizer) -> Context:
    """What `conditioning` must know of an encoder and its tokenizer; stock classes have 77 positions and no others."""
    return context_of_config(encoder.config, tokenizer)


def context_of_config(config: Any, tokenizer: FixClipTokenizer) -> Context:
    """The same of an encoder's configuration, without its weights."""
    return Context(
        length=config.max_position_embeddings,
        short_length=short_length(config),
        start_id=tokenizer.bos_token_id,
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        padding=getattr(config, "padding", "keep"),
    )


def _tokens(tokenizer: FixClipTokenizer, fragment: Fragment) -> Iterator[tuple[list[int], Span]]:
    """Ids and characters of each token; a textual inversion is one item with the ids of all its vectors."""
    encoded = tokenizer(CleanText(fragment.text), add_special_tokens=False, return_offsets_mapping=True)
    pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    place = 0
    while place < len(pairs):
        token_id, (start, end) = pairs[place]
        vectors = tokenizer.inversion_ids(token_id)
        # A text that diffusers has expanded already names the vectors one by one.
        named = [other for other, _ in pairs[place : place + len(vectors)]]
        if named == vectors:
            end = pairs[place + len(vectors) - 1][1][1]
            place += len(vectors)
        else:
            place += 1
        yield vectors, (int(start), int(end))


_SPACE = re.compile(r"\s")


def places_to_break(text: str, spans: list[Span]) -> list[Break]:
    """The `Break` behind each token: what ends between its last character and the next token's first."""
    ends = {
        Break.SENTENCE: [end for _, end in split_sentences(text)],
        Break.CLAUSE: [end for _, end in split_clauses(text)],
    }
    levels = []
    for (_, last), (first, _) in zip(spans, [*spans[1:], (len(text), 0)], strict=False):
        if first < last:  # two tokens of one character, such as an emoji
            levels.append(Break.NEVER)
            continue
        level = Break.WORD if _SPACE.search(text, last, first) else Break.INSIDE_WORD
        for better, places in ends.items():
            at = bisect_left(places, last)
            if at < len(places) and places[at] <= first:
                level = max(level, better)
        levels.append(level)
    return levels
