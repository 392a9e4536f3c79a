"""Reading captions: the scene that a text describes, and which of its characters describe which object."""

import re
from functools import lru_cache

from fixclip_core.scenes.captions import Caption, Span
from fixclip_core.scenes.grammar import word_pools
from fixclip_core.scenes.world import PLACES, WORLD, Scene, SceneObject, World


def read_caption(text: str, world: World = WORLD) -> Scene:
    """The scene that a caption describes (without jitter): the inverse of `long_caption` and `short_caption`.

    It also reads free text made of this world's words, as long as every object comes with shape, colour, size
    and place ("a big red star in the top left corner and a tiny blue ring in the centre, on white") and a
    later sentence about the same object starts with "it" or "its".

    Raises:
        ValueError: an object lacks a property, a place is described twice, or no background is named.
    """
    background = {name for _, name in _find(_phrases(world, "background"), text)}
    if len(background) != 1:
        raise ValueError(f"caption {text[:60]!r}...: it must name one background, it names {sorted(background)}")
    objects = [_read_object(place, said, world) for (_, _, place), said in _descriptions(text, world)]
    return Scene(background.pop(), tuple(objects))


def annotate_caption(text: str, world: World = WORLD) -> Caption:
    """Spans for a text that did not come from `long_caption`: what `object_zones` needs for a user's prompt.

    A sentence about one object is its span; in a list, a span reaches from one place to the next.

    Raises:
        ValueError: an object has no place that this world knows.
    """
    return Caption(text, tuple(Span(*where) for where, _ in _descriptions(text, world)))


def _descriptions(text: str, world: World) -> list[tuple[tuple[int, int, str], str]]:
    """What a text says of each object: (start, end, place), and the words without the place."""
    found: list[tuple[tuple[int, int, str], str]] = []
    for match in re.finditer(r"\S.*?(?:\.(?=\s|$)|$)", text, flags=re.DOTALL):
        sentence, offset = match[0], match.start()
        places = _find(_phrases(world, "place"), sentence)
        if not places and found and re.match(r"its?\b", sentence, flags=re.IGNORECASE):
            (start, _, place), said = found[-1]
            found[-1] = ((start, match.end(), place), f"{said} {sentence}")
            continue
        if len(places) == 1:
            (start, end), place = places[0]
            found.append(((offset, match.end(), place), f"{sentence[:start]} {sentence[end:]}"))
            continue
        previous = 0
        for (start, end), place in places:  # a list: each noun phrase ends with its place
            found.append(((offset + previous, offset + end, place), sentence[previous:start]))
            previous = end
        if _find(_phrases(world, "shape"), sentence[previous:]):
            raise ValueError(f"{sentence[previous:].strip()!r} names an object, but no place that this world knows")
    return found


def _read_object(place: str, said: str, world: World) -> SceneObject:
    found = {kind: _find(_phrases(world, kind), said) for kind in ("shape", "colour", "size")}
    for kind, names in found.items():
        if len({name for _, name in names}) != 1:
            raise ValueError(f"{place}: {said.strip()!r} must name one {kind}, it names {[n for _, n in names]}")
    return SceneObject(place, found["shape"][0][1], found["colour"][0][1], found["size"][0][1])


@lru_cache(maxsize=32)
def _phrases(world: World, kind: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that finds the longest of a kind's words, and whose word each is; places also go by their names."""
    owners = {word: name for name, words in word_pools(world, "all")[kind].items() for word in words}
    if kind == "place":
        owners |= {place: place for place in PLACES}
    longest_first = sorted(map(re.escape, owners), key=len, reverse=True)
    # "centre" is a place, "the centre of the top row" another: no match is better than a wrong one.
    goes_on = r"(?! of the (?:top|upper|middle|central|bottom|lower|left|right)\b)"
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b{goes_on}", re.IGNORECASE), owners


def _find(phrases: tuple[re.Pattern[str], dict[str, str]], text: str) -> list[tuple[tuple[int, int], str]]:
    pattern, owners = phrases
    return [(match.span(), owners[match[0].lower()]) for match in pattern.finditer(text)]
