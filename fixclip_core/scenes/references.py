"""Captions in which a sentence gives an object's properties by pointing to another sentence, far away if need be.

Four kinds, here as training captions word them:

- same: "In the very centre there is a small ring of the same colour as the heart." The ring is as blue as it is.
- again: "The shape in the very centre is drawn again at the top left, only small." All is as with that shape but the
  size, or the colour where that is what the sentence names.
- default: "Every star is red unless its own sentence says otherwise." comes before the objects. A star whose
  sentence names no colour is red; a star whose sentence names one is an exception.
- remainder: "Everything that is left is blue." comes after the objects, and gives a colour to those that have none.

What makes each of them unambiguous:

- "The shape in the very centre" is the one that was described there; a place holds one object.
- Objects are counted in the order in which they are described: "the second shape" is the second to be described.
- "The heart" stands only for the one heart of the whole scene, whichever word it was described by.
- All three point back, to an object described earlier whose own sentence names what is meant.
- A colour in an object's own sentence, or that it shares, comes before a default, and a default before the remainder.
- A shape has one default at most, a caption one remainder, and something is left for it.

A caption has one kind of reference: up to `max_pointing` objects for "same" and "again", one to nine for the other two.

Beside its text it has `Caption.plain`, the same without references: the ring "is small and blue", every star says that
it is red, and the sentence with the rule is left out. Order, words and all other sentences are those of the text.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from fixclip_core.scenes.captions import (
    Caption,
    Pointer,
    Reference,
    ReferenceKind,
    join,
    reference_distances,
    scene_words,
)
from fixclip_core.scenes.grammar import (
    ORDINALS,
    Grammar,
    Split,
    Words,
    capitalised,
    deal,
    fill,
    grammar_of,
    with_articles,
    word_pools,
)
from fixclip_core.scenes.reader import annotate_caption, find_words
from fixclip_core.scenes.world import WORLD, Scene, SceneObject, World, check_known, sample_scene

Distance = Literal["under 40", "40 to 77", "77 to 150", "over 150"]

KINDS: tuple[ReferenceKind, ...] = get_args(ReferenceKind)
POINTERS: tuple[Pointer, ...] = get_args(Pointer)
DISTANCES: dict[Distance, range] = {
    "under 40": range(1, 40),
    "40 to 77": range(40, 77),
    "77 to 150": range(77, 150),
    "over 150": range(150, 248),
}
_MAX_TOKENS = 234  # leaves some of the 246 to tokenizers that cut a word into several pieces
_TRIES = 20  # draws of an order of sentences, each likely to do


def distance_bucket(tokens: int) -> Distance:
    """The name of the bucket of a distance; what is longer than any caption counts as "over 150"."""
    return next((name for name, bucket in DISTANCES.items() if tokens < bucket.stop), "over 150")


def count_words(text: str) -> int:
    """Words and punctuation marks: CLIP's tokens of a caption, but for the few words that it cuts in two."""
    return len(re.findall(r"[^\W\d_]+|[^\w\s]+", text))


def reference_caption(
    scene: Scene,
    seed: int | str,
    *,
    kinds: Sequence[ReferenceKind] = KINDS,
    distances: Sequence[Distance] = tuple(DISTANCES),
    pointers: Sequence[Pointer] = POINTERS,
    max_pointing: int = 3,
    tokens: Callable[[str], int] = count_words,
    max_tokens: int = _MAX_TOKENS,
    split: Split = "train",
    synonyms: Split | None = None,
    world: World = WORLD,
) -> Caption:
    """Describe everything that is in a scene, some of it by reference to another sentence.

    Which kind and which distance is drawn from those asked for that the scene allows. Between an object and what
    it refers to stand other objects and, where they do not suffice, sentences that are true of every scene. Where
    several objects refer, one of them is at that distance and the others at any.

    Args:
        scene: what to describe; see `reference_scene` for scenes that have something to refer to.
        seed: any integer or string; the same seed words the same scene alike.
        kinds: see the top of this file.
        distances: names of `DISTANCES`, in tokens as `reference_distances` counts them.
        pointers: how "same" and "again" say which object they mean: by its place ("the shape in the very centre"), its
            order ("the second shape"), or its name ("the heart") where no other object has its shape; "again" has
            no names. One is drawn for each reference among those that serve.
        max_pointing: how many objects of "same" and "again" may refer at most, where the scene has such pairs.
        tokens: counts a text's tokens without special ones.
        max_tokens: longest caption, without the two special tokens.
        split, synonyms, world: as in `long_caption`.

    Raises:
        ValueError: an unknown kind, distance or pointer, `max_pointing` below 1, a scene of another world, or one that
            has no such reference or too few objects for the distance.
    """
    named = (("kinds", kinds, KINDS), ("distances", distances, tuple(DISTANCES)), ("pointers", pointers, POINTERS))
    for name, given, valid in named:
        if not given or not set(given) <= set(valid):
            raise ValueError(f"{name}={tuple(given)}: choose from {', '.join(valid)}")
    if not isinstance(max_pointing, int) or max_pointing < 1:
        raise ValueError(f"max_pointing={max_pointing!r}: it must be a whole number, at least 1")
    check_known(scene, world)
    if not scene.objects:
        raise ValueError("a scene without objects has no caption")
    rng = random.Random(f"reference caption/{seed}")
    words = Words(word_pools(world, synonyms or split), rng)
    writer = _Writer(scene, grammar_of(split), words, tokens, max_tokens, tuple(pointers), max_pointing)
    wanted = list(itertools.product(kinds, distances))
    for kind, distance in rng.sample(wanted, len(wanted)):
        for _ in range(_TRIES):
            caption = writer.draw(kind, DISTANCES[distance])
            if caption is not None:
                return caption
    raise ValueError(
        f"a scene of {len(scene.objects)} object(s) has no reference of {', '.join(kinds)} by {', '.join(pointers)} at "
        f"a distance of {', '.join(distances)} within {max_tokens} tokens: take a reference_scene, more objects, "
        "distances or pointers ('again' has no name)"
    )


@dataclass(frozen=True)
class _Sentence:
    """A sentence, the object that it describes, and its wording without a reference: None for the same, "" for none."""

    text: str
    place: str | None = None
    plain: str | None = None


class _Given(NamedTuple):
    """Which properties of an object another sentence gives, that sentence, and how it is pointed to."""

    properties: tuple[str, ...]
    sentence: _Sentence
    pointer: Pointer | None = None


@dataclass(frozen=True)
class _Writer:
    """Words one scene; every draw takes new choices from the generator of `words`."""

    scene: Scene
    grammar: Grammar
    words: Words
    tokens: Callable[[str], int]
    max_tokens: int
    pointers: tuple[Pointer, ...]
    max_pointing: int

    def draw(self, kind: ReferenceKind, distance: range) -> Caption | None:
        """A caption with one kind of reference, or None where this draw finds none that fits."""
        if kind in ("same", "again"):
            return self._point_back(kind, distance)
        return self._set_by_rule(kind, distance)

    def _point_back(self, kind: ReferenceKind, distance: range) -> Caption | None:
        fits = _same_colour if kind == "same" else _differ_once
        pairs = [
            (source, item)
            for source, item in itertools.permutations(self.scene.objects, 2)
            if fits(source, item) and self._pointers_to(source, kind)
        ]
        if not pairs:
            return None
        antecedent, item = self.words.rng.choice(pairs)
        templates = self.grammar.same if kind == "same" else self.grammar.again
        wordings = {item.place: self.words.rng.choice(templates)}
        others = self._describe([other for other in self.scene.objects if other != item], self._objects)
        ends = others.pop(antecedent.place), _Sentence(wordings[item.place][0], item.place)
        order = self._arrange(ends, list(others.values()), distance, before=True, after=True)
        if order is None:
            return None
        places = [sentence.place for sentence in order if sentence.place]
        given: dict[str, _Given] = {}
        for source, pointing in self._pointing(pairs, (antecedent, item), places):
            template, plain = wordings.get(pointing.place) or self.words.rng.choice(templates)
            words = self.words.of(pointing)
            choices = self._pointers_to(source, kind)
            # Not rng.choice: the captions of near twins stay those that docs/results.md has figures of.
            pointer = choices[int(self.words.rng.random() * len(choices))] if len(choices) > 1 else choices[0]
            words["antecedent"] = self._antecedent(pointer, source, places.index(source.place))
            taken: tuple[str, ...] = ("colour",)
            if kind == "again":
                taken = ("shape", "colour") if _same_colour(source, pointing) else ("shape", "size")
                words["change"] = words["size" if "colour" in taken else "colour"]
            order[_number_of(pointing, order)] = _Sentence(fill(template, words), pointing.place, fill(plain, words))
            given[pointing.place] = _Given(taken, order[_number_of(source, order)], pointer)
        return self._finish(order, kind, given, distance)

    def _pointing(
        self,
        pairs: Sequence[tuple[SceneObject, SceneObject]],
        main: tuple[SceneObject, SceneObject],
        places: Sequence[str],
    ) -> list[tuple[SceneObject, SceneObject]]:
        """`main` and further pairs of an antecedent and what points to it, none of which is both."""
        found = [main]
        number = self.words.rng.randint(1, self.max_pointing) if self.max_pointing > 1 else 1
        while len(found) < number:
            sources, pointing = ([pair[end] for pair in found] for end in (0, 1))
            free = [
                (source, item)
                for source, item in pairs
                if source not in pointing
                and item not in (*sources, *pointing)
                and places.index(source.place) < places.index(item.place)
            ]
            if not free:
                break
            found.append(self.words.rng.choice(free))
        return found

    def _set_by_rule(self, kind: ReferenceKind, distance: range) -> Caption | None:
        main = self.words.rng.choice(self.scene.objects)
        alike = [item for item in self.scene.objects if _same_colour(item, main) and item != main]
        rules = self.grammar.remainders
        if kind == "default":
            alike, rules = [item for item in alike if item.shape == main.shape], self.grammar.defaults
        # Some of those alike name their colour all the same: else the rule's would be a colour that no object names.
        meant = [main, *self.words.rng.sample(alike, self.words.rng.randint(0, len(alike)))]
        rule = _Sentence(fill(self.words.rng.choice(rules), self.words.of(main)), plain="")
        coloured = [item for item in self.scene.objects if item not in meant]
        others = self._describe(coloured, self._objects) | self._describe(meant, self.grammar.colourless)
        about = others.pop(main.place)
        first = kind == "default"
        ends = (rule, about) if first else (about, rule)
        order = self._arrange(ends, list(others.values()), distance, before=not first, after=first)
        if order is None:
            return None
        return self._finish(order, kind, {item.place: _Given(("colour",), rule) for item in meant}, distance)

    @property
    def _objects(self) -> list[tuple[str, str]]:
        """Sentences without a reference are their own plain wording."""
        return [(template, template) for template in self.grammar.objects]

    def _describe(self, items: Sequence[SceneObject], templates: Sequence[tuple[str, str]]) -> dict[str, _Sentence]:
        """A sentence for each object, by its place; `templates` are pairs of a text and its plain wording."""
        described = {}
        for item, (text, plain) in zip(items, deal(templates, len(items), self.words.rng), strict=True):
            words = self.words.of(item)
            described[item.place] = _Sentence(fill(text, words), item.place, fill(plain, words))
        return described

    def _pointers_to(self, item: SceneObject, kind: ReferenceKind) -> list[Pointer]:
        """Those of `pointers` that can point to an object."""
        has_name = kind == "same" and [other.shape for other in self.scene.objects].count(item.shape) == 1
        return [pointer for pointer in self.pointers if pointer != "name" or has_name]

    def _antecedent(self, pointer: Pointer, item: SceneObject, number: int) -> str:
        """What points to object `number` (from 0) of the caption: "the heart", "the second shape", "the shape in the
        very centre"."""
        if pointer == "name":
            return f"the {self.words.choose('shape', item.shape)}"
        counted = self.words.rng.choice(self.grammar.counted)
        if pointer == "order":
            return f"the {ORDINALS[number]} {counted}"
        return f"the {counted} {self.words.choose('place', item.place)}"

    def _arrange(
        self,
        ends: tuple[_Sentence, _Sentence],
        others: list[_Sentence],
        distance: range,
        *,
        before: bool,
        after: bool,
    ) -> list[_Sentence] | None:
        """All sentences in an order that puts `distance` tokens between the two `ends`, others before or after them.

        How many objects stand outside is drawn first, so that not the distance alone says where the ends are: were all
        objects put between, whatever is referred to from far away would be the first. The rest comes between, then
        fillers; what is too long for the gap is passed over. None where no more than `distance.start` tokens are there
        to be put between. A draw may miss the range all the same.
        """
        rng = self.words.rng
        rng.shuffle(others)
        fillers = [_Sentence(capitalised(text)) for text in rng.sample(self.grammar.fillers, len(self.grammar.fillers))]
        lengths = {sentence: self.tokens(sentence.text) for sentence in (*others, *fillers)}
        about = scene_words(self.scene, self.words)
        frame = [fill(templates[0], about) for templates in (self.grammar.openings, self.grammar.closings)]
        objects = sum(lengths[sentence] for sentence in others)
        rest = self.max_tokens - objects - sum(self.tokens(text) for text in (*frame, ends[0].text, ends[1].text))
        apart, filled = rng.randint(0, len(others)), min(rest, sum(lengths[sentence] for sentence in fillers))
        while apart and filled + sum(lengths[sentence] for sentence in others[apart:]) <= distance.start:
            apart = rng.randrange(apart)
        reach = min(distance.stop, 2 + filled + sum(lengths[sentence] for sentence in others[apart:]))
        if reach <= distance.start:
            return None
        wanted, gap, between = rng.randrange(distance.start, reach), 1, []
        for sentence in (*others[apart:], *fillers):
            if gap < wanted and gap + lengths[sentence] < distance.stop:
                between.append(sentence)
                gap += lengths[sentence]
        outside = [sentence for sentence in others if sentence not in between]
        cut = rng.randint(0, len(outside)) if before and after else len(outside) * before
        rng.shuffle(between)
        return [*outside[:cut], ends[0], *between, ends[1], *outside[cut:]]

    def _finish(
        self, order: Sequence[_Sentence], kind: ReferenceKind, given: Mapping[str, _Given], distance: range
    ) -> Caption | None:
        """Opening, sentences and, where there is room, closing.

        None where that is too long, or the first of `given` too near or far.

        `given` has what other sentences give, by the place of each object that refers.
        """
        about = scene_words(self.scene, self.words)
        opening = _Sentence(fill(self.words.rng.choice(self.grammar.openings), about))
        closing = _Sentence(fill(self.words.rng.choice(self.grammar.closings), about))
        sentences = [opening, *order]
        length = sum(self.tokens(sentence.text) for sentence in (*sentences, closing))
        if len(self.scene.objects) > 4 and kind != "remainder" and length <= self.max_tokens:
            sentences.append(closing)
        caption = join([(sentence.place, capitalised(sentence.text)) for sentence in sentences], " ")
        found = {
            place: Reference(kind, place, properties, caption.spans[sentences.index(sentence)], pointer)
            for place, (properties, sentence, pointer) in given.items()
        }
        plain = [sentence.text if sentence.plain is None else sentence.plain for sentence in sentences]
        caption = replace(caption, plain=" ".join(capitalised(text) for text in plain if text))
        main = replace(caption, references=(found[next(iter(found))],))
        if self.tokens(caption.text) > self.max_tokens or reference_distances(main, self.tokens)[0] not in distance:
            return None
        ordered = tuple(found[span.place] for span in caption.spans if span.place in found)
        return replace(caption, references=ordered)


def _number_of(item: SceneObject, sentences: Sequence[_Sentence]) -> int:
    return next(number for number, sentence in enumerate(sentences) if sentence.place == item.place)


def _same_colour(one: SceneObject, other: SceneObject) -> bool:
    return one.colour == other.colour


def _differ_once(one: SceneObject, other: SceneObject) -> bool:
    """Whether two objects share their shape and either colour or size, not both."""
    return one.shape == other.shape and (one.colour == other.colour) != (one.size == other.size)


def reference_scene(
    seed: int | str, kind: ReferenceKind, *, num_objects: int | tuple[int, int] = (4, 9), world: World = WORLD
) -> Scene:
    """Draw a scene of at least two objects that has something to refer to in `kind`; the same seed, the same scene.

    Objects of a scene of `sample_scene` are made like another one in what such a reference shares: one to three pairs
    of objects for "same" and "again", else one to three objects like the same one.

    Raises:
        ValueError: an unknown kind, less than two or more than nine objects, or "again" in a world of one size and one
            colour.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: it must be one of {', '.join(KINDS)}")
    if (num_objects if isinstance(num_objects, int) else num_objects[0]) < 2:
        raise ValueError(f"num_objects={num_objects}: a reference takes at least 2 objects")
    scene = sample_scene(f"references/{seed}", num_objects=num_objects, world=world)
    rng = random.Random(f"reference scene/{seed}")
    drawn = rng.sample(scene.objects, len(scene.objects))
    points = kind in ("same", "again")
    pairs = zip(drawn[0::2], drawn[1::2], strict=False) if points else zip(itertools.repeat(drawn[0]), drawn[1:])
    chosen = itertools.islice(pairs, rng.randint(1, 3))
    changed = {item.place: _made_like(item, model, kind, rng, world) for model, item in chosen}
    return replace(scene, objects=tuple(changed.get(item.place, item) for item in scene.objects))


def _made_like(
    item: SceneObject, model: SceneObject, kind: ReferenceKind, rng: random.Random, world: World
) -> SceneObject:
    if kind in ("same", "remainder"):
        return replace(item, colour=model.colour)
    if kind == "default":
        return replace(item, shape=model.shape, colour=model.colour)
    others = {
        field: [entry.name for entry in entries if entry.name != getattr(model, field)]
        for field, entries in (("size", world.sizes), ("colour", world.colours))
    }
    fields = [field for field, names in others.items() if names]
    if not fields:
        raise ValueError("kind='again': this world has one size and one colour only")
    field = rng.choice(fields)
    return replace(model, place=item.place, jitter=item.jitter, **{field: rng.choice(others[field])})


def reference_at(
    seed: int, index: int, *, split: Split = "train", synonyms: Split | None = None, world: World = WORLD
) -> tuple[Scene, Caption]:
    """Number `index` of an endless data set of scenes of 4 to 9 objects with captions that refer.

    Kinds and distances take turns: each combination comes once in 16 samples.
    """
    kind, distance = KINDS[index % 4], tuple(DISTANCES)[index // 4 % 4]
    scene = reference_scene(f"{seed}/{index}", kind, world=world)
    caption = reference_caption(
        scene,
        f"{seed}/{index}",
        kinds=(kind,),
        distances=(distance,),
        split=split,
        synonyms=synonyms,
        world=world,
    )
    return scene, caption


def plain_wordings(
    scene: Scene, caption: Caption, reference: Reference, world: World = WORLD
) -> dict[tuple[str, ...], str]:
    """What a caption would say plainly if a reference meant any of the objects that name their own properties.

    Args:
        scene: what `caption` describes.
        caption: of `reference_caption`.
        reference: one of the caption's.
        world: the world of the scene.

    Returns:
        {values of `reference.properties`, such as ("star", "blue"): `caption.plain` with these values for the object
        that refers}, in the order of the caption. The scene's own values have `caption.plain` itself.
    """
    assert caption.plain is not None
    objects = {item.place: item for item in scene.objects}
    named = _naming_their_own(objects, caption)
    own = next(span for span in annotate_caption(caption.plain, world).spans if span.place == reference.place)
    before, after = caption.plain[: own.start], caption.plain[own.end :]
    meant = objects[reference.place]
    found = {}
    for item in named:
        sentence = caption.plain[own.start : own.end]
        for kind in reference.properties:
            ((start, end), value), *_ = find_words(sentence, kind, world)
            if getattr(item, kind) != value:
                word = word_pools(world, "train")[kind][getattr(item, kind)][0]
                sentence = with_articles(sentence[:start] + word + sentence[end:])
        found[tuple(getattr(item, kind) for kind in reference.properties)] = before + sentence + after
    own_values = tuple(getattr(meant, kind) for kind in reference.properties)
    return found | ({own_values: caption.plain} if own_values in found else {})


def _naming_their_own(objects: Mapping[str, SceneObject], caption: Caption) -> list[SceneObject]:
    """The objects, given by their places, that do not refer, in the order of the caption."""
    refer = {reference.place for reference in caption.references}
    places = (span.place for span in caption.spans if span.place is not None and span.place not in refer)
    return [objects[place] for place in places if place in objects]


class Guess(NamedTuple):
    """Shares in which a reader who follows no reference is right, see `blind_guess`."""

    uniform: float
    named: float
    first: float


def blind_guess(scene: Scene, caption: Caption, reference: Reference, world: World = WORLD) -> Guess:
    """How often a reader that cannot follow a reference has its properties right by luck.

    Args:
        scene: what `caption` describes.
        caption: a caption of `reference_caption`, or of `annotate_caption`.
        reference: one of the caption's.
        world: the world of the scene.

    Returns:
        Three shares. uniform: a draw from all values that the world has (1/8 for a colour, 1/48 for shape and colour,
        1/12 for shape and size). named: the values of an object of this caption that names its own, drawn at random,
        which is the better guess of one who has read all but the reference. first: those of the first such object, 0
        or 1: a habit that pays, as what is referred to from far away stands early. Where no object names its own, all
        three are `uniform`.
    """
    values = {"shape": len(world.shapes), "colour": len(world.colours), "size": len(world.sizes)}
    uniform = 1 / math.prod(values[kind] for kind in reference.properties)
    objects = {item.place: item for item in scene.objects}
    named = _naming_their_own(objects, caption)
    if not named:
        return Guess(uniform, uniform, uniform)
    meant = objects[reference.place]
    alike = [all(getattr(item, kind) == getattr(meant, kind) for kind in reference.properties) for item in named]
    return Guess(uniform, sum(alike) / len(alike), float(alike[0]))
