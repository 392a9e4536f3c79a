"""Captions of scenes, and where in a caption what is said.

A long caption describes every object of a scene, far more than the 77 tokens of CLIP hold; a short one
identifies the scene in a sentence.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fixclip_core.scenes.grammar import (
    COUNTS,
    NOUN_PHRASE,
    Split,
    Words,
    capitalised,
    deal,
    fill,
    grammar_of,
    word_pools,
)
from fixclip_core.scenes.world import WORLD, Scene, World, check_known

Zone = Literal["before", "across", "after", "past"]
ReferenceKind = Literal["same", "again", "default", "remainder"]
Pointer = Literal["place", "order", "name"]
Tokens = Callable[[str], int] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Span:
    """Characters start..end (end excluded) of a caption; they describe the object at `place`, or none if None."""

    start: int
    end: int
    place: str | None


@dataclass(frozen=True)
class Reference:
    """Properties of an object that another sentence of the caption gives; references.py has the rules.

    "The star in the centre is small and has the same colour as the heart." is
    `Reference("same", "centre", ("colour",), antecedent=the span of the heart's sentence, pointer="name")`.

    Attributes:
        kind: "same" (colour), "again" (all but size or colour), "default" or "remainder".
        place: where the object is whose properties are meant.
        properties: which of "shape", "colour" and "size" the antecedent gives.
        antecedent: the sentence that gives them: its `place` is None for a default and a remainder.
        pointer: how "same" and "again" say which object they mean: by its "place" ("the shape in the very centre"),
            "order" ("the second shape") or "name" ("the heart"); None for a default and a remainder.
    """

    kind: ReferenceKind
    place: str
    properties: tuple[str, ...]
    antecedent: Span
    pointer: Pointer | None = None


@dataclass(frozen=True)
class Caption:
    """A caption and which of its characters describe what.

    Spans come in the order of the text, references in the order of the objects that have them. `plain` is the same
    caption without references, each sentence to be understood alone; None where the text has none.
    """

    text: str
    spans: tuple[Span, ...]
    references: tuple[Reference, ...] = ()
    plain: str | None = field(default=None, compare=False)


def long_caption(
    scene: Scene,
    seed: int | str,
    *,
    split: Split = "train",
    synonyms: Split | None = None,
    world: World = WORLD,
) -> Caption:
    """Describe everything that is in a scene, an object after the other in random order.

    An opening names the background and counts the objects; each object gets one sentence, or two short
    ones; with more than four objects a closing sentence comes back to the background. Templates are dealt
    without repetition until all were used. Nine objects make 130 to 240 CLIP tokens.

    Args:
        scene: what to describe.
        seed: any integer or string; the same seed words the same scene alike.
        split: which templates: "train", "heldout" (never used by "train") or "all".
        synonyms: which words for shapes, colours, sizes and places; as `split` unless given.
        world: where the words come from.

    Raises:
        ValueError: an unknown split, or a scene of another world.
    """
    rng = random.Random(f"long caption/{seed}")
    grammar, words = grammar_of(split), Words(word_pools(world, synonyms or split), rng)
    check_known(scene, world)
    about = scene_words(scene, words)
    sentences: list[tuple[str | None, str]] = [(None, fill(rng.choice(grammar.openings), about))]
    items = rng.sample(scene.objects, len(scene.objects))
    for item, template in zip(items, deal(grammar.objects, len(items), rng), strict=True):
        sentences.append((item.place, fill(template, words.of(item))))
    if len(items) > 4:
        sentences.append((None, fill(rng.choice(grammar.closings), about)))
    return join([(place, capitalised(text)) for place, text in sentences], " ")


def short_caption(
    scene: Scene,
    seed: int | str,
    *,
    max_objects: int = 3,
    split: Split = "train",
    synonyms: Split | None = None,
    world: World = WORLD,
) -> Caption:
    """Identify a scene in one sentence: its background, how many objects it has, and up to `max_objects` of them.

    With all objects named it says that there is nothing else. Three objects make about 45 CLIP tokens, four
    about 55. Arguments and errors are those of `long_caption`; spans cover the objects' noun phrases.
    """
    if max_objects < 1:
        raise ValueError(f"max_objects={max_objects}: it must be at least 1")
    rng = random.Random(f"short caption/{seed}")
    grammar, words = grammar_of(split), Words(word_pools(world, synonyms or split), rng)
    check_known(scene, world)
    items = rng.sample(scene.objects, min(max_objects, len(scene.objects)))
    complete = len(items) == len(scene.objects)
    template = rng.choice(grammar.short_complete if complete else grammar.short_partial)
    before, after = fill(template, {**scene_words(scene, words), "objects": "\n"}).split("\n")
    phrases = [fill(NOUN_PHRASE, words.of(item)) for item in items]
    pieces: list[tuple[str | None, str]] = [(None, before)] if before else []
    for number, (item, phrase) in enumerate(zip(items, phrases, strict=True)):
        if number:
            pieces.append((None, " and " if number == len(items) - 1 else ", "))
        pieces.append((item.place, phrase))
    pieces.append((None, after))
    first_place, first = pieces[0]
    return join([(first_place, capitalised(first)), *pieces[1:]], "")


def scene_words(scene: Scene, words: Words) -> dict[str, str]:
    """What openings, closings and short captions need to know of a scene as a whole."""
    if not scene.objects:
        raise ValueError("a scene without objects has no caption")
    one = len(scene.objects) == 1
    return {
        "background": words.choose("background", scene.background),
        "count": COUNTS[len(scene.objects) - 1],
        "shapes": "shape" if one else "shapes",
        "figures": "figure" if one else "figures",
        "are": "is" if one else "are",
    }


def join(pieces: Sequence[tuple[str | None, str]], glue: str) -> Caption:
    text, spans = "", []
    for place, piece in pieces:
        text += glue if text else ""
        spans.append(Span(len(text), len(text) + len(piece), place))
        text += piece
    return Caption(text, tuple(spans))


def token_ranges(caption: Caption, tokens: Tokens) -> list[tuple[int, int]]:
    """First and last position that each span takes in a tokenized caption; the start token has position 0.

    Args:
        caption: a caption whose spans start and end where words do, as all captions here do.
        tokens: either a function that counts a text's tokens without special ones, e.g.
            `lambda text: len(tokenizer.encode(text))` for open_clip, or the (start, end) characters of every
            token of the text without special ones, i.e. `offset_mapping` of a fast tokenizer.

    Returns:
        (first, last) per span, in the order of the spans.
    """
    return [_token_range(caption.text, span, tokens) for span in caption.spans]


def _token_range(text: str, span: Span, tokens: Tokens) -> tuple[int, int]:
    def before(character: int) -> int:
        if callable(tokens):
            return tokens(text[:character])
        return sum(end <= character for _, end in tokens)

    return before(span.start) + 1, before(span.end)


def reference_distances(caption: Caption, tokens: Tokens) -> list[int]:
    """Tokens from an object's sentence to the one that it refers to, for each reference of a caption.

    Counted from the last token of the earlier sentence to the first of the later one: neighbours have distance 1,
    and at a distance of 77 and more no window of 77 tokens holds a token of both. Arguments as in `token_ranges`.
    """
    spans = {span.place: span for span in caption.spans}
    distances = []
    for reference in caption.references:
        pair = sorted((spans[reference.place], reference.antecedent), key=lambda span: span.start)
        (_, last), (first, _) = (_token_range(caption.text, span, tokens) for span in pair)
        distances.append(first - last)
    return distances


def object_zones(
    caption: Caption, tokens: Tokens, *, short_length: int = 77, long_length: int = 248
) -> dict[str, Zone]:
    """Where each object's sentence lies for a model that reads `short_length` or `long_length` tokens.

    Both lengths include the start and the end token, which leaves 75 and 246 for the text.

    Returns:
        For each place that the caption describes: "before" (all of it within `short_length`), "across" (cut
        by it), "after" (behind it, all within `long_length`) or "past" (cut by `long_length` or behind it).
    """
    zones: dict[str, Zone] = {}
    for span, (first, last) in zip(caption.spans, token_ranges(caption, tokens), strict=True):
        if span.place is not None:
            zones[span.place] = _zone(first, last, short_length - 2, long_length - 2)
    return zones


def _zone(first: int, last: int, short: int, long: int) -> Zone:
    if last <= short:
        return "before"
    if last > long:
        return "past"
    return "across" if first <= short else "after"
