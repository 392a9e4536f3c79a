"""Does the picture follow the prompt? Several systems draw the same prompts from the same noise, and are scored.

A sentence is "before" the 77th token if all of it is read by a stock encoder, "across" if that stops inside it,
"after" if it lies behind and within 248 tokens, and "past" if it does not.

Shape letters: B pictures, C, H, W channels, height and width, E embedding width.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fixclip_core.data.captions import split_sentences
from fixclip_core.evaluation.retrieval import Encoder, encode_images, encode_texts
from fixclip_core.files import write_atomically
from fixclip_core.scenes import world as scenes
from fixclip_core.training.checkpoint import check_folder
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.adapter_training.features import check_made_for, fingerprint, write_attention_out
from fixclip_diffusion.pipeline import LONG_PROMPT_MODES, FixClipStableDiffusionPipeline
from fixclip_diffusion.text_encoder import FixClipTokenizer

ZONES: tuple[str, ...] = get_args(scenes.Zone)
SCENES_PREFIX = "scenes:"
SYSTEM_KEYS = ("encoder", "adapter", "lora", "long_prompt")


@dataclass(frozen=True)
class System:
    """A way to turn prompts into pictures.

    Attributes:
        name: for tables and folders.
        encoder: text encoder, a folder, hub or built-in name; None for the base's own, stretched.
        adapter: folder, hub or built-in name of an adapter; None for the encoder's own, if any.
        lora: what `load_lora_weights` reads, or a built-in name; None for none.
        long_prompt: see `FixClipStableDiffusionPipeline`.
    """

    name: str
    encoder: str | None = None
    adapter: str | None = None
    lora: str | None = None
    long_prompt: str = "windows"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w+. -]+", self.name):
            raise ValueError(f"system {self.name!r}: a name has letters, digits, spaces and _ + . - only")
        if self.long_prompt not in LONG_PROMPT_MODES:
            raise ValueError(
                f"system {self.name!r}: long_prompt={self.long_prompt!r}: valid are {', '.join(LONG_PROMPT_MODES)}"
            )


def default_systems(encoder: str | None, adapter: str | None, lora: str | None) -> list[System]:
    """Stock and compel-like windows of the base, then ours as far as its parts are given."""
    systems = [System("stock", long_prompt="truncate_77"), System("windows", long_prompt="windows_77")]
    systems.append(System("untuned", encoder))
    if adapter is not None:
        systems.append(System("adapted", encoder, adapter))
    if lora is not None:
        systems.append(System("adapted+lora", encoder, adapter, lora))
    return systems


def parse_system(text: str) -> System:
    """`NAME` or `NAME:encoder=...,adapter=...,lora=...,long_prompt=...`.

    Raises:
        ValueError: an unknown key, or a bad name or mode.
    """
    name, _, options = text.partition(":")
    values: dict[str, str] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in SYSTEM_KEYS or not equals or not value:
            raise ValueError(f"system {text!r}: {option!r} is not KEY=VALUE with one of {', '.join(SYSTEM_KEYS)}")
        values[key] = value
    return System(name, **values)


# -- prompts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the scene it describes where the exact checker can judge its picture."""

    text: str
    scene: scenes.Scene | None = None


def read_prompts(source: str, check_scenes: bool | None = None) -> list[Prompt]:
    """Prompts of a file, or captions of the procedural world.

    Args:
        source: a .jsonl file of objects with `prompt`, a text file with one prompt a line, or `scenes:N` for N
            held-out scene captions.
        check_scenes: read each prompt as a scene's caption; None does so where all of them can be read.

    Raises:
        ValueError: no such file, a line that is no prompt, no prompt at all, or a prompt that describes no scene
            although `check_scenes` is set.
    """
    if source.startswith(SCENES_PREFIX):
        number = source.removeprefix(SCENES_PREFIX)
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"prompts {source!r}: give the number of scenes, like scenes:64")
        drawn = [scenes.scene_at(1, index, num_objects=len(scenes.PLACES)) for index in range(int(number))]
        return [Prompt(scenes.long_caption(s, i, split="heldout").text, s) for i, s in enumerate(drawn)]
    texts = list(_prompt_lines(Path(source)))
    if not texts:
        raise ValueError(f"{source}: it holds no prompt")
    if check_scenes is False:
        return [Prompt(text) for _, text in texts]
    prompts = []
    for line, text in texts:
        try:
            scene = scenes.read_caption(text)
            if not scene.objects:  # "a red bicycle against a white wall" has a background, too
                raise ValueError("it names no object of the world")
            prompts.append(Prompt(text, scene))
        except ValueError as error:
            if check_scenes:
                raise ValueError(f"{source}:{line}: no scene's caption: {error}") from None
            return [Prompt(text) for _, text in texts]
    return prompts


def _prompt_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {str(path)!r}: not a readable text file: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = line.strip()
        if path.suffix == ".jsonl":
            try:
                text = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: expected a JSON object with `prompt`") from None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}:{number}: prompt is {text!r}, it must be a text")
        yield number, text


@dataclass(frozen=True)
class Sentence:
    """A sentence of a prompt and where it lies, see the top of this file."""

    text: str
    zone: str


def sentences(text: str, tokenizer: FixClipTokenizer) -> list[Sentence]:
    """The sentences of a prompt in their order, as `tokenizer` reads them."""
    clean = tokenizer.clean(text)
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = [(start + _leading(clean[start:end]), end) for start, end in split_sentences(clean)]
    caption = scenes.Caption(str(clean), tuple(scenes.Span(*span, str(i)) for i, span in enumerate(spans)))
    zones = scenes.object_zones(caption, offsets, long_length=tokenizer.context_length)
    return [Sentence(clean[start:end].strip(), zones[str(i)]) for i, (start, end) in enumerate(spans)]


def _leading(text: str) -> int:
    return len(text) - len(text.lstrip())


# -- pictures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, the same for every system.

    `batch_size` pictures at a time: faster, and equal to one at a time up to rounding.
    """

    steps: int = 30
    guidance_scale: float = 7.5
    size: int | None = None
    seed: int = 0
    num_seeds: int = 1
    negative_prompt: str = ""
    batch_size: int = 1

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)


class Painter:
    """Loads the base once and puts each system's parts into it.

    Args:
        base: Stable Diffusion 1.x or 2.x, folder or hub name; of a whole model its base.
        device, dtype: where and in what precision to draw.
    """

    def __init__(self, base: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.base, self.device, self.dtype = builtin.base_of(base), torch.device(device), dtype
        self.shared: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

    @contextmanager
    def pipeline(self, system: System) -> Iterator[FixClipStableDiffusionPipeline]:
        """The system's pipeline.

        Raises:
            ValueError: a part cannot be loaded, does not fit the base, or the adapter was made for another encoder.
        """
        pipe = FixClipStableDiffusionPipeline.from_pretrained(
            self.base, encoder=system.encoder, long_prompt=system.long_prompt, dtype=torch.float32, **self.shared
        )
        if system.long_prompt.endswith("_77") and not pipe.text_encoder.short_context_length:
            raise ValueError(
                f"system {system.name!r}: {system.long_prompt} needs an encoder with its original positions"
            )
        if system.adapter is not None:
            adapter = TextAdapter.from_pretrained(system.adapter)
            check_made_for(Path(builtin.resolve(system.adapter)), fingerprint(pipe.text_encoder, pipe.tokenizer))
            pipe.text_encoder.set_adapter_module(adapter)
        pipe.to(self.device, self.dtype)
        write_attention_out(pipe.unet, self.device)
        self.shared |= {"vae": pipe.vae, "unet": pipe.unet}
        pipe.set_progress_bar_config(disable=True)
        if system.lora is None:
            yield pipe
            return
        try:
            pipe.load_lora_weights(system.lora)
        except Exception as error:
            raise ValueError(f"system {system.name!r}: LoRA {system.lora!r} cannot be loaded: {error}") from error
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()

    def draw(self, system: System, prompts: Sequence[Prompt], drawing: Drawing) -> list[list[Image.Image]]:
        """One list of pictures, a picture for each seed, for every prompt."""
        jobs = [(prompt.text, seed) for prompt in prompts for seed in drawing.seeds]
        pictures: list[Image.Image] = [Image.new("RGB", (0, 0))] * len(jobs)
        with self.pipeline(system) as pipe:
            side = drawing.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
            call: Any = pipe
            with tqdm(total=len(jobs), desc=system.name, unit="picture") as bar:
                for batch, embeds, negative_embeds in _batches(pipe, jobs, drawing):
                    images = call(
                        prompt_embeds=embeds,
                        negative_prompt_embeds=negative_embeds,
                        num_inference_steps=drawing.steps,
                        guidance_scale=drawing.guidance_scale,
                        width=side,
                        height=side,
                        generator=[torch.Generator().manual_seed(jobs[job][1]) for job in batch],
                    ).images
                    for job, image in zip(batch, images, strict=True):
                        pictures[job] = image
                    bar.update(len(batch))
        size = drawing.num_seeds
        return [pictures[i : i + size] for i in range(0, len(pictures), size)]


def _batches(
    pipe: FixClipStableDiffusionPipeline, jobs: Sequence[tuple[str, int]], drawing: Drawing
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Jobs that are drawn together and their text states; only states of equal length are stacked."""
    groups: dict[int, list[tuple[int, Tensor, Tensor | None]]] = {}
    before, states = None, None
    for job, (text, _) in enumerate(jobs):
        if text != before:  # the seeds of a prompt come one after another
            with torch.no_grad():
                states = pipe.encode_prompt(text, pipe.device, 1, drawing.guidance_scale > 1, drawing.negative_prompt)
            before = text
        assert states is not None
        group = groups.setdefault(states[0].shape[1], [])
        group.append((job, *states))
        if len(group) == drawing.batch_size:
            yield _stack(groups.pop(states[0].shape[1]))
    for group in groups.values():
        yield _stack(group)


def _stack(group: Sequence[tuple[int, Tensor, Tensor | None]]) -> tuple[list[int], Tensor, Tensor | None]:
    jobs, embeds, negative_embeds = zip(*group, strict=True)
    return list(jobs), torch.cat(embeds), None if negative_embeds[0] is None else torch.cat(negative_embeds)


# -- scores --------------------------------------------------------------------------------------------------


@torch.no_grad()
def text_scores(
    pictures: Sequence[Sequence[Image.Image]], texts: Sequence[Sequence[str]], encoder: Encoder
) -> list[list[float]]:
    """Cosine between a prompt's pictures (mean over them) and each of its texts.

    Args:
        pictures: of each prompt.
        texts: of each prompt, any number.
        encoder: a CLIP; choose one that reads as many tokens as the prompts have.
    """
    flat = [text for those in texts for text in those]
    text_TE, _ = encode_texts(encoder, flat)
    scores, start = [], 0
    for those, own in zip(pictures, texts, strict=True):
        image_BE = encode_images(encoder, torch.stack([encoder.preprocess(picture) for picture in those]))
        cosine_BT = image_BE @ text_TE[start : start + len(own)].T
        scores.append(cosine_BT.mean(0).tolist())
        start += len(own)
    return scores


def scene_verdicts(pictures: Sequence[Image.Image], prompt: Prompt, tokenizer: FixClipTokenizer) -> dict[str, Any]:
    """What the exact checker says of a scene's pictures: each object's zone, and whether it is right."""
    assert prompt.scene is not None
    clean = tokenizer.clean(prompt.text)
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    zones = scenes.object_zones(scenes.annotate_caption(str(clean)), offsets, long_length=tokenizer.context_length)
    objects = []
    checks = scenes.check_batch(torch.stack([_tensor(p) for p in pictures]), [prompt.scene] * len(pictures))
    for check in checks:
        objects += [
            {"zone": zones[v.place], "right": v.right, "shape": v.shape_right, "colour": v.colour_right}
            for v in check.objects
        ]
    return {"objects": objects, "background": [check.background_right for check in checks]}


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error (0 for a single value) and how many."""
    number = len(values)
    mean = sum(values) / number
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (number - 1) / number) if number > 1 else 0.0
    return {"mean": mean, "standard_error": spread, "count": number}


def evaluate_images(
    base: str,
    prompts: Sequence[Prompt],
    systems: Sequence[System],
    drawing: Drawing,
    *,
    scorer: Encoder | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Let every system draw every prompt from the same seeds, score the pictures and compare.

    Args:
        base: Stable Diffusion 1.x or 2.x, folder or hub name.
        prompts: see `read_prompts`; scenes are judged by the exact checker.
        systems: see `System`; their names must differ.
        drawing: steps, guidance, size and seeds.
        scorer: a long-context CLIP for image-text scores; None leaves them out.
        device, dtype: of the drawing.
        folder: where to write report.json, sheet.png and images/; None writes nothing.

    Returns:
        {"settings", "systems": {name: {metric: mean, standard error, count}}, "prompts": [per prompt]}. Metrics
        are "whole", "sentence_ZONE" (cosines) and "objects_right_ZONE", "objects_colour_ZONE", "background_right"
        (shares); each prompt counts once in a mean, whatever it holds.

    Raises:
        ValueError: nothing to draw or to draw with, names that recur, a part that cannot be loaded, or a folder that
            cannot be written to.
    """
    names = [system.name for system in systems]
    if not prompts or not systems or len(set(names)) < len(names):
        raise ValueError(f"{len(prompts)} prompts and systems {names}: at least one of each, every name once")
    painter = Painter(base, device, dtype)
    for system in systems:  # what cannot be loaded is found out before hours of drawing
        with painter.pipeline(system) as pipe:
            tokenizer = pipe.tokenizer
    if folder is not None:
        check_folder(folder, 0)
    parts = [sentences(prompt.text, tokenizer) for prompt in prompts]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt.text, "sentences": [asdict(s) for s in own], "systems": {}}
        for prompt, own in zip(prompts, parts, strict=True)
    ]
    drawn: dict[str, list[list[Image.Image]]] = {}
    for system in systems:
        pictures = drawn[system.name] = painter.draw(system, prompts, drawing)
        if folder is not None:
            _save_pictures(folder / "images" / system.name, pictures, drawing)
        scores: list[list[float]] = [[] for _ in prompts]
        if scorer is not None:
            texts = [[p.text, *(s.text for s in own)] for p, own in zip(prompts, parts, strict=True)]
            scores = text_scores(pictures, texts, scorer)
        for row, prompt, own, score in zip(rows, prompts, pictures, scores, strict=True):
            result: dict[str, Any] = {}
            if score:
                result |= {"whole": score[0], "per_sentence": score[1:]}
            if prompt.scene is not None:
                result |= scene_verdicts(own, prompt, tokenizer)
            row["systems"][system.name] = result
    report = {
        "settings": {
            "base": base,
            "systems": [asdict(system) for system in systems],
            "drawing": asdict(drawing),
            "scorer": None if scorer is None else scorer.describe(),
        },
        "systems": {name: _metrics([(row["sentences"], row["systems"][name]) for row in rows]) for name in names},
        "prompts": rows,
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
        write_sheet(folder / "sheet.png", drawn, prompts)
    return report


def _metrics(rows: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """A system's means over prompts, of what each prompt has."""
    found: dict[str, list[float]] = {}

    def add(name: str, values: Sequence[float]) -> None:
        if values:
            found.setdefault(name, []).append(sum(values) / len(values))

    for parts, result in rows:
        if "whole" in result:
            add("whole", [result["whole"]])
            for zone in ZONES:
                chosen = zip(parts, result["per_sentence"], strict=True)
                add(f"sentence_{zone}", [score for part, score in chosen if part["zone"] == zone])
        for zone in ZONES if "objects" in result else ():
            objects = [item for item in result["objects"] if item["zone"] == zone]
            add(f"objects_right_{zone}", [item["right"] for item in objects])
            add(f"objects_colour_{zone}", [item["colour"] for item in objects])
        add("background_right", result.get("background", []))
    return {name: summarize(values) for name, values in found.items()}


def format_table(report: Mapping[str, Any]) -> str:
    """The report as a few lines for a terminal: a system in each row, mean ± standard error."""
    systems = report["systems"]
    metrics = list(dict.fromkeys(name for values in systems.values() for name in values))
    if not metrics:
        return "nothing was scored: choose a --scorer, or prompts of the scenes"
    width = max(len(name) for name in systems)
    lines = [f"{len(report['prompts'])} prompts, {report['settings']['drawing']['num_seeds']} picture(s) each"]
    for metric in metrics:
        lines.append(metric)
        for name, values in systems.items():
            value = values.get(metric)
            shown = f"{value['mean']:8.4f} ± {value['standard_error']:.4f}" if value else f"{'-':>8}"
            lines.append(f"  {name:<{width}} {shown}")
    return "\n".join(lines)


def _save_pictures(folder: Path, pictures: Sequence[Sequence[Image.Image]], drawing: Drawing) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(pictures):
        for seed, picture in zip(drawing.seeds, own, strict=True):
            picture.save(folder / f"{number:05d}-seed{seed}.png")


def write_sheet(
    path: Path, drawn: Mapping[str, list[list[Image.Image]]], prompts: Sequence[Prompt], most: int = 16
) -> None:
    """The first picture of the first prompts, a prompt in each row and a system in each column."""
    images, labels = [], []
    for row, prompt in enumerate(prompts[:most]):
        for name, pictures in drawn.items():
            images.append(_tensor(pictures[row][0]))
            labels.append(f"{name}\n{prompt.text[:24]}")
    side = max(192, min(512, images[0].shape[-1]))
    sheet = scenes.sheet(images, labels, columns=len(drawn), side=side)
    write_atomically(path, lambda partial: sheet.save(partial, format="png"))
