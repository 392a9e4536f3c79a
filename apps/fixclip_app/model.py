"""The models behind the page, and the systems that it compares."""

import contextlib
import copy
import json
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fixclip_cli.generate import default_size
from fixclip_cli.models import ModelOptions, base_options, has_adapter, has_lora, load_pipeline
from fixclip_core.scenes import long_caption, sample_scene
from fixclip_diffusion import TextAdapter, TokenReport, builtin
from fixclip_diffusion.attention_maps import record_sentences
from fixclip_diffusion.auto import LongPromptPipeline, pipeline_of
from fixclip_diffusion.loading import convert_stock, load_own_encoder
from fixclip_diffusion.prompt_reader import PromptReader
from fixclip_diffusion.tiny import stable_diffusion, train_tokenizer

SCENES_FLAG = "_scenes_world"
MOST_COLUMNS = 5
UNTRAINED = {
    "stock": "Stock, cut at 77 tokens",
    "chunks": "Base encoder in windows of 77",
    "overlap": "Base encoder in overlapping windows",
}

EXAMPLES = (
    "A wooden table stands by the window. On the left there is a blue vase with three yellow tulips, and next to "
    "it lies an open book with a red ribbon between its pages. Behind the book a white cat is asleep on a folded "
    "green blanket. On the right a copper kettle catches the evening light, and beside it wait two small cups of "
    "tea. A brass clock on the wall shows a quarter past five. Under the table a brown dog looks up at the cat, "
    "and in the doorway, at the far end of the room, a girl in an orange coat holds a paper kite.",
    "A small harbour on a clear winter morning. In the foreground a red fishing boat lies tied to a stone pier, and "
    "two gulls sit on it. Behind it three white sailing boats rock on dark green water. On the left an old man in a "
    "yellow oilskin mends a net, with a black dog asleep at his feet. A row of narrow houses stands along the "
    "quay: the first is pink, the second pale green, the third white with blue shutters. Above their roofs rises a "
    "square church tower with a golden weathercock. Far out, where the sea meets the sky, a single ship with brown "
    "sails passes a small lighthouse, and over everything hangs a thin moon.",
    "A botanist's desk seen from above. In the middle lies an open notebook with a pencil drawing of a fern. At the "
    "top left stands a glass jar with tadpoles, and at the top right a brass microscope on a green cloth. Left of "
    "the notebook there are five pressed leaves in a row, from yellow to dark red. To the right lie a magnifying glass "
    "with a wooden handle and a pair of round spectacles. Along the lower edge runs a ruler, and on it a ladybird "
    "walks towards a half-eaten apple. A cup of black coffee has left a ring on a letter in the bottom right corner, "
    "and the sunlight of a late afternoon falls across all of it from the left.",
)


@dataclass(frozen=True)
class ModelChoice(ModelOptions):
    """Which model the page shows.

    `scenes` says that it draws the scenes world, so that the checker can judge its pictures; None reads
    `"_scenes_world": true` from the base's model_index.json. `notice` is told to visitors.
    """

    scenes: bool | None = None
    notice: str = ""
    name: str = ""


@contextmanager
def default_choice() -> Iterator[ModelChoice]:
    """The one place that decides what opens when no model is named; its folder may be gone after the block."""
    if builtin.is_available():
        yield ModelChoice(builtin.SCENES)
        return
    with tempfile.TemporaryDirectory() as folder:
        captions = [long_caption(sample_scene(i), i).text for i in range(50)]
        stable_diffusion(train_tokenizer([*EXAMPLES, *captions], vocab_size=2048)).save_pretrained(folder)
        yield ModelChoice(
            base=folder,
            name="a tiny random model",
            notice="This model has random weights: **its pictures are noise.** The page shows what is read of a "
            "prompt; name a real model with `--base`, `--encoder` and `--adapter` to see what is drawn.",
        )


@dataclass(frozen=True)
class System:
    """One way to read a prompt: `draw` takes the arguments of the pipeline and runs `pipe`; `options` would load it."""

    label: str
    pipe: LongPromptPipeline
    draw: Callable[..., Any]
    options: ModelOptions


class DemoModel:
    """A pipeline on one device, with the systems that the page compares. Not for two threads at once.

    Raises:
        ValueError: a component cannot be loaded or does not fit.
    """

    def __init__(self, choice: ModelChoice, device: str):
        self.pipe = load_pipeline(choice, device)
        self.pipe.set_progress_bar_config(disable=True)
        self.choice = choice
        parts = (choice.base, choice.encoder, choice.encoder_2, choice.adapter)
        self.name = choice.name or " + ".join(part for part in parts if part and part != builtin.NO_ADAPTER)
        self.notice = choice.notice
        self.scenes = choice.scenes if choice.scenes is not None else draws_scenes(choice.base)
        self.has_lora = has_lora(self.pipe)
        systems = self._untrained_systems(device) | self._own_systems()
        if len(systems) > MOST_COLUMNS:  # the encoder without its adapter says least
            del systems["encoder"]
        self.systems = systems
        self._reader, self._lock = self._own_reader(), threading.Lock()

    def _own_reader(self) -> PromptReader:
        """What reads prompts as `pipe` does, of its own: comparisons take off the encoder's adapter while they draw."""
        first = self.pipe.prompt_encoder.encodings[0]
        return PromptReader(
            copy.deepcopy(first.tokenizer),
            first.context,
            self.pipe.prompt_encoder.conditioning,
            self.choice.weights,
            copy.copy(first.encoder.config.adapter),
        )

    def _with(self, **components: Any) -> LongPromptPipeline:
        """The pipeline with other components."""
        options: dict[str, Any] = {"conditioning": self.choice.conditioning, "weights": self.choice.weights}
        if "text_encoder" in components:
            options["conditioning"] = None
        parts = {**self.pipe.components, **components}
        zeros = bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))
        pipe = pipeline_of(self.pipe.family, parts, zeros, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _reference(self, device: str) -> LongPromptPipeline:
        """The pipeline with the base's own encoders. Without LoRAs of the user's it shares all else with `pipe`."""
        plain = base_options(self.choice)
        chosen = {"text_encoder": self._encoder_name, "text_encoder_2": self.choice.encoder_2}
        towers = [tower for tower in self.pipe.family.towers if chosen[tower.encoder] is not None]
        if not towers:
            return self.pipe
        if self.choice.loras or self.choice.embeddings:
            pipe = load_pipeline(plain, device)
            pipe.set_progress_bar_config(disable=True)
            return pipe
        dtype = self.pipe.unet.dtype
        own = {tower.encoder: load_own_encoder(plain.base, tower, dtype).to(device) for tower in towers}
        return self._with(**convert_stock(self.pipe.family, self.pipe.components, own, {}))

    @property
    def _encoder_name(self) -> str | None:
        """The encoder that is not the base's own."""
        return builtin.complete(self.choice.base, self.choice.encoder).encoder

    def _untrained_systems(self, device: str) -> dict[str, System]:
        """What needs no training, on the base's own encoder, and the adapter for overlapping windows if any."""
        reference, plain = self._reference(device), base_options(self.choice)
        if not reference.text_encoder.short_context_length:
            return {}
        systems = {}
        for key, label in UNTRAINED.items():
            options = replace(plain, conditioning=key)
            systems[key] = System(label, reference, self._with_adapter(reference, None, conditioning=key), options)
        whole = builtin.whole_model(self.choice.base)
        if whole is not None and whole.overlap_adapter is not None and self._encoder_name is not None:
            adapter = TextAdapter.from_pretrained(whole.overlap_adapter).to(device, self.pipe.unet.dtype).eval()
            options = replace(plain, adapter=whole.overlap_adapter, conditioning="overlap")
            draw = self._with_adapter(reference, adapter, conditioning="overlap")
            systems["overlap_adapter"] = System("Overlapping windows + adapter", reference, draw, options)
        return systems

    def _own_systems(self) -> dict[str, System]:
        """The encoder of the model's own or of the user's choice, alone and with all that belongs to it."""
        encoder, systems = self.pipe.text_encoder, {}
        named, second, trained = self._encoder_name, self.choice.encoder_2, encoder.is_trained
        chosen = named is not None or second is not None
        name = "Trained encoder" if trained else "Chosen encoder" if chosen else UNTRAINED[self.pipe.conditioning]
        parts = ["adapter"] if has_adapter(self.pipe) else []
        parts += ["LoRA"] if self.has_lora else []
        if chosen or trained:
            plain, how = base_options(self.choice), self.choice.conditioning
            options = replace(plain, encoder=named, encoder_2=second, conditioning=how)
            systems["encoder"] = System(name, self.pipe, self._with_adapter(self.pipe, None), options)
        if parts:
            systems["adapter"] = System(" + ".join([name, *parts]), self.pipe, self.pipe, self.choice)
        return systems

    def _with_adapter(self, pipe: LongPromptPipeline, adapter: TextAdapter | None, **fixed: Any) -> Callable[..., Any]:
        """The pipeline with this adapter or none in its first encoder, none in a second one, and the model's LoRA
        switched off, in each call."""
        shares_lora = self.has_lora and pipe.unet is self.pipe.unet

        def draw(**arguments: Any) -> Any:
            encoders, unet = [encoding.encoder for encoding in pipe.prompt_encoder.encodings], pipe.unet
            own = [encoder.adapter for encoder in encoders]
            for encoder in encoders:
                encoder.set_adapter_module(adapter if encoder is encoders[0] else None)
            if shares_lora:
                unet.disable_lora()
            try:
                return pipe(**fixed, **arguments)
            finally:
                for encoder, before in zip(encoders, own, strict=True):
                    encoder.set_adapter_module(before)
                if shares_lora:
                    unet.enable_lora()

        return draw

    def token_report(self, prompt: str) -> TokenReport:
        """`pipe.token_report`, from any thread while the pipeline draws: tokenizers are not for two at once."""
        with self._lock:
            return self._reader.report(prompt)

    @property
    def best(self) -> System:
        """The whole method, which Generate uses."""
        return list(self.systems.values())[-1]

    @property
    def default_size(self) -> tuple[int, int]:
        width, height = default_size(self.pipe)
        return max(64, width), max(64, height)

    @property
    def default_guidance(self) -> float:
        """What the miniatures of the scenes world draw best with is too little for Stable Diffusion."""
        return 2.0 if self.scenes else 7.5

    def examples(self) -> list[str]:
        """Long prompts to click: captions of the world for a scenes model."""
        if not self.scenes:
            return list(EXAMPLES)
        return [long_caption(sample_scene(f"example {i}", num_objects=9), i).text for i in range(3)]

    def draw(
        self,
        system: System,
        *,
        seed: int,
        on_step: Callable[[int], None],
        heat_maps: bool = False,
        **arguments: Any,
    ) -> tuple[Image.Image, torch.Tensor | None]:
        """One picture, and the maps (S, H, W) of the prompt's sentences if asked for.

        Args:
            system: one of `systems`.
            seed: of the starting noise, drawn on the CPU: the same on every device and for every system.
            on_step: called after each step with its number; what it raises ends the work.
            heat_maps: whether to record cross-attention.
            **arguments: of the pipeline.
        """

        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(index + 1)
            return tensors

        recording: Any = contextlib.nullcontext()
        if heat_maps:
            recording = record_sentences(system.pipe, arguments["prompt"], arguments["width"], arguments["height"])
        with recording as recorder:
            image = system.draw(
                generator=torch.Generator("cpu").manual_seed(seed), callback_on_step_end=after_step, **arguments
            ).images[0]
        return image, recorder.maps()[0].cpu() if heat_maps else None


def draws_scenes(base: str) -> bool:
    """Whether model_index.json says that the model draws the scenes world."""
    base = builtin.resolve(builtin.base_of(base))
    return bool(StableDiffusionPipeline.load_config(base).get(SCENES_FLAG, False))


def mark_as_scenes(folder: str | Path) -> None:
    """Record in a model folder that it draws the scenes world; diffusers loads the folder as before."""
    file = Path(folder) / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), SCENES_FLAG: True}, indent=2) + "\n")


class DevicePool:
    """One model per device, lent to one job at a time."""

    def __init__(self, models: list[DemoModel]):
        self.models = models
        self._free: queue.SimpleQueue[DemoModel] = queue.SimpleQueue()
        for model in models:
            self._free.put(model)

    @contextmanager
    def borrow(self, check_stopped: Callable[[], None]) -> Iterator[DemoModel]:
        """Wait for a free device; a job that was told to stop does not wait on."""
        while True:
            check_stopped()
            try:
                model = self._free.get(timeout=0.2)
                break
            except queue.Empty:
                continue
        try:
            check_stopped()
            yield model
        finally:
            self._free.put(model)
