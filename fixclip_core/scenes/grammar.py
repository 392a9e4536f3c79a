"""The words and sentences of captions: templates with gaps, and which words may fill them.

Training captions and held-out captions share no template and no word for a thing.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fixclip_core.scenes.world import PLACES, WORLD, Colour, SceneObject, Shape, Size, World

Split = Literal["train", "heldout", "all"]

COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Grammar:
    """Sentences with gaps. `{place}` is a phrase that starts with a preposition and has no comma."""

    objects: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    short_complete: tuple[str, ...]
    short_partial: tuple[str, ...]
    places: Mapping[str, tuple[str, ...]]


NOUN_PHRASE = "a {size} {colour} {shape} {place}"

TRAIN = Grammar(
    objects=(
        "a {size} {colour} {shape} sits {place}.",
        "there is a {size} {colour} {shape} {place}.",
        "{place} you can see a {size} {colour} {shape}.",
        "{place} there is a {shape} that is {size} and {colour}.",
        "the {shape} that sits {place} is {size} and {colour}.",
        "a {colour} {shape}, {size} in size, is placed {place}.",
        "{place} lies a {size} {shape} painted in {colour}.",
        "someone has drawn a {size} {shape} {place} and coloured it {colour}.",
        "a {shape} appears {place}. it is {size} and {colour}.",
        "{place} is a {shape}. its colour is {colour} and its size is {size}.",
        "what you find {place} is a {size} {shape} done in {colour}.",
        "painted in {colour}, a {size} {shape} stands {place}.",
        "the {colour} {shape} that is shown {place} is {size}.",
        "the picture shows a {size} {shape} in {colour} {place}.",
    ),
    openings=(
        "{count} {shapes} {are} drawn on a plain {background} background.",
        "this picture shows {count} {shapes} on a {background} background.",
        "on a plain {background} background there {are} {count} simple {shapes}.",
        "the background is plain {background} and holds {count} {shapes}.",
    ),
    closings=(
        "all the rest of the picture is plain {background}.",
        "all of this is set against a plain {background} background.",
        "nothing else at all stands on the {background} background.",
        "apart from that everything in the picture is {background}.",
    ),
    short_complete=(
        "{count} {shapes} on a {background} background: {objects}.",
        "a {background} picture of {objects} and nothing else.",
        "only {objects} on a plain {background} background.",
    ),
    short_partial=(
        "{count} shapes on a {background} background, including {objects}.",
        "a {background} picture of {count} shapes, among them {objects}.",
        "{objects} in a {background} picture with {count} shapes.",
    ),
    places={
        "top left": ("in the top left corner", "at the top left", "on the left of the top row"),
        "top centre": ("in the middle of the top row", "at the top in the middle", "halfway along the top edge"),
        "top right": ("in the top right corner", "at the top right", "on the right of the top row"),
        "middle left": (
            "on the left of the middle row",
            "halfway down on the left",
            "in the middle of the left edge",
        ),
        "centre": (
            "in the very centre",
            "right in the middle",
            "in the middle of the middle row",
        ),
        "middle right": (
            "on the right of the middle row",
            "halfway down on the right",
            "in the middle of the right edge",
        ),
        "bottom left": (
            "in the bottom left corner",
            "at the bottom left",
            "on the left of the bottom row",
        ),
        "bottom centre": (
            "in the middle of the bottom row",
            "at the bottom in the middle",
            "halfway along the bottom edge",
        ),
        "bottom right": (
            "in the bottom right corner",
            "at the bottom right",
            "on the right of the bottom row",
        ),
    },
)

HELDOUT = Grammar(
    objects=(
        "{place} one notices a {size} {shape}, {colour} all over.",
        "as for the {shape} {place}, it is {size} and its colour is {colour}.",
        "a {size} {shape} has been put {place}. it is entirely {colour}.",
        "resting {place} is a {colour} {shape} of {size} size.",
        "{place} the artist has left a {shape}, which is {colour} and {size}.",
    ),
    openings=(
        "{count} {figures} {are} arranged on a sheet of {background} paper.",
        "here {are} {count} plain {figures} in front of a {background} wall.",
    ),
    closings=(
        "everywhere else the sheet is just {background} and empty.",
        "all around them one sees nothing but {background} paper.",
    ),
    short_complete=(
        "a {background} sheet that shows {objects} and no other figure.",
        "on {background} paper one sees only {objects}.",
    ),
    short_partial=(
        "a {background} sheet with {count} figures, such as {objects}.",
        "on {background} paper one sees {count} figures, for instance {objects}.",
    ),
    places={
        "top left": ("in the upper left corner", "on the left side of the upper row"),
        "top centre": ("in the centre of the upper row", "at the centre of the upper edge"),
        "top right": ("in the upper right corner", "on the right side of the upper row"),
        "middle left": ("on the left side of the central row", "at the centre of the left edge"),
        "centre": ("at the exact centre of the sheet", "in the centre of the central row"),
        "middle right": ("on the right side of the central row", "at the centre of the right edge"),
        "bottom left": ("in the lower left corner", "on the left side of the lower row"),
        "bottom centre": ("in the centre of the lower row", "at the centre of the lower edge"),
        "bottom right": ("in the lower right corner", "on the right side of the lower row"),
    },
)


def grammar_of(split: Split) -> Grammar:
    if split == "train":
        return TRAIN
    if split == "heldout":
        return HELDOUT
    if split != "all":
        raise ValueError(f"split={split!r}: it must be 'train', 'heldout' or 'all'")
    return Grammar(
        objects=TRAIN.objects + HELDOUT.objects,
        openings=TRAIN.openings + HELDOUT.openings,
        closings=TRAIN.closings + HELDOUT.closings,
        short_complete=TRAIN.short_complete + HELDOUT.short_complete,
        short_partial=TRAIN.short_partial + HELDOUT.short_partial,
        places={place: TRAIN.places[place] + HELDOUT.places[place] for place in PLACES},
    )


@lru_cache(maxsize=32)
def word_pools(world: World, split: Split) -> dict[str, dict[str, tuple[str, ...]]]:
    """The words of a split: kind -> name -> words (or phrases, for places)."""
    kinds: dict[str, Sequence[Shape | Colour | Size]] = {
        "shape": world.shapes,
        "colour": world.colours,
        "size": world.sizes,
        "background": world.backgrounds,
    }
    pools: dict[str, dict[str, tuple[str, ...]]] = {"place": dict(grammar_of(split).places)}
    for kind, entries in kinds.items():
        words = {"train": lambda entry: entry.words, "heldout": lambda entry: entry.heldout}
        pick = words.get(split, lambda entry: entry.words + entry.heldout)
        pools[kind] = {entry.name: pick(entry) for entry in entries}
    return pools


@dataclass(frozen=True)
class Words:
    """What words one caption: the pools, and the generator that chooses from them."""

    pools: dict[str, dict[str, tuple[str, ...]]]
    rng: random.Random

    def choose(self, kind: str, name: str) -> str:
        return self.rng.choice(self.pools[kind][name])

    def of(self, item: SceneObject) -> dict[str, str]:
        return {kind: self.choose(kind, getattr(item, kind)) for kind in ("shape", "colour", "size", "place")}


def deal(templates: Sequence[str], number: int, rng: random.Random) -> list[str]:
    """`number` templates; none comes twice before all came once."""
    dealt: list[str] = []
    while len(dealt) < number:
        dealt += rng.sample(templates, min(len(templates), number - len(dealt)))
    return dealt


def fill(template: str, words: Mapping[str, str]) -> str:
    """Fill the gaps; "a" becomes "an" before a vowel that is heard ("an orange hoop", but "a unicorn")."""
    return re.sub(r"\ba(?= (?:hour|(?!uni|eu|one\b)[aeiou]))", "an", template.format_map(words))


def capitalised(sentences: str) -> str:
    return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), sentences)


def vocabulary(world: World = WORLD, split: Split = "all") -> tuple[str, ...]:
    """Every lower-case word and punctuation mark that captions of this world can contain, sorted.

    They are cut where CLIP's tokenizer cuts before it applies byte pairs, so the byte pairs of these words
    are all that captions need.
    """
    grammar = grammar_of(split)
    templates = grammar.objects + grammar.openings + grammar.closings
    templates += (*grammar.short_complete, *grammar.short_partial, NOUN_PHRASE, "an, and is are")
    phrases = [re.sub(r"{\w+}", " ", template) for template in templates]
    for named in word_pools(world, split).values():
        phrases += [phrase for pool in named.values() for phrase in pool]
    counted = {"train": "shape shapes", "heldout": "figure figures", "all": "shape shapes figure figures"}
    phrases += [*COUNTS, counted[split]]
    return tuple(sorted(set(re.findall(r"[^\W\d_]+|[^\w\s]+", " ".join(phrases).lower()))))
