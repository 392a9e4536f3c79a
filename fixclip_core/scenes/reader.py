"""Reading captions: the scene that a text describes, and which of its characters describe which object."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from fixclip_core.scenes.captions import Caption, Pointer, Reference, ReferenceKind, Span
from fixclip_core.scenes.grammar import ORDINALS, grammar_of, word_pools
from fixclip_core.scenes.world import PLACES, WORLD, Scene, SceneObject, World


def read_caption(text: str, world: World = WORLD) -> Scene:
    """The scene that a caption describes (without jitter): the inverse of `long_caption`, `short_caption` and,
    references resolved, of `reference_caption`.

    It also reads free text made of this world's words, as long as every object comes with shape, colour, size
    and place ("a big red star in the top left corner and a tiny blue ring in the centre, on white") and a
    later sentence about the same object starts with "it" or "its". What points to another object must do so in the
    words of a template (grammar.py), with any of this world's words in its gaps.

    Raises:
        ValueError: an object lacks a property, a place is described twice, no background is named, a reference points
            to no object, to more than one or in words that are not understood, or an object has several.
    """
    text = re.sub(r"\s", " ", text)
    background = {name for _, name in find_words(text, "background", world)}
    if len(background) != 1:
        raise ValueError(f"caption {text[:60]!r}...: it must name one background, it names {sorted(background)}")
    objects, _ = _resolve(*_descriptions(text, world), world)
    return Scene(background.pop(), tuple(objects))


def annotate_caption(text: str, world: World = WORLD) -> Caption:
    """Spans and references of a text that did not come from here: what `object_zones` needs for a user's prompt.

    A sentence about one object is its span; in a list, a span reaches from one place to the next.

    Raises:
        ValueError: an object has no place that this world knows, or the text has references and `read_caption`
            could not read it.
    """
    described, rules = _descriptions(re.sub(r"\s", " ", text), world)
    spans = tuple(span for span, _ in described)
    refers = bool(rules) or any(_pointer(said, world) for _, said in described)
    return Caption(text, spans, tuple(_resolve(described, rules, world)[1]) if refers else ())


# "centre" is a place, "the centre of the top row" another: no match is better than a wrong one.
_NO_LONGER_PLACE = r"(?! (?:of the (?:top|upper|middle|central|bottom|lower|left|right)|left|right)\b)"


@dataclass(frozen=True)
class _Rule:
    """A sentence that sets a colour: that of a shape, or of all that is left if `shape` is None."""

    span: Span
    shape: str | None
    colour: str


@dataclass(frozen=True)
class _Pointer:
    """A phrase that points to an earlier object, by its number (from 0), its place, or as the only one of a shape."""

    kind: Literal["same", "again"]
    number: int | None
    place: str | None
    shape: str | None
    phrase: str

    @property
    def how(self) -> Pointer:
        return "order" if self.number is not None else "place" if self.place is not None else "name"


def _descriptions(text: str, world: World) -> tuple[list[tuple[Span, str]], list[_Rule]]:
    """What a text says of each object: its span, and the words without the place; and the rules for colours."""
    found: list[tuple[Span, str]] = []
    rules: list[_Rule] = []
    for match in re.finditer(r"\S.*?(?:\.(?=\s|$)|$)", text, flags=re.DOTALL):
        sentence, offset = match[0], match.start()
        rule = _rule(sentence, Span(offset, match.end(), None), world)
        if rule is not None:
            rules.append(rule)
            continue
        pointing = antecedent_words(sentence, world)
        start, end = pointing or (0, 0)
        places = [(span, place) for span, place in find_words(sentence, "place", world) if not start <= span[0] < end]
        if not places and found and re.match(r"its?\b", sentence, flags=re.IGNORECASE):
            span, said = found[-1]
            found[-1] = replace(span, end=match.end()), f"{said} {sentence}"
            continue
        if len(places) == 1:
            (start, end), place = places[0]
            found.append((Span(offset, match.end(), place), f"{sentence[:start]} {sentence[end:]}"))
            continue
        if pointing:
            raise ValueError(
                f"{sentence!r} points to another object, but describes {len(places)} at places that this world knows: "
                "it must be one"
            )
        previous = 0
        for (start, end), place in places:  # a list: each noun phrase ends with its place
            found.append((Span(offset + previous, offset + end, place), sentence[previous:start]))
            previous = end
        if find_words(sentence[previous:], "shape", world):
            raise ValueError(f"{sentence[previous:].strip()!r} names an object, but no place that this world knows")
    return found, rules


def _resolve(
    described: Sequence[tuple[Span, str]], rules: Sequence[_Rule], world: World
) -> tuple[list[SceneObject], list[Reference]]:
    """The objects with all their properties, in the order of the text, and where some of these come from."""
    colour_rules: dict[str | None, _Rule] = {}
    for rule in rules:
        if rule.shape in colour_rules:
            what = "all that is left" if rule.shape is None else f"every {rule.shape}"
            raise ValueError(f"two sentences set the colour of {what}")
        colour_rules[rule.shape] = rule
    objects: list[SceneObject] = []
    references: list[Reference] = []
    pointers: list[_Pointer] = []
    for span, said in described:
        pointer = _pointer(said, world)
        if pointer is None:
            _refuse_loose_pointer(said, str(span.place), "no pointer that is understood")
            item, given_by = _read_object(str(span.place), said, colour_rules, world)
            if given_by is not None:
                kind: ReferenceKind = "remainder" if given_by.shape is None else "default"
                references.append(Reference(kind, item.place, ("colour",), given_by.span))
        else:
            number = _pointed_at(pointer, objects)
            item, properties = _read_pointing(str(span.place), said, pointer, objects[number], world)
            references.append(Reference(pointer.kind, item.place, properties, described[number][0], pointer.how))
            pointers.append(pointer)
        objects.append(item)
    for pointer in pointers:
        alike = sum(pointer.shape == item.shape for item in objects)
        if alike > 1:
            raise ValueError(f"{pointer.phrase!r}: the text describes {alike} of that shape")
    if None in colour_rules and not any(reference.kind == "remainder" for reference in references):
        raise ValueError(f"all that is left is {colour_rules[None].colour}, but every object has a colour already")
    return objects, references


def _pointed_at(pointer: _Pointer, before: Sequence[SceneObject]) -> int:
    """The number of the object that a pointer means."""
    if pointer.number is not None:
        if pointer.number >= len(before):
            raise ValueError(f"{pointer.phrase!r}: the text describes {len(before)} object(s) before it")
        return pointer.number
    if pointer.place is not None:
        there = [number for number, item in enumerate(before) if item.place == pointer.place]
        if not there:
            raise ValueError(f"{pointer.phrase!r}: the text describes nothing there before it")
        return there[0]
    fits = [number for number, item in enumerate(before) if item.shape == pointer.shape]
    if len(fits) != 1:
        raise ValueError(f"{pointer.phrase!r}: the text describes {len(fits)} of that shape before it")
    return fits[0]


def _read_object(
    place: str, said: str, rules: Mapping[str | None, _Rule], world: World
) -> tuple[SceneObject, _Rule | None]:
    """An object that points to no other, and the rule that gives its colour, if any."""
    named = _properties(said, world)
    rule = None
    if not named["colour"] and len(named["shape"]) == 1:
        rule = rules.get(next(iter(named["shape"])), rules.get(None))
        named["colour"] = {rule.colour} if rule else set()
    shape, colour, size = (_only(named, kind, place, said) for kind in ("shape", "colour", "size"))
    return SceneObject(place, shape, colour, size), rule


def _read_pointing(
    place: str, said: str, pointer: _Pointer, antecedent: SceneObject, world: World
) -> tuple[SceneObject, tuple[str, ...]]:
    """An object that points to another, and which properties it takes from that one."""
    said = said.replace(pointer.phrase, " ", 1)
    _refuse_loose_pointer(said, place, f"more than {pointer.phrase!r}")
    named = _properties(said, world)
    own = ["shape", "size"] if pointer.kind == "same" else [kind for kind in ("colour", "size") if named[kind]]
    taken = tuple(kind for kind in ("shape", "colour", "size") if kind not in own)
    if (pointer.kind == "again" and len(own) != 1) or any(named[kind] for kind in taken):
        own_words = "its shape and size" if pointer.kind == "same" else "either its colour or its size"
        raise ValueError(f"{place}: beside {pointer.phrase!r} a sentence names {own_words}, not {said.strip()!r}")
    values = {kind: _only(named, kind, place, said) for kind in own}
    values |= {kind: getattr(antecedent, kind) for kind in taken}
    return SceneObject(place, values["shape"], values["colour"], values["size"]), taken


def _refuse_loose_pointer(said: str, place: str, what: str) -> None:
    """Words that point to another object where none do that a template has."""
    counted = rf"\bthe (?:{'|'.join(ORDINALS)}|last) (?:shape|figure|one|object)\b"
    match = re.search(rf"\bsame colou?r\b|{counted}", said, re.IGNORECASE)
    if match:
        raise ValueError(
            f"{place}: {match[0]!r} in {said.strip()!r} may point to another object, but there is {what}; say it once, "
            'as in "it is small and has the same colour as the second shape"'
        )


def _properties(said: str, world: World) -> dict[str, set[str]]:
    return {kind: {name for _, name in find_words(said, kind, world)} for kind in ("shape", "colour", "size")}


def _only(named: Mapping[str, set[str]], kind: str, place: str, said: str) -> str:
    if len(named[kind]) != 1:
        raise ValueError(f"{place}: {said.strip()!r} must name one {kind}, it names {sorted(named[kind])}")
    return next(iter(named[kind]))


def _pointer(said: str, world: World) -> _Pointer | None:
    for kind, pattern in _pointer_patterns(world):
        match = pattern.search(said)
        if match:
            number = ORDINALS.index(match["ordinal"].lower()) if match["ordinal"] else None
            owners = {of: _phrases(world, of)[1] for of in ("place", "shape")}
            place, shape = (names[match[of].lower()] if match[of] else None for of, names in owners.items())
            return _Pointer(kind, number, place, shape, match[0].strip())
    return None


def antecedent_words(sentence: str, world: World = WORLD) -> tuple[int, int] | None:
    """Which characters of a sentence point to another object ("the second shape", "the shape in the very centre"),
    None if none do."""
    matches = (pattern.search(sentence) for _, pattern in _pointer_patterns(world))
    return next((match.span("antecedent") for match in matches if match), None)


def _rule(sentence: str, span: Span, world: World) -> _Rule | None:
    for pattern in _rule_patterns(world):
        match = pattern.fullmatch(sentence)
        if match:
            shape = _phrases(world, "shape")[1][match["shape"].lower()] if "shape" in match.groupdict() else None
            return _Rule(span, shape, _phrases(world, "colour")[1][match["colour"].lower()])
    return None


@lru_cache(maxsize=8)
def _pointer_patterns(world: World) -> tuple[tuple[Literal["same", "again"], re.Pattern[str]], ...]:
    """{antecedent} of each template with the words around it, up to the next gap or punctuation mark."""
    grammar = grammar_of("all")
    noun = rf"(?:{'|'.join(grammar.counted)})"
    counted = rf"the (?P<ordinal>{'|'.join(ORDINALS)}) {noun}\b"
    placed = rf"the {noun} (?:(?:in|at|on) (?:the )?)?(?P<place>{_any_of(world, 'place')})\b{_NO_LONGER_PLACE}"
    antecedent = rf"(?P<antecedent>{counted}|{placed}|the (?P<shape>{_any_of(world, 'shape')})\b)"
    kinds: dict[Literal["same", "again"], tuple[tuple[str, str], ...]] = {"same": grammar.same, "again": grammar.again}
    patterns = []
    for kind, templates in kinds.items():
        for template, _ in templates:
            around = re.search(r"([^{}.,]*){antecedent}([^{}.,]*)", template)
            assert around is not None
            before, after = re.escape(around[1].lstrip()), re.escape(around[2].rstrip())
            patterns.append((kind, re.compile(rf"(?<!\w){before}{antecedent}{after}", re.IGNORECASE)))
    return tuple(patterns)


@lru_cache(maxsize=8)
def _rule_patterns(world: World) -> tuple[re.Pattern[str], ...]:
    """The templates that set a colour, with their gaps open for any word of the world."""
    grammar = grammar_of("all")
    patterns = []
    for template in (*grammar.defaults, *grammar.remainders):
        text = re.sub(r"\ba\b", "an?", re.escape(template).removesuffix(r"\."))
        for kind in ("shape", "colour"):
            text = text.replace(rf"\{{{kind}\}}", rf"(?P<{kind}>{_any_of(world, kind)})")
        patterns.append(re.compile(rf"{text}\.?", re.IGNORECASE))
    return tuple(patterns)


def _any_of(world: World, kind: str) -> str:
    """A pattern for a kind's words, the longest first."""
    return "|".join(sorted(map(re.escape, _phrases(world, kind)[1]), key=len, reverse=True))


@lru_cache(maxsize=32)
def _phrases(world: World, kind: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that finds the longest of a kind's words, and whose word each is; places also go by their names."""
    owners = {word.lower(): name for name, words in word_pools(world, "all")[kind].items() for word in words}
    if kind == "place":
        owners |= {place: place for place in PLACES}
    longest_first = sorted(map(re.escape, owners), key=len, reverse=True)
    end = _NO_LONGER_PLACE if kind == "place" else ""
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b{end}", re.IGNORECASE), owners


def find_words(text: str, kind: str, world: World = WORLD) -> list[tuple[tuple[int, int], str]]:
    """Where a text has words of a kind ("shape", "colour", "size", "background", "place"), and what each stands for."""
    pattern, owners = _phrases(world, kind)
    return [(match.span(), owners[match[0].lower()]) for match in pattern.finditer(text)]
