"""Pictures of scenes, drawn from a bank of supersampled masks, and labelled sheets of them.

Shape letters: B images, P places (9, in reading order), Q sub-pixel phases, M masks (shape, size, jitter),
C colours (or RGB channels in BCHW), K backgrounds, W side of the square of pixels that holds one place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fixclip_core.scenes.world import GRID, PLACES, WORLD, Scene, Shape, Size, World, check_known


@dataclass(frozen=True)
class SpriteBank:
    """Every mask that a world can paint, once for each sub-pixel phase of its places.

    masks_QMWW holds coverage from 0 to 1; the last of the M masks is empty. Place p starts at pixel
    starts[p // 3] down and starts[p % 3] right, and uses the masks of phase[p].
    """

    masks_QMWW: Tensor
    starts: tuple[int, int, int]
    phase: tuple[int, ...]
    colours_C3: Tensor
    backgrounds_K3: Tensor
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
    check_known(scene, world)
    steps = 2 * world.jitter + 1
    row = [(empty, 0)] * len(PLACES)
    for item in scene.objects:
        right, down = item.jitter
        kind = bank.kind_index[item.shape, item.size]
        mask = (kind * steps + down + world.jitter) * steps + right + world.jitter
        row[PLACES.index(item.place)] = (mask, bank.colour_index[item.colour])
    return bank.background_index[scene.background], row


def render(scene: Scene, world: World = WORLD, *, size: int | None = None) -> Tensor:
    """Draw one scene, uint8 RGB (3, size, size).

    `size` stands in for the world's own image size. The picture is then drawn without a bank of sprites, which
    is slower for many pictures and much faster for one.
    """
    if size is None:
        return render_batch([scene], world)[0]
    world = replace(world, image_size=size)
    check_known(scene, world)
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
