"""`fixclip demo`: long prompts through every system of a whole model of the scenes world, judged object by object."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fixclip_core import scenes
from fixclip_core.files import write_atomically
from fixclip_diffusion import builtin
from fixclip_diffusion.evaluation.generate import Drawing, Painter, System
from fixclip_diffusion.evaluation.judges import scene_verdicts
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.token_report import TokenReport, token_report
from fixclip_diffusion.tokenizer import FixClipTokenizer

TRUTH = "ground truth"
DRAWING = Drawing(steps=20, guidance_scale=2.0)
SIDE = 216  # of a picture in the sheet, in pixels: three times the world's own size
CAPTION = (
    "Objects that are right (shape, colour and place), by where their sentences end. After token 77 includes the\n"
    "sentences that the cut goes through: a stock encoder reads only their beginning."
)


@dataclass(frozen=True)
class Shown:
    """What one system made of one prompt.

    Attributes:
        picture: RGB.
        zones: of each object of the scene, in its order: "before", "across", "after" or "past", see `evaluate`.
        check: what the checker says of the picture, or None where the prompt describes no scene.
    """

    picture: Image.Image
    zones: tuple[str, ...] = ()
    check: scenes.Check | None = None

    def count(self, before: bool) -> tuple[int, int]:
        """How many objects are right and how many there are, before token 77 or behind it."""
        assert self.check is not None
        chosen = [v.right for v, z in zip(self.check.objects, self.zones, strict=True) if (z == "before") == before]
        return sum(chosen), len(chosen)


@dataclass(frozen=True)
class Demo:
    """All pictures: for each system (the ground truth last, where there is one) one of each prompt."""

    prompts: tuple[Prompt, ...]
    reports: tuple[TokenReport, ...]
    rows: dict[str, list[Shown]]

    @property
    def is_judged(self) -> bool:
        return all(prompt.scene is not None for prompt in self.prompts)

    def total(self, name: str, before: bool) -> tuple[int, int]:
        """`Shown.count` over all prompts."""
        counts = [shown.count(before) for shown in self.rows[name]]
        return sum(right for right, _ in counts), sum(number for _, number in counts)

    @property
    def best(self) -> str:
        """The system with the most objects right, the last of those that are equal."""
        names = [name for name in self.rows if name != TRUTH]
        return max(reversed(names), key=lambda name: self.total(name, True)[0] + self.total(name, False)[0])


def default_prompts() -> list[Prompt]:
    """Nine objects each, in the words of the training captions; no training stream contains these scenes.

    Every sentence of the first can be read alone. In the second a rule ("each square is orange") colours an object, in
    the third the sentence of another object does, more than 77 tokens away.
    """
    scene = scenes.sample_scene("demo/0", num_objects=len(scenes.PLACES))
    prompts = [Prompt(scenes.long_caption(scene, "demo/0").text, scene)]
    referring: dict[str, scenes.ReferenceKind] = {"demo/1": "default", "demo/89": "same"}
    for name, kind in referring.items():
        scene = scenes.reference_scene(name, kind)
        caption = scenes.reference_caption(scene, name, kinds=(kind,), distances=("77 to 150", "over 150"))
        prompts.append(Prompt(caption.text, scene))
    return prompts


def own_prompt(text: str) -> tuple[Prompt, str]:
    """A prompt with the scene that it describes, and why there is none if the checker cannot read it."""
    try:
        scene = scenes.read_caption(text)
    except ValueError as error:
        return Prompt(text), str(error)
    return (Prompt(text, scene), "") if scene.objects else (Prompt(text), "it names no object with its place")


def unknown_words(text: str) -> list[str]:
    """Words that no caption of the scenes world contains, in their order: a model of this world cannot draw them."""
    known = set(scenes.vocabulary())
    words = re.findall(r"[^\W\d_]+", text.lower())
    return [word for word in dict.fromkeys(words) if word not in known]


def systems_of(parts: builtin.ModelParts) -> list[System]:
    """Stock diffusers, chunks, the best untrained conditioning, and the whole model as it loads by default."""
    systems = [
        System("stock cut at 77", conditioning="stock"),
        System("chunks of 77", conditioning="chunks"),
        System("overlapping windows", conditioning="overlap"),
    ]
    if parts.encoder is not None:
        systems.append(System("FIX-CLIP", parts.encoder, parts.adapter, parts.lora))
    elif parts.adapter is not None:
        systems.append(System("overlap + adapter", adapter=parts.adapter, conditioning="overlap"))
    return systems


def draw(model: str | Path, prompts: Sequence[Prompt], drawing: Drawing = DRAWING, device: str = "cpu") -> Demo:
    """Every system draws every prompt from the same noise.

    Args:
        model: a whole model, see `builtin`; a built-in name or a folder.
        prompts: at least one; pictures are judged if each of them describes a scene.
        drawing: one seed.
        device: where to draw, in float32.

    Raises:
        ValueError: `model` is no whole model or lacks its weights, or a part does not fit.
    """
    if builtin.whole_model(model) is None:
        raise ValueError(f"model {str(model)!r}: neither {builtin.SCENES} nor a folder with base/ in it")
    parts = builtin.complete(model)
    tokenizer = FixClipTokenizer.from_pretrained(builtin.resolve(parts.base), subfolder="tokenizer")
    painter = Painter(parts.base, device)
    pictures = {system.name: [own[0] for own in painter.draw(system, prompts, drawing)] for system in systems_of(parts)}
    judged = all(prompt.scene is not None for prompt in prompts)
    if judged:
        pictures[TRUTH] = [_truth(prompt) for prompt in prompts]
    rows = {
        name: [_judge(p, prompt, tokenizer) if judged else Shown(p) for p, prompt in zip(own, prompts, strict=True)]
        for name, own in pictures.items()
    }
    return Demo(tuple(prompts), tuple(token_report(tokenizer, prompt.text) for prompt in prompts), rows)


def _truth(prompt: Prompt) -> Image.Image:
    assert prompt.scene is not None
    return Image.fromarray(scenes.render(prompt.scene).permute(1, 2, 0).numpy())


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _judge(picture: Image.Image, prompt: Prompt, tokenizer: FixClipTokenizer) -> Shown:
    assert prompt.scene is not None
    verdicts: dict[str, Any] = scene_verdicts([picture], prompt, tokenizer)
    zones = tuple(item["zone"] for item in verdicts["objects"])
    return Shown(picture, zones, scenes.check(_tensor(picture), prompt.scene))


# -- what is shown -------------------------------------------------------------------------------------------


def write_sheet(demo: Demo, path: Path) -> None:
    """A prompt in each row, a system in each column, with the objects that are right under each picture; a PNG."""
    shown = [(name, own[row]) for row in range(len(demo.prompts)) for name, own in demo.rows.items()]
    labels = [name + ("" if item.check is None else "\n" + _counts(item)) for name, item in shown]
    images = [_tensor(item.picture) for _, item in shown]
    sheet = scenes.sheet(images, labels, columns=len(demo.rows), side=max(SIDE, images[0].shape[-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: sheet.save(partial, format="png"))


def _counts(shown: Shown) -> str:
    lines = []
    for where, before in (("before", True), ("after", False)):
        right, number = shown.count(before)
        if number:
            lines.append(f"{where} token 77: {right} of {number}")
    return "\n".join(lines)


def format_prompts(demo: Demo) -> str:
    """The prompts, each with its length and the point at which a stock encoder stops."""
    blocks = []
    for number, report in enumerate(demo.reports, 1):
        cut = report.stock_cut
        text = report.text if cut is None else f"{report.text[:cut]}[[stock stops here]] {report.text[cut:].lstrip()}"
        head = f"Prompt {number}, {report.num_tokens} tokens:"
        blocks.append(head + "\n" + textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="  "))
    return "\n\n".join(blocks)


def format_table(demo: Demo) -> str:
    """Objects right before and after token 77 and backgrounds right, a system in each row."""
    width = max(map(len, demo.rows))
    lines = [CAPTION, f"  {'':<{width}}  before 77   after 77  background"]
    for name, own in demo.rows.items():
        totals = [demo.total(name, before) for before in (True, False)]
        cells = [f"{f'{right:4d} of {number:2d}' if number else ' ' * 7 + '-':<10}" for right, number in totals]
        backgrounds = sum(item.check.background_right for item in own if item.check is not None)
        lines.append(f"  {name:<{width}}  {'   '.join(cells)}     {backgrounds} of {len(own)}")
    return "\n".join(lines)


def format_verdicts(demo: Demo) -> str:
    """Every object in the order of the sentences: where its sentence lies and what the best system drew."""
    blocks = [f"{demo.best!r}, which got the most objects right, object by object:"]
    for number, (prompt, shown) in enumerate(zip(demo.prompts, demo.rows[demo.best], strict=True), 1):
        blocks.append(f"Prompt {number}\n" + "\n".join(_verdict_lines(prompt, shown)))
    return "\n".join(blocks)


def _verdict_lines(prompt: Prompt, shown: Shown) -> list[str]:
    assert shown.check is not None
    found = {v.place: (zone, v) for v, zone in zip(shown.check.objects, shown.zones, strict=True)}
    lines = []
    for span in scenes.annotate_caption(prompt.text).spans:
        if span.place is None:
            continue
        zone, verdict = found[span.place]
        words: str = verdict.verdict
        if not verdict.right and verdict.seen is not None:
            words = f"{words}: {verdict.seen.colour} {verdict.seen.shape}"
        sentence = " ".join(prompt.text[span.start : span.end].split())
        lines.append(f"  {zone:<7} {words:<40} {sentence}")
    return lines
