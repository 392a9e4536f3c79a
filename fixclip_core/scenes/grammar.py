"""The words and sentences of captions: templates with gaps, and which words may fill them.

Training captions and held-out captions share no template and no word for a thing.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, TypeVar

from fixclip_core.scenes.world import PLACES, WORLD, Colour, SceneObject, Shape, Size, World

Split = Literal["train", "heldout", "all"]
T = TypeVar("T")

COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclass(frozen=True)
class Grammar:
    """Sentences with gaps. `{place}` is a phrase that starts with a preposition and has no comma.

    Attributes:
        objects, openings, closings: of long captions.
        short_complete, short_partial: short captions that name all objects, or some of them.
        same: an object whose colour is that of `{antecedent}`; see references.py.
        again: an object that is `{antecedent}` once more, but for its size or its colour (`{change}`).
        colourless: an object whose colour another sentence gives, namely one of `defaults`, which sets the
            colour of a shape, or of `remainders`, which sets the colour of all objects that have none yet.
            With each sentence of these three comes the one of `objects` that says the same without a reference.
        fillers: sentences that are true of every scene and hold no word for a shape, colour, size or place.
        counted: what objects are called where they are counted: "the second shape".
        places: the phrases of each place.
    """

    objects: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    short_complete: tuple[str, ...]
    short_partial: tuple[str, ...]
    same: tuple[tuple[str, str], ...]
    again: tuple[tuple[str, str], ...]
    colourless: tuple[tuple[str, str], ...]
    defaults: tuple[str, ...]
    remainders: tuple[str, ...]
    fillers: tuple[str, ...]
    counted: tuple[str, ...]
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
    same=(
        (
            "{place} there is a {size} {shape} of the same colour as {antecedent}.",
            "{place} there is a {shape} that is {size} and {colour}.",
        ),
        (
            "the {shape} {place} is {size} and has the same colour as {antecedent}.",
            "the {shape} that sits {place} is {size} and {colour}.",
        ),
        (
            "a {size} {shape} sits {place}. its colour is that of {antecedent}.",
            "{place} is a {shape}. its colour is {colour} and its size is {size}.",
        ),
        (
            "{place} a {size} {shape} is painted in the colour of {antecedent}.",
            "{place} lies a {size} {shape} painted in {colour}.",
        ),
    ),
    again=(
        ("{place} you can see {antecedent} again, but {change}.", "{place} you can see a {size} {colour} {shape}."),
        (
            "{antecedent} is drawn again {place}, only {change}.",
            "someone has drawn a {size} {shape} {place} and coloured it {colour}.",
        ),
        (
            "{place} there is {antecedent} again, only that it is {change}.",
            "{place} there is a {shape} that is {size} and {colour}.",
        ),
    ),
    colourless=(
        ("a {size} {shape} sits {place}.", "a {size} {colour} {shape} sits {place}."),
        ("{place} there is a {size} {shape}.", "{place} there is a {shape} that is {size} and {colour}."),
        ("{place} you can see a {shape} that is {size}.", "{place} you can see a {size} {colour} {shape}."),
        ("a {shape} appears {place}. it is {size}.", "a {shape} appears {place}. it is {size} and {colour}."),
        ("the picture shows a {size} {shape} {place}.", "the picture shows a {size} {shape} in {colour} {place}."),
    ),
    defaults=(
        "every {shape} is {colour} unless its own sentence says otherwise.",
        "unless something else is said, each {shape} is {colour}.",
        "any {shape} without a colour of its own is {colour}.",
    ),
    remainders=(
        "everything that is left is {colour}.",
        "whatever has no colour yet is {colour}.",
        "all that is left without a colour is {colour}.",
    ),
    fillers=(
        "all of them are plain, with nothing else drawn on them.",
        "no shape stands in front of the rest.",
        "you can see that everything is very simple here.",
        "the picture has three rows, with three shapes in each of them at the most.",
        "nothing sits on the edge of the picture and nothing is drawn over it.",
        "the shapes are set apart, and all around each of them something is left plain.",
        "there is no one in the picture, and nothing lies around.",
        "this is a very simple picture that someone has drawn and painted.",
        "you can find nothing here that is only drawn and not painted.",
        "everything that is shown here is painted all over.",
        "someone has painted the shapes one after the other.",
        "on the whole there is nothing but shapes to see in it.",
    ),
    counted=("shape",),
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
    same=(
        (
            "{place} one notices a {size} {shape} whose colour matches that of {antecedent}.",
            "{place} one notices a {size} {shape}, {colour} all over.",
        ),
        (
            "as for the {shape} {place}, it is {size} and coloured just like {antecedent}.",
            "as for the {shape} {place}, it is {size} and its colour is {colour}.",
        ),
        (
            "a {size} {shape} has been put {place}. it wears the colour of {antecedent}.",
            "a {size} {shape} has been put {place}. it is entirely {colour}.",
        ),
    ),
    again=(
        (
            "{place} one notices {antecedent} once more, this time {change}.",
            "{place} one notices a {size} {shape}, {colour} all over.",
        ),
        (
            "the artist has put {antecedent} a further time {place}, though {change}.",
            "{place} the artist has left a {shape}, which is {colour} and {size}.",
        ),
    ),
    colourless=(
        ("{place} one notices a {size} {shape}.", "{place} one notices a {size} {shape}, {colour} all over."),
        (
            "as for the {shape} {place}, it is {size}.",
            "as for the {shape} {place}, it is {size} and its colour is {colour}.",
        ),
        ("resting {place} is a {shape} of {size} size.", "resting {place} is a {colour} {shape} of {size} size."),
        ("a {size} {shape} has been put {place}.", "a {size} {shape} has been put {place}. it is entirely {colour}."),
    ),
    defaults=(
        "as a rule a {shape} is {colour} here, and exceptions are named.",
        "take a {shape} to be {colour} if no other colour is mentioned for it.",
    ),
    remainders=(
        "figures that were given no colour are entirely {colour}.",
        "what remains uncoloured is to be {colour}.",
    ),
    fillers=(
        "no figure is placed over the others, as one can see.",
        "the artist has drawn all of this on one sheet of paper.",
        "around each figure some of the paper has been left empty.",
        "as one notices, all of the figures are entirely plain.",
        "the artist has painted them with care, and only once.",
        "here no figure has been drawn over an edge of the sheet.",
        "none of this is meant as a sign of anything.",
        "the artist has been very exact along every edge.",
        "such figures are just what the artist likes to put on paper.",
        "one sees at once that all of it has been painted by the same artist.",
        "one can see that the artist has left out nothing, and that nothing is in the way.",
    ),
    counted=("figure",),
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
    sentences = {
        field.name: getattr(TRAIN, field.name) + getattr(HELDOUT, field.name)
        for field in fields(Grammar)
        if field.name != "places"
    }
    return Grammar(**sentences, places={place: TRAIN.places[place] + HELDOUT.places[place] for place in PLACES})


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


def deal(templates: Sequence[T], number: int, rng: random.Random) -> list[T]:
    """`number` templates; none comes twice before all came once."""
    dealt: list[T] = []
    while len(dealt) < number:
        dealt += rng.sample(templates, min(len(templates), number - len(dealt)))
    return dealt


def fill(template: str, words: Mapping[str, str]) -> str:
    """Fill the gaps, see `with_articles`."""
    return with_articles(template.format_map(words))


def with_articles(text: str) -> str:
    """ "a" or "an" by what is heard next: "an orange hoop", but "a unicorn"."""
    text = re.sub(r"\b([Aa])n(?= )", r"\1", text)
    return re.sub(r"\b([Aa])(?= (?:hour|(?!uni|eu|one\b)[aeiou]))", r"\1n", text)


def capitalised(sentences: str) -> str:
    return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), sentences)


def vocabulary(world: World = WORLD, split: Split = "all") -> tuple[str, ...]:
    """Every lower-case word and punctuation mark that captions of this world can contain, sorted.

    They are cut where CLIP's tokenizer cuts before it applies byte pairs, so the byte pairs of these words
    are all that captions need.
    """
    grammar = grammar_of(split)
    sentences = [getattr(grammar, field.name) for field in fields(Grammar) if field.name != "places"]
    texts = [text if isinstance(text, tuple) else (text,) for text in itertools.chain(*sentences)]
    templates = [*itertools.chain(*texts), NOUN_PHRASE, "an, and is are"]
    phrases = [re.sub(r"{\w+}", " ", template) for template in templates]
    for named in word_pools(world, split).values():
        phrases += [phrase for pool in named.values() for phrase in pool]
    counted = {"train": "shape shapes", "heldout": "figure figures", "all": "shape shapes figure figures"}
    phrases += [*COUNTS, *ORDINALS, counted[split]]
    return tuple(sorted(set(re.findall(r"[^\W\d_]+|[^\w\s]+", " ".join(phrases).lower()))))
