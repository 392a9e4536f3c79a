"""The exact checker: a picture against a scene, object by object, by the nearest rendering.

Shape letters as in rendering.py, and N the pixels of one place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fixclip_core.scenes.rendering import sprite_bank
from fixclip_core.scenes.world import MIN_SIDE, PLACES, WORLD, Scene, SceneObject, World

_CHECK_BATCH = 128  # images whose candidates the checker holds in memory at once: about 100 MB


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
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[2] < MIN_SIDE:
        raise ValueError(f"images of shape {shape}: they must be (batch, 3, side, side), side at least {MIN_SIDE}")
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
