"""Several systems draw the same prompts from the same noise, or pictures made elsewhere are taken in.

Each picture is a PNG file that says in its metadata what it was drawn of, so a run that was stopped draws what is
missing and nothing twice, and a picture of another prompt is found out.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from fixclip_core.check import check_folder_or_hub_name, split_scale
from fixclip_core.files import write_atomically
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.adapter_training.features import write_attention_out
from fixclip_diffusion.auto import LongPromptPipeline, load_plain_pipeline
from fixclip_diffusion.conditioning import get_conditioning
from fixclip_diffusion.evaluation.benchmarks import Layout, picture_stem, plain_picture
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.fingerprint import check_made_for, fingerprint
from fixclip_diffusion.lora import load_loras
from fixclip_diffusion.prompt_reader import PromptReader

SYSTEM_KEYS = ("encoder", "encoder_2", "adapter", "lora", "conditioning", "pipeline", "pictures")
OLD_KEYS = {"long_prompt": "conditioning"}  # of version 0.1
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
METADATA = "fixclip"  # key of a PNG's text that holds what it was drawn of
_WEIGHTS = frozenset([".safetensors", ".bin", ".pt", ".pth", ".ckpt"])


@dataclass(frozen=True)
class System:
    """A way to turn prompts into pictures.

    Attributes:
        name: for tables and folders.
        encoder: text encoder, a folder, hub or built-in name; None for the base's own, stretched.
        adapter: folder, hub or built-in name of an adapter; None for the encoder's own, if any.
        lora: what `load_lora_weights` reads, or a built-in name, and its weight as `SOURCE:0.7`; None for none.
        conditioning: how prompts are read, see `FixClipStableDiffusionPipeline`; None: as encoder or adapter say.
        pipeline: any diffusers text-to-image pipeline, folder or hub name, drawn with as it is; it takes a lora alone.
        pictures: folder of pictures made elsewhere, named as the benchmark says; nothing is drawn.
        encoder_2: the second text encoder of Stable Diffusion XL, as `encoder`.

    Raises:
        ValueError: a name that cannot be a folder's, an unknown conditioning, or parts that exclude each other.
    """

    name: str
    encoder: str | None = None
    adapter: str | None = None
    lora: str | None = None
    conditioning: str | None = None
    pipeline: str | None = None
    pictures: str | None = None
    encoder_2: str | None = None

    def __post_init__(self) -> None:
        given = [key for key in SYSTEM_KEYS if getattr(self, key) is not None]
        allowed = {"pipeline": ("pipeline", "lora"), "pictures": ("pictures",)}
        for key, others in allowed.items():
            if key in given and (more := [name for name in given if name not in others]):
                raise ValueError(f"system {self.name!r}: {key} and {more[0]} exclude each other")
        if not re.fullmatch(r"[\w+. -]+", self.name):
            raise ValueError(f"system {self.name!r}: a name has letters, digits, spaces and _ + . - only")
        if self.conditioning is not None:
            try:
                object.__setattr__(self, "conditioning", get_conditioning(self.conditioning).name)
            except ValueError as error:
                raise ValueError(f"system {self.name!r}: {error}") from None

    def check_names(self) -> None:
        """Refuse a part that is neither here nor could be on the hub, before anything is loaded.

        Raises:
            ValueError: names the part.
        """
        for key in ("encoder", "encoder_2", "adapter", "lora", "pipeline"):
            name = getattr(self, key)
            if name is not None:
                name = split_scale(name)[0] if key == "lora" else name
                or_file = key in ("encoder", "encoder_2", "lora")
                check_folder_or_hub_name(f"system {self.name!r}: {key}", builtin.resolve(name), or_file=or_file)


def default_systems(
    base: str, encoder: str | None, adapter: str | None, lora: str | None, encoder_2: str | None = None
) -> list[System]:
    """The base read by every conditioning, then ours as far as its parts are given.

    A name says how prompts are read and what is added to the text encoder: `one_pass` (of the named encoder, if there
    is one), `overlap+adapter`, `one_pass+adapter+lora`.

    Raises:
        ValueError: a part is unknown or damaged, or they do not go together.
    """
    systems = [System(name, conditioning=name) for name in ("stock", "chunks", "overlap")]
    systems.append(System("one_pass", encoder, conditioning="one_pass", encoder_2=encoder_2))
    if adapter is not None or lora is not None:
        how = PromptReader.from_pretrained(base, encoder, adapter, encoder_2=encoder_2).conditioning.name
        if adapter is not None:
            how = f"{how}+adapter"
            systems.append(System(how, encoder, adapter, encoder_2=encoder_2))
        if lora is not None:
            systems.append(System(f"{how}+lora", encoder, adapter, lora, encoder_2=encoder_2))
    return systems


def parse_system(text: str) -> System:
    """`NAME`, or `NAME:KEY=VALUE,...` with `pipeline` and `lora`, or with the other keys of `SYSTEM_KEYS`.

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


def parse_source(key: str, text: str) -> System:
    """`SOURCE` or `NAME=SOURCE` of a pipeline or a folder of pictures; the source's last part is a name, too.

    Raises:
        ValueError: no source, or a bad name.
    """
    name, equals, source = text.partition("=")
    if not equals:
        name, source = re.sub(r"[^\w+. -]", "_", Path(text).name), text
    if not source:
        raise ValueError(f"--{key} {text!r}: expected NAME=SOURCE or SOURCE")
    return System(name, pipeline=source) if key == "pipeline" else System(name, pictures=source)


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


def _check_draws(system: System, pipeline_class: type | None) -> None:
    """Refuse a pipeline that takes no prompt; of a class that is not known here nothing is said.

    Raises:
        ValueError: it takes none.
    """
    if pipeline_class is None:
        return
    if "prompt" not in inspect.signature(pipeline_class.__call__).parameters:
        raise ValueError(f"system {system.name!r}: {pipeline_class.__name__} draws nothing from a prompt")


class Painter:
    """Loads the base once and puts each system's parts into it.

    Args:
        base: Stable Diffusion 1.x, 2.x or XL, folder or hub name; of a whole model its base.
        device, dtype: where and in what precision to draw.
    """

    def __init__(self, base: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.base, self.device, self.dtype = builtin.base_of(base), torch.device(device), dtype
        self.release()

    def release(self) -> None:
        """Let go of the base's modules, so that a judge has the GPU to itself."""
        self.shared: dict[str, Any] = {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self, system: System) -> None:
        """Find out whether the system can be loaded, before hours of drawing.

        Raises:
            ValueError: a part cannot be loaded, does not fit the base, or the adapter was made for another encoder.
        """
        if system.pictures is not None:
            if not Path(system.pictures).exists():
                raise ValueError(f"system {system.name!r}: no pictures in {system.pictures!r}")
        elif system.pipeline is not None:
            try:
                index = DiffusionPipeline.load_config(system.pipeline)  # loading FLUX twice would take minutes
            except Exception as error:
                raise ValueError(
                    f"system {system.name!r}: {system.pipeline!r} is no diffusers pipeline: {_first_line(error)}"
                ) from error
            _check_draws(system, getattr(diffusers, str(index.get("_class_name")), None))
        else:
            with self.pipeline(system):
                pass

    @contextmanager
    def pipeline(self, system: System) -> Iterator[Any]:
        """The system's pipeline.

        Raises:
            ValueError: see `check`.
        """
        pipe = self._load_own(system) if system.pipeline is None else self._load_other(system)
        pipe.set_progress_bar_config(disable=True)
        if system.lora is None:
            yield pipe
            return
        try:
            load_loras(pipe, [system.lora])
        except ValueError as error:
            raise ValueError(f"system {system.name!r}: {error}") from error
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()

    def _load_own(self, system: System) -> LongPromptPipeline:
        encoders = {"encoder": system.encoder, "encoder_2": system.encoder_2}
        pipe = load_plain_pipeline(self.base, **encoders, dtype=torch.float32, **self.shared)
        adapters = pipe._adapters(system.adapter)
        for encoding in pipe.prompt_encoder.encodings:
            source = adapters.get(encoding.tower.encoder)
            if source is not None:
                adapter = TextAdapter.from_pretrained(source)
                check_made_for(Path(builtin.resolve(source)), fingerprint(encoding.encoder, encoding.tokenizer))
                encoding.encoder.set_adapter_module(adapter)
        try:
            pipe.conditioning = system.conditioning
        except ValueError as error:
            raise ValueError(f"system {system.name!r}: {error}") from None
        pipe.to(self.device, self.dtype)
        write_attention_out(pipe.unet, self.device)
        self.shared |= {"vae": pipe.vae, "unet": pipe.unet}
        return pipe

    def _load_other(self, system: System) -> Any:
        dtype = torch.bfloat16 if self.dtype == torch.float16 else self.dtype  # FLUX overflows in float16
        try:
            pipe = DiffusionPipeline.from_pretrained(system.pipeline, dtype=dtype)
        except Exception as error:
            raise ValueError(
                f"system {system.name!r}: {system.pipeline!r} cannot be loaded: {_first_line(error)}"
            ) from error
        _check_draws(system, type(pipe))
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None  # it blackens pictures, and a black picture follows no prompt
        return pipe.to(self.device)

    def draw(self, system: System, prompts: Sequence[Prompt], drawing: Drawing) -> list[list[Image.Image]]:
        """One list of pictures, a picture for each seed, for every prompt."""
        jobs = [(prompt.text, seed) for prompt in prompts for seed in drawing.seeds]
        pictures = dict(self.draw_jobs(system, jobs, drawing))
        size = drawing.num_seeds
        return [[pictures[i + j] for j in range(size)] for i in range(0, len(jobs), size)]

    def draw_jobs(
        self, system: System, jobs: Sequence[tuple[str, int]], drawing: Drawing
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index of a job, its picture) of jobs (prompt, seed), in the order in which they become ready."""
        with self.pipeline(system) as pipe, tqdm(total=len(jobs), desc=system.name, unit="picture") as bar:
            draw = _draw_own if system.pipeline is None else _draw_other
            for batch, images in draw(pipe, jobs, drawing):
                bar.update(len(batch))
                yield from zip(batch, images, strict=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _draw_own(
    pipe: LongPromptPipeline, jobs: Sequence[tuple[str, int]], drawing: Drawing
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    side = drawing.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    call: Any = pipe
    for batch, embeds in _batches(pipe, jobs, drawing):
        images = call(
            **embeds,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            width=side,
            height=side,
            generator=[torch.Generator().manual_seed(jobs[job][1]) for job in batch],
        ).images
        yield batch, images


def _draw_other(
    pipe: Any, jobs: Sequence[tuple[str, int]], drawing: Drawing
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """Any pipeline, called as its users call it: it reads and cuts the prompts itself."""
    options: dict[str, Any] = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance_scale}
    if drawing.size is not None:
        options |= {"width": drawing.size, "height": drawing.size}
    known = inspect.signature(pipe.__call__).parameters
    if drawing.negative_prompt and "negative_prompt" not in known:
        raise ValueError(f"{type(pipe).__name__} takes no negative prompt")
    for start in range(0, len(jobs), drawing.batch_size):
        batch = list(range(start, min(start + drawing.batch_size, len(jobs))))
        own = {name: value for name, value in options.items() if name in known}
        if drawing.negative_prompt:
            own["negative_prompt"] = [drawing.negative_prompt] * len(batch)
        generators = [torch.Generator().manual_seed(jobs[job][1]) for job in batch]
        yield batch, pipe(prompt=[jobs[job][0] for job in batch], generator=generators, **own).images


def _batches(
    pipe: LongPromptPipeline, jobs: Sequence[tuple[str, int]], drawing: Drawing
) -> Iterator[tuple[list[int], dict[str, Tensor | None]]]:
    """Jobs that are drawn together and their embeds, as arguments of the pipeline; only embeds of equal length are
    stacked."""
    groups: dict[int, list[tuple[int, tuple[Tensor | None, ...]]]] = {}
    before, states = None, None
    encode: Any = pipe.encode_prompt
    for job, (text, _) in enumerate(jobs):
        if text != before:  # the seeds of a prompt come one after another
            with torch.no_grad():
                states = encode(
                    text,
                    device=pipe.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=drawing.guidance_scale > 1,
                    negative_prompt=drawing.negative_prompt or None,  # Stable Diffusion XL has zeros for none
                )
            before = text
        assert states is not None
        group = groups.setdefault(states[0].shape[1], [])
        group.append((job, states))
        if len(group) == drawing.batch_size:
            yield _stack(groups.pop(states[0].shape[1]))
    for group in groups.values():
        yield _stack(group)


def _stack(group: Sequence[tuple[int, tuple[Tensor | None, ...]]]) -> tuple[list[int], dict[str, Tensor | None]]:
    jobs, states = zip(*group, strict=True)
    columns = [[part for part in column if part is not None] for column in zip(*states, strict=True)]
    stacked = [torch.cat(column) if column else None for column in columns]
    return list(jobs), dict(zip(EMBEDS, stacked, strict=False))  # Stable Diffusion 1 and 2 have no pooled vectors


# -- pictures on disk ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt: a file, or the part of a 2 x 2 grid.

    Attributes:
        path: the file, or None where it is missing.
        seed: of its noise; with pictures made elsewhere, their number.
        tile: 0 to 3 of a grid in reading order, None for the whole file.
    """

    path: Path | None
    seed: int
    tile: int | None = None

    def load(self) -> Image.Image:
        """RGB.

        Raises:
            OSError: the file is missing or damaged.
        """
        if self.path is None:
            raise FileNotFoundError("the picture is missing")
        with Image.open(self.path) as file:
            image = file.convert("RGB")
        if self.tile is None:
            return image
        width, height = image.width // 2, image.height // 2
        left, top = self.tile % 2 * width, self.tile // 2 * height
        return image.crop((left, top, left + width, top + height))


def drawn_of(
    system: System, prompt: Prompt, seed: int, drawing: Drawing, base: str = "", weights: dict[str, str] | None = None
) -> dict[str, Any]:
    """What a picture is drawn of: all that its pixels depend on, except for the batch size, which rounds.

    Args:
        system, prompt, seed, drawing, base: as they are drawn.
        weights: see `weights_of`.
    """
    settings = {key: value for key, value in asdict(drawing).items() if key not in ("seed", "num_seeds", "batch_size")}
    parts = {"base": base, **asdict(system)} if system.pipeline is None else asdict(system)
    return {"prompt": prompt.text, "seed": seed, **settings, "system": parts, "weights": weights or {}}


def weights_of(system: System, base: str) -> dict[str, str]:
    """{part of a system: SHA-256 of its files}, of those that are files here: a training may go on in its folder.

    Checkpoints of a training's folder do not count; nothing draws with them.
    """
    sources = {key: getattr(system, key) for key in ("encoder", "encoder_2", "adapter", "lora", "pipeline")}
    sources |= {"base": base if system.pipeline is None else None}
    found = {}
    for part, source in sources.items():
        if source is None:
            continue
        path = Path(builtin.resolve(split_scale(source)[0] if part == "lora" else source))
        if files := sorted(_weight_files(path)):
            digest = hashlib.sha256()
            for file in files:
                digest.update(_file_digest(file, file.stat().st_size, file.stat().st_mtime_ns))
            found[part] = digest.hexdigest()
    return found


@cache  # systems share a base of gigabytes
def _file_digest(path: Path, size: int, changed_ns: int) -> bytes:
    """SHA-256 of a file, read once as long as its size and time of change stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _weight_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for file in path.rglob("*") if path.is_dir() else ():
        if file.suffix in _WEIGHTS and "checkpoints" not in file.relative_to(path).parts:
            yield file


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What a picture says that it was drawn of; None if it says nothing.

    Raises:
        OSError: no such file, or not a whole picture.
    """
    with Image.open(path) as image:
        image.load()
        text = getattr(image, "text", {}).get(METADATA)
    return None if text is None else json.loads(text)


def own_pictures(folder: Path, prompt: Prompt, drawing: Drawing) -> list[Picture]:
    """Where this run keeps a system's pictures of a prompt, drawn or not."""
    return [Picture(folder / f"{picture_stem(prompt)}-seed{seed}.png", seed) for seed in drawing.seeds]


def draw_missing(
    painter: Painter, system: System, prompts: Sequence[Prompt], drawing: Drawing, folder: Path
) -> tuple[int, int]:
    """Draw what `folder` lacks; each picture is there whole or not at all.

    Returns:
        How many were drawn, and how many were there.

    Raises:
        ValueError: a picture there was drawn of another prompt or otherwise.
    """
    jobs = []
    kept = 0
    weights = weights_of(system, painter.base)
    for prompt in prompts:
        for picture in own_pictures(folder, prompt, drawing):
            assert picture.path is not None
            if _is_drawn(picture.path, drawn_of(system, prompt, picture.seed, drawing, painter.base, weights)):
                kept += 1
            else:
                jobs.append((prompt, picture))
    if not jobs:
        return 0, kept
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(prompt.text, picture.seed) for prompt, picture in jobs]
    for index, image in painter.draw_jobs(system, texts, drawing):
        prompt, picture = jobs[index]
        assert picture.path is not None
        save_picture(picture.path, image, drawn_of(system, prompt, picture.seed, drawing, painter.base, weights))
    return len(jobs), kept


def save_picture(path: Path, image: Image.Image, metadata: dict[str, Any]) -> None:
    """Write a PNG with what it was drawn of, atomically."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA, json.dumps(metadata, ensure_ascii=False))
    write_atomically(path, lambda partial: image.save(partial, format="png", pnginfo=info))


def _is_drawn(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the picture is there; a damaged one is not."""
    try:
        found = read_metadata(path)
    except OSError:
        return False
    found = found or {}
    if found in (
        wanted,
        {key: value for key, value in wanted.items() if key != "weights"},
    ):  # the latter of version 0.2
        return True
    differing = next((key for key in wanted if found.get(key) != wanted[key]), "metadata")
    what = f"another {differing} ({_short(found.get(differing))} instead of {_short(wanted[differing])})"
    if differing == "weights":
        parts = sorted(dict(found[differing].items() ^ wanted[differing].items()))
        what = f"other weights of the {' and the '.join(parts)}, which changed since"
    raise ValueError(f"{path}: drawn with {what}; choose another --output, or delete the pictures to draw them anew")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def find_pictures(
    root: Path, prompts: Sequence[Prompt], drawing: Drawing, layout: Layout | None, partial: bool
) -> list[list[Picture]]:
    """The pictures of each prompt in a folder made elsewhere, named as the benchmark says.

    Args:
        root: the folder, or GenEval 2's JSON file.
        prompts: all prompts of the benchmark.
        drawing: how many pictures each has; where the layout has grids, more than one are tiles of one file.
        layout: of the benchmark; None for prompts of one's own, whose pictures are ID.png or ID-seedN.png.
        partial: let pictures be missing, as long as there is one.

    Raises:
        ValueError: no picture, some are missing although `partial` is not set, or one says that it was drawn of another
            prompt.
    """
    grid = layout is not None and layout.grid and drawing.num_seeds > 1
    if grid and drawing.num_seeds > 4:
        raise ValueError(
            f"{drawing.num_seeds} pictures of a prompt: a grid of {layout.title if layout else ''} holds 4"
        )
    find = layout.picture if layout is not None else plain_picture
    found = []
    for prompt in prompts:
        paths = [find(root, prompt, seed) for seed in drawing.seeds]
        found.append(
            [Picture(p, s, n if grid else None) for n, (p, s) in enumerate(zip(paths, drawing.seeds, strict=True))]
        )
    missing = [p.id for p, own in zip(prompts, found, strict=True) if any(picture.path is None for picture in own)]
    if len(missing) == len(prompts):
        raise ValueError(f"{root}: no picture of any of the {len(prompts)} prompts, e.g. none of {missing[0]!r}")
    if missing and not partial:
        raise ValueError(
            f"{root}: pictures of {len(missing)} of {len(prompts)} prompts are missing, e.g. of "
            f"{', '.join(missing[:3])}; with --partial they count 0 and are listed"
        )
    _check_prompts(prompts, found)
    return found


def _check_prompts(prompts: Sequence[Prompt], found: Sequence[Sequence[Picture]]) -> None:
    for prompt, own in zip(prompts, found, strict=True):
        for picture in own:
            try:
                metadata = read_metadata(picture.path) if picture.path is not None else None
            except OSError as error:
                raise ValueError(f"{picture.path}: not a picture, or damaged: {error}") from None
            if metadata and metadata.get("prompt") != prompt.text:
                raise ValueError(
                    f"{picture.path}: a picture of another prompt, {_short(metadata.get('prompt'))} instead of "
                    f"{_short(prompt.text)}"
                )
