"""What scenes are made of, and scenes drawn from it by a seed: a background and objects on a 3x3 grid.

Everything is a function of its seed: sampling uses `random.Random`, never a global generator.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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


MIN_SIDE = 24  # pixels of a picture


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
        if self.image_size < MIN_SIDE:
            raise ValueError(f"image_size={self.image_size}: it must be at least {MIN_SIDE} pixels")


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


@lru_cache(maxsize=8)
def names_of(world: World) -> dict[str, tuple[str, ...]]:
    """The names of each kind of thing: "shape", "colour", "size" and "background"."""
    kinds: dict[str, tuple[Shape | Colour | Size, ...]] = {
        "shape": world.shapes,
        "colour": world.colours,
        "size": world.sizes,
        "background": world.backgrounds,
    }
    return {kind: tuple(entry.name for entry in entries) for kind, entries in kinds.items()}


def check_known(scene: Scene, world: World) -> None:
    """Refuse a scene of another world.

    Raises:
        ValueError: the scene names something that `world` lacks, or an object is moved further than it allows.
    """
    wanted = [("background", scene.background)]
    for item in scene.objects:
        wanted += [("shape", item.shape), ("colour", item.colour), ("size", item.size)]
        if max(map(abs, item.jitter)) > world.jitter:
            raise ValueError(f"jitter={item.jitter}: this world allows at most {world.jitter} steps")
    names = names_of(world)
    for kind, name in wanted:
        if name not in names[kind]:
            raise ValueError(f"{kind} {name!r}: this world has {', '.join(names[kind])}")
