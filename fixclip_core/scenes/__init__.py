"""A procedural world of scenes: pictures, dense captions that describe them, and an exact checker.

A scene is a plain background and one to nine objects on a 3x3 grid; an object is a shape, a colour and a
size at a place. The same `World` draws the picture, words the caption and judges a picture, so whatever a
model makes of a long caption can be counted object by object. docs/scenes.md shows how to add a shape.
"""

from fixclip_core.scenes.captions import (
    Caption,
    Reference,
    ReferenceKind,
    Span,
    Tokens,
    Zone,
    long_caption,
    object_zones,
    reference_distances,
    short_caption,
    token_ranges,
)
from fixclip_core.scenes.checker import Check, Verdict, check, check_batch
from fixclip_core.scenes.grammar import Split, vocabulary
from fixclip_core.scenes.reader import annotate_caption, read_caption
from fixclip_core.scenes.references import (
    DISTANCES,
    KINDS,
    Distance,
    blind_guess,
    count_words,
    distance_bucket,
    reference_at,
    reference_caption,
    reference_scene,
)
from fixclip_core.scenes.rendering import SpriteBank, render, render_batch, sheet, sprite_bank
from fixclip_core.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    PLACES,
    SHAPES,
    SIZES,
    WORLD,
    Colour,
    Scene,
    SceneObject,
    Shape,
    Size,
    World,
    sample_scene,
    scene_at,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DISTANCES",
    "GRID",
    "KINDS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "WORLD",
    "Caption",
    "Check",
    "Colour",
    "Distance",
    "Reference",
    "ReferenceKind",
    "Scene",
    "SceneObject",
    "Shape",
    "Size",
    "Span",
    "Split",
    "SpriteBank",
    "Tokens",
    "Verdict",
    "World",
    "Zone",
    "annotate_caption",
    "blind_guess",
    "check",
    "check_batch",
    "count_words",
    "distance_bucket",
    "long_caption",
    "object_zones",
    "read_caption",
    "reference_at",
    "reference_caption",
    "reference_distances",
    "reference_scene",
    "render",
    "render_batch",
    "sample_scene",
    "scene_at",
    "sheet",
    "short_caption",
    "sprite_bank",
    "token_ranges",
    "vocabulary",
]
