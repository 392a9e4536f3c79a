"""Several systems draw the same prompts from the same noise."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.adapter_training.features import write_attention_out
from fixclip_diffusion.conditioning import get_conditioning
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.fingerprint import check_made_for, fingerprint
from fixclip_diffusion.pipeline import FixClipStableDiffusionPipeline

SYSTEM_KEYS = ("encoder", "adapter", "lora", "conditioning")
OLD_KEYS = {"long_prompt": "conditioning"}  # of version 0.1


@dataclass(frozen=True)
class System:
    """A way to turn prompts into pictures.

    Attributes:
        name: for tables and folders.
        encoder: text encoder, a folder, hub or built-in name; None for the base's own, stretched.
        adapter: folder, hub or built-in name of an adapter; None for the encoder's own, if any.
        lora: what `load_lora_weights` reads, or a built-in name; None for none.
        conditioning: how prompts are read, see `FixClipStableDiffusionPipeline`; None: as encoder or adapter say.
    """

    name: str
    encoder: str | None = None
    adapter: str | None = None
    lora: str | None = None
    conditioning: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w+. -]+", self.name):
            raise ValueError(f"system {self.name!r}: a name has letters, digits, spaces and _ + . - only")
        if self.conditioning is not None:
            try:
                object.__setattr__(self, "conditioning", get_conditioning(self.conditioning).name)
            except ValueError as error:
                raise ValueError(f"system {self.name!r}: {error}") from None


def default_systems(encoder: str | None, adapter: str | None, lora: str | None) -> list[System]:
    """Stock and compel-like windows of the base, then ours as far as its parts are given."""
    systems = [System(name, conditioning=name) for name in ("stock", "chunks", "overlap")]
    systems.append(System("untuned", encoder, conditioning="one_pass"))
    if adapter is not None:
        systems.append(System("adapted", encoder, adapter))
    if lora is not None:
        systems.append(System("adapted+lora", encoder, adapter, lora))
    return systems


def parse_system(text: str) -> System:
    """`NAME` or `NAME:encoder=...,adapter=...,lora=...,conditioning=...`.

    Raises:
        ValueError: an unknown key, or a bad name or mode.
    """
    name, _, options = text.partition(":")
    values: dict[str, str] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        key = OLD_KEYS.get(key, key)
        if key not in SYSTEM_KEYS or not equals or not value:
            raise ValueError(f"system {text!r}: {option!r} is not KEY=VALUE with one of {', '.join(SYSTEM_KEYS)}")
        values[key] = value
    return System(name, **values)


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
            self.base, encoder=system.encoder, dtype=torch.float32, **self.shared
        )
        if system.adapter is not None:
            adapter = TextAdapter.from_pretrained(system.adapter)
            check_made_for(Path(builtin.resolve(system.adapter)), fingerprint(pipe.text_encoder, pipe.tokenizer))
            pipe.text_encoder.set_adapter_module(adapter)
        try:
            pipe.conditioning = system.conditioning
        except ValueError as error:
            raise ValueError(f"system {system.name!r}: {error}") from None
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


def save_pictures(folder: Path, pictures: Sequence[Sequence[Image.Image]], drawing: Drawing) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(pictures):
        for seed, picture in zip(drawing.seeds, own, strict=True):
            picture.save(folder / f"{number:05d}-seed{seed}.png")
