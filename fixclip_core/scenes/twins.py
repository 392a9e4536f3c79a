"""Near twins of a scene: the same scene and the same caption, but for one thing.

Only a model that reads this one thing, and sees it, tells a twin from its original. Where in the caption it stands
is chosen evenly, so that a reader of 20 or of 77 tokens can be told from one of 248.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fixclip_core.scenes.captions import Caption, long_caption
from fixclip_core.scenes.grammar import ORDINALS, Split, grammar_of, with_articles, word_pools
from fixclip_core.scenes.reader import antecedent_words, find_words, read_caption
from fixclip_core.scenes.references import count_words, reference_caption
from fixclip_core.scenes.world import PLACES, WORLD, Scene, World, names_of

Change = Literal["colour", "shape", "size", "place", "swap", "reference"]
CHANGES: tuple[Change, ...] = get_args(Change)

# Position of the first token that differs; the start token has position 0, so a stock encoder reads up to 75.
DIFFERENCE_ZONES = {"before 20": range(1, 20), "20 to 77": range(20, 76), "77 to 248": range(76, 247)}


@dataclass(frozen=True)
class Twin:
    """A scene that differs from another one in one thing, and the captions of both.

    Attributes:
        change: what differs: the colour, shape, size or place of an object; the colours of two objects, swapped; or
            the object that a reference points to, and with it what the referring object looks like.
        scene: the twin; the original is the scene that `near_twins` was given.
        original: caption of the original.
        caption: caption of the twin: the same words but for those that say what differs.
        start: the first character at which the captions differ.
    """

    change: Change
    scene: Scene
    original: str
    caption: str
    start: int


def difference_zone(twin: Twin, tokens: Callable[[str], int] = count_words) -> str:
    """The name in `DIFFERENCE_ZONES` of where the captions begin to differ; `tokens` counts a text's tokens.

    What lies behind the 248th token counts as "77 to 248".
    """
    return _zone(twin.original, twin.start, tokens)


def _zone(text: str, start: int, tokens: Callable[[str], int]) -> str:
    position = tokens(text[:start].rstrip()) + 1
    return next((name for name, zone in DIFFERENCE_ZONES.items() if position in zone), "77 to 248")


def near_twins(
    scene: Scene,
    seed: int | str,
    *,
    split: Split = "train",
    synonyms: Split | None = None,
    world: World = WORLD,
) -> list[Twin]:
    """One twin for each `Change` that the scene allows; the same seed gives the same twins.

    The captions are `long_caption(scene, seed)` and, for the change "reference", `reference_caption` of the kinds
    "same" and "again" with one reference, by name or order. A place changes where one is free, colours are swapped
    between two that differ, and a reference changes where another object before it would make a difference. For each
    change the zone of the difference is drawn first, evenly among those that have one, then the object.

    Raises:
        ValueError: as `long_caption`.
    """
    rng = random.Random(f"near twins/{seed}")
    editor = _Editor(scene, word_pools(world, synonyms or split), grammar_of(split).counted, rng, world)
    plain = long_caption(scene, seed, split=split, synonyms=synonyms, world=world)
    changes = [change for change in CHANGES if change != "reference"]
    twins = [editor.choose(change, plain.text, editor.edits(change, plain)) for change in changes]
    try:
        options: dict[str, Any] = {"kinds": ("same", "again"), "pointers": ("name", "order"), "max_pointing": 1}
        referring = reference_caption(scene, seed, **options, split=split, synonyms=synonyms, world=world)
    except ValueError:  # no two objects have anything in common
        pass
    else:
        twins.append(editor.choose("reference", referring.text, editor.references(referring)))
    return [twin for twin in twins if twin is not None]


@dataclass(frozen=True)
class _Edit:
    """New words for characters start..end of a text."""

    start: int
    end: int
    words: str


Edits = tuple[_Edit, ...]


@dataclass(frozen=True)
class _Editor:
    scene: Scene
    pools: dict[str, dict[str, tuple[str, ...]]]
    counted: Sequence[str]
    rng: random.Random
    world: World

    def choose(self, change: Change, original: str, variants: Sequence[Edits]) -> Twin | None:
        """One of the variants: first a zone, then a variant of this zone."""
        zones: dict[str, list[tuple[str, int]]] = {}
        for edits in variants:
            text = _apply(original, edits)
            start = next(i for i, (a, b) in enumerate(zip(original, text, strict=False)) if a != b)
            start = original.rfind(" ", 0, start) + 1  # where the word begins in which they differ
            zones.setdefault(_zone(original, start, count_words), []).append((text, start))
        if not zones:
            return None
        text, start = self.rng.choice(zones[self.rng.choice(sorted(zones))])
        return Twin(change, self._scene(text), original, text, start)

    def edits(self, change: Change, caption: Caption) -> list[Edits]:
        """Every object, or pair of objects, with a change; what it changes into is drawn."""
        spans = [span for span in caption.spans if span.place]
        if change == "swap":
            return self._swaps(caption)
        free = [place for place in PLACES if place not in {span.place for span in spans}]
        others = dict.fromkeys(PLACES, free) if change == "place" else {}
        variants: list[Edits] = []
        for span in spans:
            ((start, end), value), *_ = find_words(caption.text[span.start : span.end], change, self.world)
            candidates = others[value] if change == "place" else [n for n in names_of(self.world)[change] if n != value]
            if candidates:
                words = self.rng.choice(self.pools[change][self.rng.choice(candidates)])
                variants.append((_Edit(span.start + start, span.start + end, words),))
        return variants

    def _swaps(self, caption: Caption) -> list[Edits]:
        found = []
        for span in caption.spans:
            if span.place:
                ((start, end), colour), *_ = find_words(caption.text[span.start : span.end], "colour", self.world)
                found.append((span.start + start, span.start + end, colour))
        return [
            (_Edit(a, b, caption.text[c:d].lower()), _Edit(c, d, caption.text[a:b].lower()))
            for i, (a, b, colour) in enumerate(found)
            for c, d, other in found[i + 1 :]
            if colour != other
        ]

    def references(self, caption: Caption) -> list[Edits]:
        """The one reference of a caption, pointed to any object before it that makes a difference."""
        (reference,) = caption.references
        order = [span for span in caption.spans if span.place]
        own = next(span for span in order if span.place == reference.place)
        where = antecedent_words(caption.text[own.start : own.end], self.world)
        assert where is not None
        objects = {item.place: item for item in self.scene.objects}
        meant = objects[reference.place]
        named = next(kind for kind in ("size", "colour") if kind not in reference.properties)
        variants: list[Edits] = []
        for number, span in enumerate(order[: order.index(own)]):
            item = objects[str(span.place)]
            alike = all(getattr(item, kind) == getattr(meant, kind) for kind in reference.properties)
            # "the second shape again, only small" is odd where the second shape is small itself
            odd = reference.kind == "again" and getattr(item, named) == getattr(meant, named)
            if not alike and not odd:
                words = f"the {ORDINALS[number]} {self.rng.choice(self.counted)}"
                variants.append((_Edit(own.start + where[0], own.start + where[1], words),))
        return variants

    def _scene(self, text: str) -> Scene:
        """What a text describes, each object with the jitter that it has in the original; a moved one keeps its own."""
        read = read_caption(text, self.world)
        jitters = {item.place: item.jitter for item in self.scene.objects}
        gone = [place for place in jitters if place not in {item.place for item in read.objects}]
        moved = jitters[gone[0]] if gone else (0, 0)
        return replace(
            read, objects=tuple(replace(item, jitter=jitters.get(item.place, moved)) for item in read.objects)
        )


def _apply(text: str, edits: Edits) -> str:
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        words = edit.words[0].upper() + edit.words[1:] if text[edit.start].isupper() else edit.words
        text = text[: edit.start] + words + text[edit.end :]
    return with_articles(text)
