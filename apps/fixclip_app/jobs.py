"""What visitors may ask for, and the work itself: in a thread, one job at a time per device, stopped within a step."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qs

import torch
from PIL import Image

from fixclip_cli.generate import describe_model
from fixclip_diffusion.attention_maps import sentence_positions
from fixclip_diffusion.preview import watch_steps

from .model import DemoModel, DevicePool, System


@dataclass(frozen=True)
class Limits:
    """The most that one visitor may ask for."""

    characters: int = 20_000
    tokens: int = 992
    steps: int = 100
    guidance_scale: float = 30.0
    side: int = 1024
    images: int = 4
    seed: int = 2**32 - 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides a picture."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    width: int
    height: int
    seed: int
    num_images: int = 1
    heat_maps: bool = False


def check_settings(values: dict[str, Any], model: DemoModel, limits: Limits) -> Settings:
    """Settings from whatever a visitor sent.

    Raises:
        ValueError: says which value is wrong and what is valid.
    """
    for name in ("prompt", "negative_prompt"):
        _check_text(name.replace("_", " "), values[name], model, limits)
    if not values["prompt"].strip():
        raise ValueError("The prompt is empty: write what the picture should show.")
    whole = {
        "steps": (1, limits.steps),
        "width": (16, limits.side),
        "height": (16, limits.side),
        "seed": (0, limits.seed),
        "num_images": (1, limits.images),
    }
    clean = dict(values)
    for name, (least, most) in whole.items():
        clean[name] = int(_number(name, values.get(name, 1), least, most, whole=True))
    for name in ("width", "height"):
        if clean[name] % 8:
            raise ValueError(f"{name} is {clean[name]}: it must be a multiple of 8, like {clean[name] // 8 * 8}.")
    clean["guidance_scale"] = _number("guidance_scale", values["guidance_scale"], 0, limits.guidance_scale)
    if not isinstance(values.get("heat_maps", False), bool):
        raise ValueError(f"heat maps is {str(values['heat_maps'])[:40]!r}: it must be true or false.")
    return Settings(**clean)


def _check_text(name: str, text: Any, model: DemoModel, limits: Limits) -> None:
    if not isinstance(text, str):
        raise ValueError(f"The {name} must be text.")
    if len(text) > limits.characters:
        raise ValueError(f"The {name} has {len(text):,} characters; this page takes at most {limits.characters:,}.")
    num_tokens, most = model.token_report(text).num_tokens, limits.tokens
    if num_tokens > most:
        raise ValueError(f"The {name} has {num_tokens:,} tokens; this page takes at most {most:,}.")


def _number(name: str, value: Any, least: float, most: float, whole: bool = False) -> float:
    words = name.replace("_", " ")
    valid = f"it must be {'a whole' if whole else 'a'} number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        said = "empty" if value is None else repr(str(value)[:40])
        raise ValueError(f"{words} is {said}: {valid}.")
    if (whole and value != int(value)) or not least <= value <= most:
        raise ValueError(f"{words} is {value}: {valid}.")
    return value


def settings_from_link(fragment: str, defaults: dict[str, Any], model: DemoModel, limits: Limits) -> dict[str, Any]:
    """The values in a link's fragment; what is missing or not valid keeps its default."""
    values, sent = dict(defaults), {}
    with contextlib.suppress(ValueError):  # too many fields
        sent = parse_qs(fragment.removeprefix("#")[: 4 * limits.characters], keep_blank_values=True, max_num_fields=50)
    for name, default in defaults.items():
        if name not in sent:
            continue
        text = sent[name][0]
        with contextlib.suppress(ValueError):
            value: Any = text
            if isinstance(default, bool):
                value = text == "true"
            elif isinstance(default, int):
                value = int(text)
            elif isinstance(default, float):
                value = float(text)
            # An empty prompt is no job, but a fine state of the page.
            empty = name == "prompt" and not text.strip()
            check_settings({**values, "prompt": "a", **({} if empty else {name: value})}, model, limits)
            values[name] = value
    return values


class StoppedError(Exception):
    """The visitor pressed Stop."""


@dataclass(frozen=True)
class Progress:
    """How far the work is: steps of all pictures together, and sometimes a preview of the current one."""

    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Picture:
    """A finished picture. `sentences` and `maps` (S, H, W) are there if heat maps were asked for."""

    image: Image.Image
    label: str
    system: str
    settings: dict[str, Any]
    sentences: tuple[str, ...] = ()
    maps: torch.Tensor | None = None


Event = Progress | Picture
Emit = Callable[[Event], None]


async def run(
    pool: DevicePool, work: Callable[[DemoModel, Emit], None], is_wanted: Callable[[], bool] = lambda: True
) -> AsyncGenerator[Event, None]:
    """Do `work` in a thread on a free device and pass on what it emits.

    When the iteration is closed or cancelled, the work ends at its next `emit`; nobody waits for it. It ends there, or
    while it waits for a device, also once `is_wanted` says no.

    Raises:
        ValueError: out of memory, nobody wants the result, and what `work` raises.
    """
    loop, stopped = asyncio.get_running_loop(), threading.Event()
    events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    def check_wanted() -> None:
        if stopped.is_set():
            raise StoppedError
        if not is_wanted():
            raise ValueError("Nobody waited for this result any more, so it was not drawn.")

    def send(event: Event | Exception | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def emit(event: Event) -> None:
        check_wanted()
        send(event)

    def body() -> None:
        try:
            with pool.borrow(check_wanted) as model:
                work(model, emit)
            send(None)
        except StoppedError:
            pass
        except Exception as error:
            send(readable(error))

    threading.Thread(target=body, daemon=True, name="fixclip-job").start()
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stopped.set()


def readable(error: Exception) -> Exception:
    """Running out of memory as a ValueError that says what to do; every other error as it is."""
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in text for said in words):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ValueError("Out of memory: try a smaller size, or without heat maps.")
    return error


def generate(settings: Settings, model: DemoModel, emit: Emit) -> None:
    """Picture i starts from seed + i."""
    total = settings.steps * settings.num_images
    for index in range(settings.num_images):
        emit(_draw(model, model.best, settings, settings.seed + index, index * settings.steps, total, emit))


def compare(settings: Settings, model: DemoModel, emit: Emit) -> None:
    """Every system draws from the same seed."""
    total = settings.steps * len(model.systems)
    for index, system in enumerate(model.systems.values()):
        emit(_draw(model, system, settings, settings.seed, index * settings.steps, total, emit))


def _draw(
    model: DemoModel, system: System, settings: Settings, seed: int, done: int, total: int, emit: Emit
) -> Picture:
    with steps_with_previews(system, done, total, emit) as on_step:
        image, maps = model.draw(
            system,
            seed=seed,
            on_step=on_step,
            heat_maps=settings.heat_maps,
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt or None,  # Stable Diffusion XL has zeros for none
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            width=settings.width,
            height=settings.height,
        )
    sentences: tuple[str, ...] = ()
    if maps is not None:
        found = sentence_positions(system.pipe.prompt_encoder, settings.prompt)
        sentences = tuple(sentence.text for sentence in found)
    recorded = {name: value for name, value in asdict(settings).items() if name not in ("num_images", "heat_maps")}
    recorded |= {"seed": seed, "size": (settings.width, settings.height), **describe_model(system.options, system.pipe)}
    recorded |= {"base": model.choice.name or system.options.base, "system": system.label}
    label = f"{system.label}, seed {seed}"
    return Picture(image, label, system.label, recorded, sentences, maps)


@contextlib.contextmanager
def steps_with_previews(
    system: System, done: int, total: int, emit: Emit, pause: float = 0.25
) -> Iterator[Callable[[int], None]]:
    """A callback for `DemoModel.draw` that reports steps; previews may take a fifth of the time at most."""
    last, cost, possible = time.monotonic(), 0.0, True
    with watch_steps(system.pipe) as preview:

        def on_step(step: int) -> None:
            nonlocal last, cost, possible
            start, image = time.monotonic(), None
            if possible and start - last >= max(pause, 4 * cost):
                try:
                    image = preview.image()
                except ValueError:  # a scheduler that tells no prediction
                    possible = False
                last = time.monotonic()
                cost = last - start
            emit(Progress(done + step, total, image))

        yield on_step
