"""A procedural world of scenes: pictures, dense captions that describe them, and an exact checker.

A scene is a plain background and one to nine objects on a 3x3 grid; an object is a shape, a colour and a
size at a place. The same `World` draws the picture, words the caption and judges a picture, so whatever a
model makes of a long caption can be counted object by object. docs/scenes.md shows how to add a shape.

Everything is a function of its seed: sampling uses `random.Random`, never a global generator.

Shape letters: B images, P places (9, in reading order), Q sub-pixel phases, M masks (shape, size, jitter),
C colours (or RGB channels in BCHW), K backgrounds, W side of the window that holds one place, N its pixels.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Split = Literal["train", "heldout", "all"]
Zone = Literal["before", "across", "after", "past"]
Tokens = Callable[[str], int] | Sequence[tuple[int, int]]

PLACES = (
    "top left",
    "top centre",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
GRID = 3
_CHECK_BATCH = 128  # images whose candidates the checker holds in memory at once: about 100 MB
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# The world ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A silhouette. `inside(x, y)` says, for coordinates of any shape, which points belong to it.

    x grows to the right and y downwards; the silhouette should fill the square from -1 to 1.
    `words` are singular nouns for training captions, `heldout` nouns that only held-out captions use.
    """

    name: str
    inside: Callable[[Tensor, Tensor], Tensor]
    words: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Colour:
    """A colour of objects or of a background, RGB from 0 to 255. Words must do as adjective and as noun."""

    name: str
    rgb: tuple[int, int, int]
    words: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """How large an object is: its side as a fraction of its place's side."""

    name: str
    side: float
    words: tuple[str, ...]
    heldout: tuple[str, ...]


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five-pointed star, tip up: fold the angle into half an arm and compare with that arm's straight edge."""
    half, inner = math.pi / 5, 0.5
    y = y - 0.08  # the star's bounding box reaches less far down than up
    angle = torch.atan2(x, -y) % (2 * half)
    angle = torch.minimum(angle, 2 * half - angle)
    radius = torch.hypot(x, y)
    along, across = radius * angle.cos(), radius * angle.sin()
    notch_along, notch_across = inner * math.cos(half), inner * math.sin(half)
    return (along - 1) * notch_across <= across * (notch_along - 1)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs on a wedge whose sides touch them, so that the notch and the tip stay clear when small."""
    x = x.abs()
    disc = torch.hypot(x - 0.47, y + 0.4) <= 0.48
    wedge = (y >= -0.3) & (x <= 0.84) & (x <= 0.804 * (0.95 - y))
    return disc | wedge


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return (torch.minimum(x.abs(), y.abs()) <= 0.3) & (torch.maximum(x.abs(), y.abs()) <= 0.95)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    radius = torch.hypot(x, y)
    return (radius >= 0.45) & (radius <= 0.95)


SHAPES = (
    Shape("square", lambda x, y: torch.maximum(x.abs(), y.abs()) <= 0.84, ("square", "box"), ("block",)),
    Shape("triangle", lambda x, y: (y <= 0.85) & (y >= 1.75 * x.abs() - 0.9), ("triangle", "pyramid"), ("wedge",)),
    Shape("star", _star, ("star", "five-pointed star"), ("pentagram",)),
    Shape("heart", _heart, ("heart", "love heart"), ("valentine",)),
    Shape("cross", _cross, ("cross", "plus sign"), ("plus",)),
    Shape("ring", _ring, ("ring", "hoop"), ("doughnut",)),
)
COLOURS = (
    Colour("red", (214, 32, 38), ("red", "crimson", "scarlet"), ("ruby",)),
    Colour("orange", (255, 128, 0), ("orange", "tangerine"), ("apricot",)),
    Colour("yellow", (255, 220, 10), ("yellow", "lemon"), ("canary",)),
    Colour("green", (30, 160, 60), ("green", "emerald"), ("jade",)),
    Colour("turquoise", (0, 205, 205), ("turquoise", "cyan"), ("teal",)),
    Colour("blue", (30, 90, 240), ("blue", "azure"), ("sapphire",)),
    Colour("purple", (150, 50, 210), ("purple", "violet"), ("plum",)),
    Colour("pink", (255, 130, 195), ("pink", "rose"), ("fuchsia",)),
)
SIZES = (
    Size("large", 0.84, ("large", "big", "huge"), ("enormous",)),
    Size("small", 0.58, ("small", "tiny"), ("miniature",)),
)
BACKGROUNDS = (
    Colour("white", (250, 250, 248), ("white",), ("snowy",)),
    Colour("beige", (228, 208, 172), ("beige", "sandy"), ("tan",)),
    Colour("grey", (160, 164, 168), ("grey", "gray"), ("silver",)),
    Colour("black", (16, 16, 20), ("black",), ("ebony",)),
)


@dataclass(frozen=True)
class World:
    """What scenes are made of, and how large their pictures are.

    Objects are moved off their place's centre by up to `jitter` steps of `jitter_step` (a fraction of the
    place's side) along each axis. At the native 72 pixels a place is 24 pixels wide, exactly 3x3 cells of an
    autoencoder that reduces by 8; 96 pixels (4x4 cells) is crisper and costs a model 1.8 times as much.

    Raises:
        ValueError: two entries share a name, two things share a word, an entry has no word, or the largest
            object would leave its place.
    """

    shapes: tuple[Shape, ...] = SHAPES
    colours: tuple[Colour, ...] = COLOURS
    sizes: tuple[Size, ...] = SIZES
    backgrounds: tuple[Colour, ...] = BACKGROUNDS
    image_size: int = 72
    jitter: int = 2
    jitter_step: float = 1 / 32

    def __post_init__(self) -> None:
        owners: dict[str, str] = {}
        for kind in ("shapes", "colours", "sizes", "backgrounds"):
            entries = getattr(self, kind)
            if len({entry.name for entry in entries}) < max(len(entries), 1):
                raise ValueError(f"{kind} {[entry.name for entry in entries]}: at least one, no name twice")
            for entry in entries:
                if not entry.words or not entry.heldout:
                    raise ValueError(f"{kind} {entry.name!r}: it needs a word and a held-out word")
                for word in entry.words + entry.heldout:
                    if word in owners:
                        raise ValueError(f"word {word!r}: both {owners[word]} and {entry.name!r} use it")
                    owners[word] = repr(entry.name)
        reach = max(size.side for size in self.sizes) + 2 * self.jitter * self.jitter_step
        if self.jitter < 0 or reach > 1:
            raise ValueError(f"jitter={self.jitter}: the largest object would span {reach:.2f} of its place")
        if self.image_size < 24:
            raise ValueError(f"image_size={self.image_size}: it must be at least 24 pixels")


WORLD = World()


@dataclass(frozen=True)
class SceneObject:
    """One object by its names (place: see `PLACES`), and its jitter, (right, down) in steps of the world."""

    place: str
    shape: str
    colour: str
    size: str
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """A background and its objects, at most one a place, kept in reading order.

    Raises:
        ValueError: a place is unknown or taken twice.
    """

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        places = [item.place for item in self.objects]
        for place in places:
            if place not in PLACES:
                raise ValueError(f"place {place!r}: it must be one of {', '.join(PLACES)}")
            if places.count(place) > 1:
                raise ValueError(f"place {place!r}: two objects cannot share it")
        ordered = sorted(self.objects, key=lambda item: PLACES.index(item.place))
        object.__setattr__(self, "objects", tuple(ordered))

    def described(self) -> "Scene":
        """What a caption tells of this scene: everything but the jitter."""
        return replace(self, objects=tuple(replace(item, jitter=(0, 0)) for item in self.objects))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Scene":
        items = [SceneObject(**{**item, "jitter": tuple(item["jitter"])}) for item in data["objects"]]
        return Scene(data["background"], tuple(items))


def sample_scene(
    seed: int | str, *, num_objects: int | tuple[int, int] = (1, len(PLACES)), world: World = WORLD
) -> Scene:
    """Draw a scene; the same seed gives the same scene.

    Args:
        seed: any integer or string.
        num_objects: how many objects, or the least and the most (each number in between equally likely).
        world: what to draw from.

    Raises:
        ValueError: `num_objects` is not within 1..9.
    """
    least, most = (num_objects, num_objects) if isinstance(num_objects, int) else num_objects
    if not 1 <= least <= most <= len(PLACES):
        raise ValueError(f"num_objects={num_objects}: it must lie within 1 and {len(PLACES)}")
    rng = random.Random(f"scene/{seed}")
    places = rng.sample(PLACES, rng.randint(least, most))
    objects = tuple(_sample_object(place, rng, world) for place in places)
    return Scene(rng.choice(world.backgrounds).name, objects)


def _sample_object(place: str, rng: random.Random, world: World) -> SceneObject:
    shape, colour, size = rng.choice(world.shapes), rng.choice(world.colours), rng.choice(world.sizes)
    jitter = (rng.randint(-world.jitter, world.jitter), rng.randint(-world.jitter, world.jitter))
    return SceneObject(place, shape.name, colour.name, size.name, jitter)


def scene_at(
    seed: int, index: int, *, num_objects: int | tuple[int, int] = (1, len(PLACES)), world: World = WORLD
) -> Scene:
    """Scene number `index` of the endless data set `seed`; arguments as in `sample_scene`."""
    return sample_scene(f"{seed}/{index}", num_objects=num_objects, world=world)


# Pictures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpriteBank:
    """Every mask that a world can paint, once for each sub-pixel phase of its places.

    masks_QMWW holds coverage from 0 to 1; the last of the M masks is empty. Place p starts at pixel
    starts[p // 3] down and starts[p % 3] right, and uses the masks of phase[p].
    """

    masks_QMWW: Tensor  # noqa: N815
    starts: tuple[int, int, int]
    phase: tuple[int, ...]
    colours_C3: Tensor  # noqa: N815
    backgrounds_K3: Tensor  # noqa: N815
    background_index: dict[str, int]
    colour_index: dict[str, int]
    kind_index: dict[tuple[str, str], int]

    def windows(self, image_BCHW: Tensor) -> list[Tensor]:
        """Views of the nine places, in reading order, each (B, C, W, W)."""
        width = self.masks_QMWW.shape[-1]
        corners = [(top, left) for top in self.starts for left in self.starts]
        return [image_BCHW[:, :, top : top + width, left : left + width] for top, left in corners]


@lru_cache(maxsize=8)
def sprite_bank(world: World) -> SpriteBank:
    """Draw every (shape, size, jitter) of a world by supersampling."""
    side = world.image_size / GRID
    width = math.ceil(side)
    starts = [math.floor(i * side) for i in range(GRID)]
    # A place's centre in its own window: where 3 does not divide the image, it differs from place to place.
    centres = [(i + 0.5) * side - starts[i] for i in range(GRID)]
    phases = [(y, x) for y in sorted(set(centres)) for x in sorted(set(centres))]
    steps = range(-world.jitter, world.jitter + 1)
    jitters = [(right, down) for down in steps for right in steps]
    entries = [(shape, size) for shape in world.shapes for size in world.sizes]
    masks = [
        [_mask(world, shape, size, jitter, phase, width) for shape, size in entries for jitter in jitters]
        for phase in phases
    ]
    return SpriteBank(
        masks_QMWW=torch.stack([torch.stack([*row, torch.zeros(width, width)]) for row in masks]),
        starts=(starts[0], starts[1], starts[2]),
        phase=tuple(phases.index((y, x)) for y in centres for x in centres),
        colours_C3=torch.tensor([colour.rgb for colour in world.colours], dtype=torch.float32),
        backgrounds_K3=torch.tensor([colour.rgb for colour in world.backgrounds], dtype=torch.float32),
        background_index={colour.name: i for i, colour in enumerate(world.backgrounds)},
        colour_index={colour.name: i for i, colour in enumerate(world.colours)},
        kind_index={(shape.name, size.name): i for i, (shape, size) in enumerate(entries)},
    )


def _mask(
    world: World, shape: Shape, size: Size, jitter: tuple[int, int], centre: tuple[float, float], width: int
) -> Tensor:
    """What an object covers of a square of `width` pixels, in which its place's centre lies at (down, right)."""
    side = world.image_size / GRID
    radius, step = size.side * side / 2, world.jitter_step * side
    samples = max(2, min(8, 768 // world.image_size))  # a pixel and axis; fewer where pixels are too small to see
    grid = (torch.arange(width * samples, dtype=torch.float64) + 0.5) / samples
    x, y = grid - centre[1] - jitter[0] * step, grid - centre[0] - jitter[1] * step
    y, x = torch.meshgrid(y / radius, x / radius, indexing="ij")
    return F.avg_pool2d(shape.inside(x, y).float()[None], samples)[0]


def render_batch(scenes: Sequence[Scene], world: World = WORLD) -> Tensor:
    """Draw scenes: uint8 RGB (B, 3, world.image_size, world.image_size).

    Raises:
        ValueError: a scene names something that this world lacks.
    """
    bank = sprite_bank(world)
    empty = bank.masks_QMWW.shape[1] - 1
    paint = [_indices(scene, bank, world, empty) for scene in scenes]
    mask_BP = torch.tensor([[mask for mask, _ in row] for _, row in paint])
    background_B3 = bank.backgrounds_K3[torch.tensor([background for background, _ in paint])]
    colour_BP3 = bank.colours_C3[torch.tensor([[colour for _, colour in row] for _, row in paint])]
    change_BP3 = colour_BP3 - background_B3[:, None]
    image_BCHW = background_B3[:, :, None, None].repeat(1, 1, world.image_size, world.image_size)
    for place, window_BCWW in enumerate(bank.windows(image_BCHW)):
        mask_BWW = bank.masks_QMWW[bank.phase[place]][mask_BP[:, place]]
        window_BCWW.addcmul_(mask_BWW[:, None], change_BP3[:, place, :, None, None])
    return image_BCHW.round_().to(torch.uint8)


def _indices(scene: Scene, bank: SpriteBank, world: World, empty: int) -> tuple[int, list[tuple[int, int]]]:
    """A scene as indices: its background, and (mask, colour) for each place."""
    _check_known(scene, world)
    steps = 2 * world.jitter + 1
    row = [(empty, 0)] * len(PLACES)
    for item in scene.objects:
        right, down = item.jitter
        kind = bank.kind_index[item.shape, item.size]
        mask = (kind * steps + down + world.jitter) * steps + right + world.jitter
        row[PLACES.index(item.place)] = (mask, bank.colour_index[item.colour])
    return bank.background_index[scene.background], row


def _check_known(scene: Scene, world: World) -> None:
    wanted = [("background", scene.background)]
    for item in scene.objects:
        wanted += [("shape", item.shape), ("colour", item.colour), ("size", item.size)]
        if max(map(abs, item.jitter)) > world.jitter:
            raise ValueError(f"jitter={item.jitter}: this world allows at most {world.jitter} steps")
    pools = _pools(world, "all")
    for kind, name in wanted:
        if name not in pools[kind]:
            raise ValueError(f"{kind} {name!r}: this world has {', '.join(pools[kind])}")


def render(scene: Scene, world: World = WORLD, *, size: int | None = None) -> Tensor:
    """Draw one scene, uint8 RGB (3, size, size).

    `size` stands in for the world's own image size. The picture is then drawn without a bank of sprites, which
    is slower for many pictures and much faster for one.
    """
    if size is None:
        return render_batch([scene], world)[0]
    world = replace(world, image_size=size)
    _check_known(scene, world)
    shapes = {shape.name: shape for shape in world.shapes}
    sizes = {entry.name: entry for entry in world.sizes}
    colours, backgrounds = (
        {colour.name: torch.tensor(colour.rgb, dtype=torch.float32)[:, None, None] for colour in palette}
        for palette in (world.colours, world.backgrounds)
    )
    image_CHW = backgrounds[scene.background].repeat(1, size, size)
    for item in scene.objects:
        row, column = divmod(PLACES.index(item.place), GRID)
        centre = ((row + 0.5) * size / GRID, (column + 0.5) * size / GRID)
        mask_HW = _mask(world, shapes[item.shape], sizes[item.size], item.jitter, centre, size)
        image_CHW += mask_HW * (colours[item.colour] - backgrounds[scene.background])
    return image_CHW.round_().to(torch.uint8)


# Captions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Characters start..end (end excluded) of a caption; they describe `place`, or the background if None."""

    start: int
    end: int
    place: str | None


@dataclass(frozen=True)
class Caption:
    """A caption and which of its characters describe what; spans come in the order of the text."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Grammar:
    """Sentences with gaps. `{place}` is a phrase that starts with a preposition and has no comma."""

    objects: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    short_complete: tuple[str, ...]
    short_partial: tuple[str, ...]
    places: Mapping[str, tuple[str, ...]]


_NOUN_PHRASE = "a {size} {colour} {shape} {place}"

_TRAIN = _Grammar(
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

_HELDOUT = _Grammar(
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


def _grammar(split: Split) -> _Grammar:
    if split == "train":
        return _TRAIN
    if split == "heldout":
        return _HELDOUT
    if split != "all":
        raise ValueError(f"split={split!r}: it must be 'train', 'heldout' or 'all'")
    return _Grammar(
        objects=_TRAIN.objects + _HELDOUT.objects,
        openings=_TRAIN.openings + _HELDOUT.openings,
        closings=_TRAIN.closings + _HELDOUT.closings,
        short_complete=_TRAIN.short_complete + _HELDOUT.short_complete,
        short_partial=_TRAIN.short_partial + _HELDOUT.short_partial,
        places={place: _TRAIN.places[place] + _HELDOUT.places[place] for place in PLACES},
    )


@lru_cache(maxsize=32)
def _pools(world: World, split: Split) -> dict[str, dict[str, tuple[str, ...]]]:
    """The words of a split: kind -> name -> words (or phrases, for places)."""
    kinds: dict[str, Sequence[Shape | Colour | Size]] = {
        "shape": world.shapes,
        "colour": world.colours,
        "size": world.sizes,
        "background": world.backgrounds,
    }
    pools: dict[str, dict[str, tuple[str, ...]]] = {"place": dict(_grammar(split).places)}
    for kind, entries in kinds.items():
        words = {"train": lambda entry: entry.words, "heldout": lambda entry: entry.heldout}
        pick = words.get(split, lambda entry: entry.words + entry.heldout)
        pools[kind] = {entry.name: pick(entry) for entry in entries}
    return pools


@dataclass(frozen=True)
class _Words:
    """What words one caption: the pools, and the generator that chooses from them."""

    pools: dict[str, dict[str, tuple[str, ...]]]
    rng: random.Random

    def choose(self, kind: str, name: str) -> str:
        return self.rng.choice(self.pools[kind][name])

    def of(self, item: SceneObject) -> dict[str, str]:
        return {kind: self.choose(kind, getattr(item, kind)) for kind in ("shape", "colour", "size", "place")}


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
    grammar, words = _grammar(split), _Words(_pools(world, synonyms or split), rng)
    _check_known(scene, world)
    about = _about(scene, words)
    sentences: list[tuple[str | None, str]] = [(None, _fill(rng.choice(grammar.openings), about))]
    items = rng.sample(scene.objects, len(scene.objects))
    for item, template in zip(items, _deal(grammar.objects, len(items), rng), strict=True):
        sentences.append((item.place, _fill(template, words.of(item))))
    if len(items) > 4:
        sentences.append((None, _fill(rng.choice(grammar.closings), about)))
    return _join([(place, _capitalised(text)) for place, text in sentences], " ")


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
    grammar, words = _grammar(split), _Words(_pools(world, synonyms or split), rng)
    _check_known(scene, world)
    items = rng.sample(scene.objects, min(max_objects, len(scene.objects)))
    complete = len(items) == len(scene.objects)
    template = rng.choice(grammar.short_complete if complete else grammar.short_partial)
    before, after = _fill(template, {**_about(scene, words), "objects": "\n"}).split("\n")
    phrases = [_fill(_NOUN_PHRASE, words.of(item)) for item in items]
    pieces: list[tuple[str | None, str]] = [(None, before)] if before else []
    for number, (item, phrase) in enumerate(zip(items, phrases, strict=True)):
        if number:
            pieces.append((None, " and " if number == len(items) - 1 else ", "))
        pieces.append((item.place, phrase))
    pieces.append((None, after))
    first_place, first = pieces[0]
    return _join([(first_place, _capitalised(first)), *pieces[1:]], "")


def _about(scene: Scene, words: _Words) -> dict[str, str]:
    """What openings, closings and short captions need to know of a scene as a whole."""
    if not scene.objects:
        raise ValueError("a scene without objects has no caption")
    one = len(scene.objects) == 1
    return {
        "background": words.choose("background", scene.background),
        "count": _COUNTS[len(scene.objects) - 1],
        "shapes": "shape" if one else "shapes",
        "figures": "figure" if one else "figures",
        "are": "is" if one else "are",
    }


def _deal(templates: Sequence[str], number: int, rng: random.Random) -> list[str]:
    """`number` templates; none comes twice before all came once."""
    dealt: list[str] = []
    while len(dealt) < number:
        dealt += rng.sample(templates, min(len(templates), number - len(dealt)))
    return dealt


def _fill(template: str, words: Mapping[str, str]) -> str:
    """Fill the gaps; "a" becomes "an" before a vowel that is heard ("an orange hoop", but "a unicorn")."""
    return re.sub(r"\ba(?= (?:hour|(?!uni|eu|one\b)[aeiou]))", "an", template.format_map(words))


def _capitalised(sentences: str) -> str:
    return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), sentences)


def _join(pieces: Sequence[tuple[str | None, str]], glue: str) -> Caption:
    text, spans = "", []
    for place, piece in pieces:
        text += glue if text else ""
        spans.append(Span(len(text), len(text) + len(piece), place))
        text += piece
    return Caption(text, tuple(spans))


def vocabulary(world: World = WORLD, split: Split = "all") -> tuple[str, ...]:
    """Every lower-case word and punctuation mark that captions of this world can contain, sorted.

    They are cut where CLIP's tokenizer cuts before it applies byte pairs, so the byte pairs of these words
    are all that captions need.
    """
    grammar = _grammar(split)
    templates = grammar.objects + grammar.openings + grammar.closings
    templates += (*grammar.short_complete, *grammar.short_partial, _NOUN_PHRASE, "an, and is are")
    phrases = [re.sub(r"{\w+}", " ", template) for template in templates]
    for named in _pools(world, split).values():
        phrases += [phrase for pool in named.values() for phrase in pool]
    counted = {"train": "shape shapes", "heldout": "figure figures", "all": "shape shapes figure figures"}
    phrases += [*_COUNTS, counted[split]]
    return tuple(sorted(set(re.findall(r"[^\W\d_]+|[^\w\s]+", " ".join(phrases).lower()))))


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
    owners = {word: name for name, words in _pools(world, "all")[kind].items() for word in words}
    if kind == "place":
        owners |= {place: place for place in PLACES}
    longest_first = sorted(map(re.escape, owners), key=len, reverse=True)
    # "centre" is a place, "the centre of the top row" another: no match is better than a wrong one.
    goes_on = r"(?! of the (?:top|upper|middle|central|bottom|lower|left|right)\b)"
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b{goes_on}", re.IGNORECASE), owners


def _find(phrases: tuple[re.Pattern[str], dict[str, str]], text: str) -> list[tuple[tuple[int, int], str]]:
    pattern, owners = phrases
    return [(match.span(), owners[match[0].lower()]) for match in pattern.finditer(text)]


# Where a caption says what ---------------------------------------------------------------------------------


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

    def before(character: int) -> int:
        if callable(tokens):
            return tokens(caption.text[:character])
        return sum(end <= character for _, end in tokens)

    return [(before(span.start) + 1, before(span.end)) for span in caption.spans]


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


# The checker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of one object of a scene.

    Attributes:
        place: where it should be; it is judged there and nowhere else.
        verdict: "right" means shape and colour; the size does not count.
        seen: the object whose rendering comes nearest at this place, None if the bare background does.
        shape_right, colour_right, size_right: each on its own; all False if the object is missing.
        distance: root mean square difference to that rendering, as a fraction of the range 0..255. It is 0
            for a perfect drawing, and tells a crisp object from a smudge that got the same verdict.
    """

    place: str
    verdict: Literal["right", "wrong shape", "wrong colour", "wrong shape and colour", "missing"]
    seen: SceneObject | None
    shape_right: bool
    colour_right: bool
    size_right: bool
    distance: float

    @property
    def right(self) -> bool:
        return self.verdict == "right"


@dataclass(frozen=True)
class Check:
    """The verdicts for one picture.

    Attributes:
        objects: one verdict per object of the scene, in reading order.
        background: the background that the picture comes nearest to.
        background_right: whether the scene has that one.
        unexpected: objects seen at places that the scene leaves empty.
    """

    objects: tuple[Verdict, ...]
    background: str
    background_right: bool
    unexpected: tuple[SceneObject, ...]

    @property
    def all_right(self) -> bool:
        """Every object and the background right, and nothing else in the picture."""
        return all(item.right for item in self.objects) and self.background_right and not self.unexpected


def check_batch(image_BCHW: Tensor, scenes: Sequence[Scene], world: World = WORLD) -> list[Check]:
    """Judge pictures against scenes, place by place: which rendered object, if any, is nearest in squared error?

    Every shape, colour, size and jitter competes with the bare background, for whichever background explains
    the whole picture best, so the scene's own jitter plays no part: a scene known from a caption only will do.
    Pictures of another size are resized to the world's own.

    With coverage m and colour c, an object on background b adds m (c - b) to it, so its squared error is
    |x - b|^2 - 2 <m, x - b> . (c - b) + |m|^2 |c - b|^2: all candidates share the correlations <m, x>.

    Args:
        image_BCHW: RGB, uint8, or floating from 0 to 1; square, at least 24 pixels.
        scenes: what each picture should show.
        world: the world of the scenes.

    Raises:
        ValueError: images of another shape, size, type or range, or as many scenes as there are not images.
    """
    image_BCHW = _as_native(image_BCHW, len(scenes), world)
    chunks = [slice(start, start + _CHECK_BATCH) for start in range(0, len(scenes), _CHECK_BATCH)]
    return [result for chunk in chunks for result in _check_chunk(image_BCHW[chunk], scenes[chunk], world)]


def _check_chunk(image_BCHW: Tensor, scenes: Sequence[Scene], world: World) -> list[Check]:
    seen, background_B, distance_BP = _nearest(image_BCHW, world)
    names = [world.backgrounds[index].name for index in background_B.tolist()]
    return [_judge(*judged) for judged in zip(scenes, seen, names, distance_BP.tolist(), strict=True)]


def check(image_CHW: Tensor, scene: Scene, world: World = WORLD) -> Check:
    """Judge one picture; see `check_batch`."""
    return check_batch(image_CHW[None], [scene], world)[0]


def _as_native(image_BCHW: Tensor, number: int, world: World) -> Tensor:
    """Images as float32 from 0 to 1 at the world's size."""
    shape = tuple(image_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[2] < 24:
        raise ValueError(f"images of shape {shape}: they must be (batch, 3, side, side), side at least 24")
    if shape[0] != number:
        raise ValueError(f"{shape[0]} images for {number} scenes")
    if image_BCHW.dtype == torch.uint8:
        image_BCHW = image_BCHW.float() / 255
    elif not image_BCHW.is_floating_point():
        raise ValueError(f"images of {image_BCHW.dtype}: they must be uint8, or floating from 0 to 1")
    image_BCHW = image_BCHW.detach().float().cpu()
    low, high = image_BCHW.aminmax() if image_BCHW.numel() else (torch.zeros(()), torch.ones(()))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
        raise ValueError(f"images from {low:.3g} to {high:.3g}: floating images go from 0 to 1")
    if shape[2] == world.image_size:
        return image_BCHW
    side = (world.image_size, world.image_size)
    return F.interpolate(image_BCHW, side, mode="bilinear", antialias=True)


def _nearest(image_BCHW: Tensor, world: World) -> tuple[list[list[SceneObject | None]], Tensor, Tensor]:
    """For each image: the nearest object of each place (or None), the nearest background, the distances (B, P)."""
    bank = sprite_bank(world)
    mask_PMN = bank.masks_QMWW[list(bank.phase), :-1].flatten(2)
    window_BPCN = torch.stack(bank.windows(image_BCHW), dim=1).flatten(3)
    colour_C3, background_K3 = bank.colours_C3 / 255, bank.backgrounds_K3 / 255
    contrast_KC3 = colour_C3 - background_K3[:, None]
    mask_sum_PM, mask_square_PM = mask_PMN.sum(-1), mask_PMN.square().sum(-1)
    overlap_BPM3 = torch.einsum("bpcn,pmn->bpmc", window_BPCN, mask_PMN)
    bare, best, choice = [], [], []
    for background_3, contrast_C3 in zip(background_K3, contrast_KC3, strict=True):
        lifted_BPM3 = overlap_BPM3 - mask_sum_PM[..., None] * background_3
        change_BPMC = mask_square_PM[..., None] * contrast_C3.square().sum(-1) - 2 * lifted_BPM3 @ contrast_C3.T
        change_BP, index_BP = change_BPMC.flatten(2).min(-1)
        bare.append((window_BPCN - background_3[:, None]).square().sum((-2, -1)))
        best.append(change_BP.clamp(max=0))
        choice.append(torch.where(change_BP < 0, index_BP, -1))
    error_KBP = torch.stack(bare) + torch.stack(best)
    background_B = error_KBP.sum(-1).argmin(0)
    chosen = (background_B, torch.arange(len(image_BCHW)))
    distance_BP = (error_KBP[chosen].clamp(min=0) / window_BPCN[0, 0].numel()).sqrt()
    found = [
        [_object(index, place, world) for place, index in zip(PLACES, row, strict=True)]
        for row in torch.stack(choice)[chosen].tolist()
    ]
    return found, background_B, distance_BP


def _object(index: int, place: str, world: World) -> SceneObject | None:
    """The object behind an index into (shape, size, down, right, colour), None for a negative one."""
    if index < 0:
        return None
    steps = 2 * world.jitter + 1
    index, colour = divmod(index, len(world.colours))
    index, right = divmod(index, steps)
    index, down = divmod(index, steps)
    shape, size = divmod(index, len(world.sizes))
    jitter = (right - world.jitter, down - world.jitter)
    return SceneObject(place, world.shapes[shape].name, world.colours[colour].name, world.sizes[size].name, jitter)


def _judge(scene: Scene, seen: Sequence[SceneObject | None], background: str, distance: Sequence[float]) -> Check:
    place = {item.place: PLACES.index(item.place) for item in scene.objects}
    verdicts = tuple(_verdict(item, seen[place[item.place]], distance[place[item.place]]) for item in scene.objects)
    unexpected = tuple(item for item in seen if item is not None and item.place not in place)
    return Check(verdicts, background, background == scene.background, unexpected)


def _verdict(wanted: SceneObject, seen: SceneObject | None, distance: float) -> Verdict:
    if seen is None:
        return Verdict(wanted.place, "missing", None, False, False, False, distance)
    shape_right, colour_right = seen.shape == wanted.shape, seen.colour == wanted.colour
    verdict: Literal["right", "wrong shape", "wrong colour", "wrong shape and colour"] = "right"
    if not shape_right:
        verdict = "wrong shape" if colour_right else "wrong shape and colour"
    elif not colour_right:
        verdict = "wrong colour"
    return Verdict(wanted.place, verdict, seen, shape_right, colour_right, seen.size == wanted.size, distance)


# A sheet to look at ---------------------------------------------------------------------------------------


def sheet(
    images: Sequence[Tensor],
    labels: Sequence[str],
    *,
    columns: int,
    side: int = 216,
) -> Image.Image:
    """Lay pictures out in rows with a label under each; torchvision's `make_grid` has no labels.

    Args:
        images: uint8 RGB (3, H, W) each, of any size; they are drawn `side` pixels wide and high.
        labels: one a picture, may have several lines.
        columns: pictures in a row.
        side: width and height of a picture in the sheet.

    Raises:
        ValueError: no picture, no column, or not one label a picture.
    """
    if not images or columns < 1 or len(images) != len(labels):
        raise ValueError(
            f"{len(images)} images, {len(labels)} labels, columns={columns}: all at least 1, as many labels"
        )
    font = ImageFont.load_default(14)
    margin, line = 8, 18
    text_height = line * max(label.count("\n") + 1 for label in labels)
    step_x, step_y = side + margin, side + text_height + margin
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (columns * step_x + margin, rows * step_y + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image_CHW, label) in enumerate(zip(images, labels, strict=True)):
        left, top = margin + i % columns * step_x, margin + i // columns * step_y
        picture = Image.fromarray(image_CHW.permute(1, 2, 0).cpu().numpy())
        canvas.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        draw.rectangle((left, top, left + side - 1, top + side - 1), outline="lightgrey")
        draw.multiline_text((left, top + side + 2), label, fill="black", font=font, spacing=2)
    return canvas
