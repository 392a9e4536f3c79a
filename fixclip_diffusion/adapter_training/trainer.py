"""Training the adapter, and on demand a LoRA on the UNet's cross-attention, with everything else frozen."""

import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

from fixclip_core.data.config import READ_SCENES, DataConfig
from fixclip_core.data.loader import (
    Batch,
    Batches,
    Loader,
    any_plain_wording,
    check_wordings,
    open_samples,
    some_captions,
)
from fixclip_core.data.samples import Sample
from fixclip_core.data.sources import Source
from fixclip_core.files import prepare_folder, write_atomically
from fixclip_core.scenes import sheet
from fixclip_core.training.encoder.task import split_batch
from fixclip_core.training.memory import activation_bytes
from fixclip_core.training.metrics import MetricsLog
from fixclip_core.training.optim import check_finite
from fixclip_core.training.trainer import GIB, MIB, START_ANEW, Trainer, batches, changed, this_process
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter, check_fits
from fixclip_diffusion.adapter_training.features import (
    TEACHERS_READING,
    CachedFeatures,
    CachedLatents,
    FeatureCache,
    FrozenModels,
    cache_key,
    empty_states,
    encode_batch,
    picture_transform,
    write_attention_out,
)
from fixclip_diffusion.adapter_training.joined import JoinedAdapter, adapter_folders
from fixclip_diffusion.adapter_training.objectives import Denoiser, Features, adapter_losses, noise_target
from fixclip_diffusion.adapter_training.random_models import random_base
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe, BaseSection, ObjectivesSection
from fixclip_diffusion.auto import load_plain_pipeline, pipeline_of
from fixclip_diffusion.conditioning import CLIP_CONTEXT_LENGTH
from fixclip_diffusion.families import STABLE_DIFFUSION_XL, TextEncoding
from fixclip_diffusion.fingerprint import MADE_FOR, check_made_for, fingerprint
from fixclip_diffusion.loading import load_own_encoder
from fixclip_diffusion.state_mask import mask_empty_states

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
LORA = "lora"
NO_SIZES = {"start_from", "transfer"}  # of the recipe's section; its other fields are the adapter's own
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
SAMPLES = "samples"
CROSS_ATTENTION = r".*attn2\.(to_q|to_k|to_v|to_out\.0)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainable(nn.Module):
    """What is trained: the adapter, and the LoRA's parameters, which the UNet holds too.

    Frozen models are passed to `forward` and not registered here, so that checkpoints and averages stay small.
    """

    def __init__(self, adapter: TextAdapter | JoinedAdapter, lora: Mapping[str, nn.Parameter]):
        super().__init__()
        self.adapter = adapter
        self.lora_names = tuple(lora)
        self.lora = nn.ParameterList(lora.values())

    def forward(self, features: Features, denoiser: Denoiser, objectives: ObjectivesSection) -> dict[str, Tensor]:
        return adapter_losses(self.adapter, features, denoiser, objectives)

    @property
    def adapters(self) -> list[TextAdapter]:
        """One for each text encoder."""
        return self.adapter.adapters if isinstance(self.adapter, JoinedAdapter) else [self.adapter]

    def lora_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in zip(self.lora_names, self.lora, strict=True)}


class AdapterTrainer(Trainer):
    """Trains a `TextAdapter` for each text encoder and, on demand, a LoRA of the UNet; `module` is `Trainable`.

    Args:
        recipe: what to do.
        models: in memory, instead of those that the recipe names.

    Raises:
        ValueError: see `Trainer`, or FSDP or DeepSpeed are to shard the weights.
    """

    recipe: AdapterRecipe
    module: Trainable
    loader: Loader
    frozen: FrozenModels
    denoiser: Denoiser
    resolution: int
    made_for: list[dict[str, str]]  # for each text encoder
    reader: Loader  # of pictures and captions, which `loader` is too where there is no cache
    cache: FeatureCache | None
    cache_bytes = 0  # that the cache lacks

    def __init__(self, recipe: AdapterRecipe, models: FrozenModels | None = None):
        super().__init__(recipe)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"an adapter cannot be trained with {self.accelerator.distributed_type.value}, and is too small to "
                "gain by it; leave that out of Accelerate's config (accelerate config)"
            )
        self.models = models
        self.references: dict[str, list[Image.Image]] = {}

    # -- building --------------------------------------------------------------------------------------------

    def build_model(self) -> Trainable:
        recipe = self.recipe
        given = self.models and replace(self.models, conditioning=recipe.model.conditioning)
        frozen = self.frozen = given or load_frozen(recipe.model)
        check_frozen(frozen, recipe)
        self.made_for = [fingerprint(encoding.encoder, encoding.tokenizer) for encoding in frozen.encodings]
        torch.manual_seed(recipe.seed)  # whatever loading drew from the generators
        adapter = make_adapter(recipe, frozen, self.made_for)
        self.recipe = recipe = recorded_sizes(recipe, adapter)
        place(frozen, self.accelerator.device, DTYPES[recipe.train.precision])
        lora = add_lora(frozen.unet, recipe.lora.rank)
        if recipe.train.gradient_checkpointing:
            frozen.unet.enable_gradient_checkpointing()
        if recipe.train.compile:
            frozen.unet.compile_repeated_blocks()
        self.denoiser = make_denoiser(frozen, bool(lora))
        return Trainable(adapter, lora)

    def open_data(self) -> None:
        self.data = open_samples(data_config(self.recipe, self.batch_size))

    def build_data(self) -> Loader:
        recipe, frozen = self.recipe, self.frozen
        self.resolution = recipe.data.resolution or _own_resolution(frozen)
        self.reader = make_loader(recipe, frozen, self.accelerator, self.batch_size, self.resolution, self.data)
        self.cache = make_cache(recipe, frozen, self.reader, self.resolution)
        if self.cache is not None:
            self.cache_bytes = self._on_main(self._check_cache_fits)
        if self.accelerator.is_main_process:
            captions = some_captions(self.reader.batches)
            if recipe.objectives.weight_plain:
                check_wordings(captions, "objectives.weight_plain", recipe.data.source)
            check_targets(captions, frozen, recipe)
            check_lengths([long for _, long in captions], frozen, recipe)
        return self.reader if self.cache is None else cached_loader(self.reader, self.cache)

    def _check_cache_fits(self) -> int:
        """The bytes that it lacks. The folder is not made: this is asked by --dry-run, too."""
        assert self.cache is not None
        if not self.cache.missing:
            return 0
        folder = self.cache.folder.absolute()
        needed = self.cache.missing_bytes(self.reader.batches, self.frozen)
        way_out = f"choose another features.folder than {str(self.cache.folder)!r}, or leave it out"
        prepare_folder(next(path for path in (folder, *folder.parents) if path.exists()), needed, way_out=way_out)
        return needed

    def is_new(self, name: str) -> bool:
        return name.startswith("lora")

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        return super().no_decay(name, parameter) or "position" in name

    def is_fixed(self, key: str, now: Any, then: Any) -> bool:
        """How captions are read, and an adapter's sizes: with other heads, say, its weights would be read otherwise."""
        section, _, name = key.partition(".")
        is_size = section == "adapter" and name not in NO_SIZES
        return super().is_fixed(key, now, then) or key == "model.conditioning" or is_size

    def check_goes_on(self, checkpoint: Path) -> None:
        """Encoder and tokenizer too must be those that the run was begun with; see `Trainer.check_goes_on`."""
        super().check_goes_on(checkpoint)
        try:
            check_made_for(checkpoint.parent.parent, self._made_for())
        except ValueError as error:
            raise ValueError(f"{error}; or {START_ANEW}") from None

    def start(self) -> None:
        """As any training; write the fingerprint of encoder and tokenizer beside the results, and fill the cache."""
        super().start()
        if self.accelerator.is_main_process:
            _write_made_for(self.folder, self._made_for())
        self.fill_cache()

    def fill_cache(self) -> None:
        """Make what the cache of features lacks, after other trainings that do so; every process calls it.

        Raises:
            ValueError: another training has made it with something else meanwhile.
        """
        cache = self.cache
        if cache is None or not self._on_main(lambda: bool(cache.missing)):
            return
        is_held = cache.folder.resolve() == self.folder.resolve()
        with nullcontext() if is_held else self.locked(cache.folder, wait=True):
            cache.look()
            self.accelerator.wait_for_everyone()  # all have seen the same files missing
            cache.build(self.reader.batches, self.frozen)
            self.accelerator.wait_for_everyone()

    def _made_for(self) -> dict[str, str]:
        """Fingerprints of the encoder, or of both, and their tokenizers."""
        first, *others = self.made_for
        return first | {f"second {name}": digest for part in others for name, digest in part.items()}

    # -- the step --------------------------------------------------------------------------------------------

    def forward_backward(self, item: Batch | Features) -> dict[str, Tensor]:
        """Exact whatever the micro batch."""
        recipe, batch = self.recipe, item.to(self.accelerator.device, non_blocking=True)
        size = min(recipe.train.micro_batch_size or len(batch), len(batch))
        parts = list(batch.split(size)) if isinstance(batch, Features) else split_batch(batch, size)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            features = part if isinstance(part, Features) else encode_batch(self.frozen, part, recipe.objectives)
            share = len(features) / len(batch)
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self.model(features, self.denoiser, recipe.objectives)
                self.accelerator.backward(share * losses["loss"])
            sums = {name: sums.get(name, 0) + share * loss.detach() for name, loss in losses.items()}
        return sums

    # -- what comes out --------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write adapter/ and, if one was trained, lora/, which stock `load_lora_weights` reads.

        In adapter/ lies the adapter, or for Stable Diffusion XL text_encoder/ and text_encoder_2/, each with its own.
        """
        check_finite(self.model)
        if self.accelerator.is_main_process:
            module = self.ema_module
            folders = adapter_folders(self.folder / ADAPTER, [encoding.tower for encoding in self.frozen.encodings])
            for adapter, folder, made_for in zip(module.adapters, folders, self.made_for, strict=True):
                adapter.save_pretrained(folder)
                _write_made_for(folder, made_for)
            if module.lora_names:
                save_lora(self.frozen.unet, module.lora_state(), self.folder / LORA)
        self.accelerator.wait_for_everyone()
        return self.folder / ADAPTER

    @property
    def evaluate_every(self) -> int | None:
        return self.recipe.samples.every if self.recipe.samples.prompts else None

    def evaluate(self, log: MetricsLog) -> None:
        """One sheet of the recipe's prompts, a row each: stock | untuned | current; as PNG and to the trackers."""
        if self.accelerator.is_main_process:
            frozen, module = self.frozen, self.ema_module
            if not self.references:
                with self.denoiser.base_unet():
                    if all(teacher.context.short_length for teacher in frozen.teachers):
                        self.references["stock"] = self.generate_samples(frozen.teachers, "stock")
                    self.references["untuned"] = self.generate_samples(frozen.encodings, frozen.conditioning)
            try:
                # The encoder casts what it is given, and the adapter in training must stay in float32.
                for encoding, adapter in zip(frozen.encodings, module.adapters, strict=True):
                    encoding.encoder.set_adapter_module(copy.deepcopy(adapter))
                with self.lora_weights(module):
                    current = self.generate_samples(frozen.encodings, frozen.conditioning)
            finally:
                for encoding in frozen.encodings:
                    encoding.encoder.set_adapter_module(None)
            columns = {**self.references, "current": current}
            picture = sample_sheet(columns, self.recipe.samples.prompts)
            folder = self.folder / SAMPLES
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._sheet(self.folder), lambda path: picture.save(path, format="PNG"))
            for tracker in self.accelerator.trackers:
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({SAMPLES: np.asarray(picture)[None]}, step=self.state.step, **options)
        self.accelerator.wait_for_everyone()

    def is_evaluated(self, folder: Path) -> bool:
        return self._sheet(folder).exists()

    def _sheet(self, folder: Path) -> Path:
        """The sheet of the step where the training stands, in a run's folder."""
        return folder / SAMPLES / f"step-{self.state.step:08d}.png"

    @contextmanager
    def lora_weights(self, other: Trainable) -> Iterator[None]:
        """Let the UNet use another module's values of the LoRA for a while."""
        before = [parameter.detach().clone() for parameter in self.module.lora]
        with torch.no_grad():
            for parameter, value in zip(self.module.lora, other.lora, strict=True):
                parameter.copy_(value)
            yield
            for parameter, value in zip(self.module.lora, before, strict=True):
                parameter.copy_(value)

    def generate_samples(self, encodings: tuple[TextEncoding, ...], conditioning: str | None) -> list[Image.Image]:
        section, frozen = self.recipe.samples, self.frozen
        components: dict[str, Any] = {"vae": frozen.vae, "unet": frozen.unet}
        for encoding in encodings:
            encoder, tokenizer = encoding.encoder, encoding.tokenizer
            if tokenizer.context_length != encoder.context_length:
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.context_length = tokenizer.model_max_length = encoder.context_length
            components |= {encoding.tower.encoder: encoder, encoding.tower.tokenizer: tokenizer}
        components["scheduler"] = copy.deepcopy(frozen.sampler)
        pipe: Any = pipeline_of(frozen.family, components, frozen.zeros_for_empty, conditioning=conditioning)
        pipe.set_progress_bar_config(disable=True)
        return [
            pipe(
                prompt=prompt,
                num_inference_steps=section.steps,
                guidance_scale=section.guidance_scale,
                width=self.resolution,
                height=self.resolution,
                generator=torch.Generator().manual_seed(section.seed + number),
            ).images[0]
            for number, prompt in enumerate(section.prompts)
        ]

    # -- plan and smoke --------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        recipe, frozen = self.recipe, self.frozen
        trained = sum(p.numel() for p in self.module.parameters())
        return {
            "base": f"{recipe.model.base}, {cast(Any, frozen.scheduler.config).prediction_type}",
            "encoder": f"{' and '.join(self._encoders())}, "
            + f"long captions {frozen.prompt_encoder.conditioning.summary}",
            "trained": f"{trained / 1e6:.2f}M parameters: {recipe.adapter.kind} adapter"
            + (" of each encoder" if len(frozen.encodings) > 1 else "")
            + (f" of scope {recipe.adapter.scope}" if recipe.adapter.kind == "attention" else "")
            + (", rotary positions" if recipe.adapter.rotary else "")
            + (f", {recipe.adapter.causal_heads} causal heads" if recipe.adapter.causal_heads else "")
            + (f", from {recipe.adapter.start_from}" if recipe.adapter.start_from else "")
            + (f", LoRA of rank {recipe.lora.rank}" if recipe.lora.rank else ""),
            "data": f"{len(self.loader.batches.order)} samples, {len(self.loader)} batches an epoch, "
            f"{self.resolution} px",
            "cache": self._describe_cache(),
        }

    def _describe_cache(self) -> str:
        if self.cache is None:
            return "none"
        text, missing = ", with text states" if self.recipe.features.text else "", len(self.cache.missing_samples)
        size = f"{self.cache_bytes / GIB:.2f} GiB" if self.cache_bytes > GIB else f"{self.cache_bytes / MIB:.0f} MiB"
        left = f"{missing} samples to add, about {size}" if missing else "complete"
        return f"{self.cache.folder}{text}: {left}"

    def _encoders(self) -> list[str]:
        towers = [encoding.tower.encoder for encoding in self.frozen.encodings]
        return [name or f"the base's {tower}" for name, tower in zip(self.encoder_names, towers, strict=False)]

    @property
    def encoder_names(self) -> list[str | None]:
        return [self.recipe.model.encoder, self.recipe.model.encoder_2]

    def memory(self) -> dict[str, int]:
        modules = {id(module): module for module in self.frozen.modules}.values()
        trained = sum(p.numel() for p in self.module.parameters())
        return {
            "frozen models": sum(p.numel() * p.element_size() for module in modules for p in module.parameters()),
            "training state": trained * 4 * (5 if self.ema is not None else 4),
            "activations": self._activations(),
        }

    def _activations(self) -> int:
        """Bytes that autograd keeps of a pass, measured on one and two samples and extrapolated along a line."""
        loader = self.reader if self.cache is not None and self.cache.missing else self.loader
        batch = next(batches(loader, 0, 1)).to(self.accelerator.device)
        micro = min(self.recipe.train.micro_batch_size or len(batch), len(batch))

        def measured(count: int) -> int:
            part = next(batch.split(count)) if isinstance(batch, Features) else split_batch(batch, count)[0]
            features = part if isinstance(part, Features) else encode_batch(self.frozen, part, self.recipe.objectives)
            # The frozen weights are counted on their own, so they must not count as what a pass keeps.
            holder = nn.ModuleList([self.module, self.frozen.unet])
            return activation_bytes(lambda: self.model(features, self.denoiser, self.recipe.objectives), holder)

        one = measured(1)
        if micro == 1:
            return one
        return math.ceil(one + (micro - 1) * (measured(2) - one))

    @classmethod
    def smoke_trainer(cls, recipe: AdapterRecipe, folder: str) -> Self:
        """A base that is no local folder is replaced by random weights."""
        models = None
        if not Path(builtin.resolve(recipe.model.base)).is_dir():
            models = random_base(recipe.model.base, DTYPES[recipe.train.precision], recipe.seed)
        return cls(smoke_recipe(recipe, folder, 2 * this_process().num_processes), models)


# -- models and data -----------------------------------------------------------------------------------------


def load_frozen(section: BaseSection) -> FrozenModels:
    """The base and the text encoders to adapt, in float32.

    Raises:
        ValueError: see the pipelines' `from_pretrained`; an encoder's width is not the UNet's; the base is a whole
            model, with adapter and LoRA; or see `check_encodings`.
    """
    base = builtin.resolve(section.base)
    pipe: Any = load_plain_pipeline(base, encoder=section.encoder, encoder_2=section.encoder_2)
    encodings = pipe.prompt_encoder.encodings
    for encoding in encodings:
        if encoding.encoder.adapter is not None:
            logger.warning(
                "%s carries an adapter, which is left out; adapter.start_from goes on from one", encoding.tower.encoder
            )
            encoding.encoder.set_adapter_module(None)
    names = dict(zip(("text_encoder", "text_encoder_2"), (section.encoder, section.encoder_2), strict=True))
    teachers = [
        item if names[item.tower.encoder] is None else replace(item, encoder=load_own_encoder(base, item.tower))
        for item in encodings
    ]
    check_encodings(encodings, section)
    return FrozenModels(
        vae=pipe.vae,
        encodings=encodings,
        teachers=tuple(teachers),
        unet=pipe.unet,
        scheduler=DDPMScheduler.from_config(pipe.scheduler.config),
        sampler=pipe.scheduler,
        conditioning=section.conditioning,
        family=pipe.family,
        zeros_for_empty=bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
    )


def check_encodings(encodings: tuple[TextEncoding, ...], section: BaseSection) -> None:
    """Refuse text encoders that do not read the same tokens at the same places.

    Raises:
        ValueError: the refiner, which has the second one only; or encoders of other lengths or vocabularies.
    """
    if encodings[0].tower == STABLE_DIFFUSION_XL.towers[1]:
        raise ValueError(f"base {section.base!r} has the second text encoder only: adapters are trained on the base")
    first, *others = encodings
    for other in others:
        one, two = (replace(encoding.context, pad_id=0) for encoding in (first, other))
        if one != two:
            raise ValueError(
                f"model.encoder and model.encoder_2 read texts differently: {one.length} and {two.length} positions, "
                f"of which {one.short_length} and {two.short_length} are the original ones, padding {one.padding} and "
                f"{two.padding}; give encoders trained alike, or keep the base's weights for short texts in both"
            )
        if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise ValueError(f"base {section.base!r}: its two tokenizers have different vocabularies")


def check_frozen(frozen: FrozenModels, recipe: AdapterRecipe) -> None:
    """Refuse models that cannot be trained with as the recipe says.

    Raises:
        ValueError: an inpainting UNet, an unknown prediction type, a base without its own positions, windows of
            77 tokens for an encoder without its original positions, or a VAE that fp16 makes overflow.
    """
    unet, vae = cast(Any, frozen.unet.config), cast(Any, frozen.vae.config)
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"base {recipe.model.base!r}: its UNet takes {unet.in_channels} channels, its VAE makes "
            f"{vae.latent_channels}: not a text-to-image model"
        )
    zeros = torch.zeros(1, 1, 1, 1)
    noise_target(frozen.scheduler, zeros, zeros, torch.zeros(1, dtype=torch.long))
    if frozen.reads_sizes and recipe.train.precision == "fp16" and vae.get("force_upcast"):
        raise ValueError(
            f"train.precision=fp16: the VAE of base {recipe.model.base!r} overflows in it (force_upcast); use bf16 or "
            "fp32"
        )
    short_length = min(teacher.context.short_length for teacher in frozen.teachers)
    if recipe.objectives.is_taught and not short_length:
        raise ValueError(
            f"base {recipe.model.base!r}: its text encoder has no original positions, so it cannot teach; give a stock "
            "base, or set objectives.weight_prediction and objectives.weight_states to 0"
        )
    if recipe.objectives.reads_windows and short_length != CLIP_CONTEXT_LENGTH:
        raise ValueError(
            f"base {recipe.model.base!r}: its text encoder cannot read windows of {CLIP_CONTEXT_LENGTH} tokens, as it "
            f"has {short_length or 'none'} of its original positions; give a stock base, or set "
            "objectives.weight_windows to 0"
        )
    try:
        frozen.prompt_encoder  # noqa: B018 -- refuses an encoder that this conditioning cannot use
    except ValueError as error:
        raise ValueError(f"model.encoder={recipe.model.encoder or recipe.model.base!r}: {error}") from None


def make_adapter(
    recipe: AdapterRecipe, frozen: FrozenModels, made_for: list[dict[str, str]]
) -> TextAdapter | JoinedAdapter:
    """New adapters for all text encoders, or those to go on from.

    Raises:
        ValueError: sizes that do not fit, or an adapter that was made for another tokenizer or, unless it is to be
            transferred, another encoder.
    """
    start, conditioning = recipe.adapter.start_from, frozen.prompt_encoder.conditioning.name
    towers = [encoding.tower for encoding in frozen.encodings]
    folders: list[Path | None] = [None] * len(towers)
    if start is not None:
        folders = list(adapter_folders(Path(builtin.resolve(start)), towers))
    adapters: dict[str, TextAdapter] = {}
    for encoding, folder, digests in zip(frozen.encodings, folders, made_for, strict=True):
        encoder = encoding.encoder
        if folder is None:
            sizes = recipe.adapter.model_dump(exclude=NO_SIZES)
            adapter = TextAdapter(encoder.config.hidden_size, max_tokens=encoder.context_length, **sizes)
        else:
            adapter = _adapter_to_go_on_from(folder, encoder.config.hidden_size, digests, recipe.adapter.transfer)
        adapter.config["conditioning"] = conditioning
        if folder is None or recipe.optim.lr:
            # What it is never shown it leaves alone, where short texts have the original positions.
            adapter.config["short_texts"] = recipe.objectives.reads_short or not encoding.context.short_length
        adapters[encoding.tower.encoder] = adapter
    return JoinedAdapter(adapters) if len(adapters) > 1 else adapter


def recorded_sizes(recipe: AdapterRecipe, adapter: TextAdapter | JoinedAdapter) -> AdapterRecipe:
    """The recipe with the sizes of the adapter that it goes on from, as `recipe.yaml` is to say what was trained.

    Raises:
        ValueError: the recipe names other sizes.
    """
    section = recipe.adapter
    if section.start_from is None:
        return recipe
    sizes = {name: adapter.config[name] for name in type(section).model_fields if name in adapter.config}
    if isinstance(adapter, JoinedAdapter):
        del sizes["hidden_width"]  # follows the width of each text encoder
    for name in section.model_fields_set & sizes.keys():
        value = getattr(section, name)
        if value != sizes[name] and (name, value) != ("hidden_width", 0):
            raise ValueError(
                f"adapter.{name}={value}: adapter.start_from={section.start_from!r} has {sizes[name]}; leave "
                f"adapter.{name} out, or start anew without adapter.start_from"
            )
    return recipe.model_copy(update={"adapter": section.model_copy(update=sizes)})


def _adapter_to_go_on_from(folder: Path, width: int, made_for: dict[str, str], transfer: bool) -> TextAdapter:
    adapter = TextAdapter.from_pretrained(folder)
    check_fits(adapter.config, width, what=f"adapter.start_from={str(folder)!r}: an adapter")
    try:
        check_made_for(folder, {"tokenizer": made_for["tokenizer"]} if transfer else made_for)
    except ValueError as error:
        way_out = "" if transfer else "; or go on from another encoder's by adapter.transfer=true"
        raise ValueError(f"adapter.start_from: {error}{way_out}") from None
    return adapter


def place(frozen: FrozenModels, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze all models and move them; they are not trained, so they may as well be in the run's precision."""
    for module in frozen.modules:
        module.requires_grad_(False).eval().to(device)
        if next(module.parameters()).dtype != dtype:
            nn.Module.to(module, dtype)  # diffusers' own `to` advises another way of loading
    write_attention_out(frozen.unet, device)


def add_lora(unet: UNet2DConditionModel, rank: int) -> dict[str, nn.Parameter]:
    """LoRA on the projections of the cross-attention, in float32; its parameters by name. Nothing for rank 0."""
    if not rank:
        return {}
    # A scale of 1 (alpha = rank) is what every reader assumes where a file does not say.
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=CROSS_ATTENTION))
    cast_training_params(unet, torch.float32)
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def _own_resolution(frozen: FrozenModels) -> int:
    return int(cast(Any, frozen.unet.config).sample_size) * _vae_factor(frozen.vae)


def _vae_factor(vae: AutoencoderKL) -> int:
    return 2 ** (len(cast(Any, vae.config).block_out_channels) - 1)


def make_denoiser(frozen: FrozenModels, has_lora: bool) -> Denoiser:
    @contextmanager
    def without_lora() -> Iterator[None]:
        frozen.unet.disable_adapters()
        try:
            yield
        finally:
            frozen.unet.enable_adapters()

    config = cast(Any, frozen.vae.config)
    empty, empty_teacher, empty_teacher_pooled = empty_states(frozen)
    mask_empty_states(frozen.unet)
    return Denoiser(
        unet=frozen.unet,
        scheduler=frozen.scheduler,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.get("shift_factor") or 0.0),
        empty=empty,
        empty_teacher=empty_teacher,
        base_unet=without_lora if has_lora else nullcontext,
        empty_teacher_pooled=empty_teacher_pooled,
    )


def data_config(recipe: AdapterRecipe, batch_size: int) -> DataConfig:
    fields = recipe.data.model_dump(exclude={"resolution", "random_crop", "flip"}) | recipe.captions.model_dump()
    return DataConfig(**fields, batch_size=batch_size, seed=recipe.seed)


def make_loader(
    recipe: AdapterRecipe,
    frozen: FrozenModels,
    accelerator: Accelerator,
    batch_size: int,
    resolution: int,
    source: Source,
) -> Loader:
    """Batches of pictures and captions of `source`, which is what `data_config` names, opened.

    Raises:
        ValueError: the data cannot be used.
    """
    section, config = recipe.data, data_config(recipe, batch_size)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    transform = picture_transform(resolution, section.random_crop, section.flip, frozen.reads_sizes)
    draft_size = 2 * resolution if config.draft else None
    found = Batches(source, config, transform, frozen.caption_ids, rank, world_size, draft_size)
    return Loader(found, pin_memory=accelerator.device.type == "cuda")


def make_cache(recipe: AdapterRecipe, frozen: FrozenModels, reader: Loader, resolution: int) -> FeatureCache | None:
    """The cache of what `reader` reads, as far as it is made, or None where the recipe has none.

    Raises:
        ValueError: it was made with something else.
    """
    if recipe.features.folder is None:
        return None
    key = cache_key(recipe, frozen, resolution)
    return FeatureCache(Path(recipe.features.folder), key, reader.batches.source, reader.config, recipe.features)


def cached_loader(reader: Loader, cache: FeatureCache) -> Loader:
    """Batches of a cache's latents and of captions, or of its features where it holds text states."""
    kind = CachedFeatures if cache.section.text else CachedLatents
    return Loader(kind(reader.batches, cache), reader.pin_memory)


def check_targets(captions: list[tuple[Sample, str]], frozen: FrozenModels, recipe: AdapterRecipe) -> None:
    """Refuse a run without the UNet whose targets are the hidden states that the adapter starts from.

    The base's own encoder in overlapping windows is its own teacher (`encode_windows_for_teacher`), unless that reads a
    plain wording: the loss would be 0 from the first step on.

    Raises:
        ValueError: there is nothing to learn.
    """
    is_own = all(a.encoder is b.encoder for a, b in zip(frozen.encodings, frozen.teachers, strict=True))
    reads_alike = frozen.prompt_encoder.conditioning.name == TEACHERS_READING.name
    if recipe.objectives.reads_noise or not (is_own and reads_alike):
        return
    if not any_plain_wording(captions):
        names = [
            name for name in ("weight_windows", "weight_plain", "weight_states") if getattr(recipe.objectives, name)
        ]
        raise ValueError(
            f"{', '.join(f'objectives.{name}' for name in names)}: the base's own encoder gives these hidden states "
            f"already, and none of {len(captions)} captions in {recipe.data.source} has a plain wording (`plain`), so "
            "there is nothing to learn without the UNet; set objectives.weight_long=1, or name model.encoder"
        )


def check_lengths(longs: list[str], frozen: FrozenModels, recipe: AdapterRecipe) -> None:
    """Warn where no caption is longer than what the base reads anyway.

    Raises:
        ValueError: neither is there, and the adapter leaves short texts as they are: nothing would be trained.
    """
    if not longs or max(map(len, frozen.tokenizer(longs).input_ids)) > CLIP_CONTEXT_LENGTH:
        return
    found = f"{recipe.data.source}: all of {len(longs)} captions fit into {CLIP_CONTEXT_LENGTH} tokens"
    keeps_short = not recipe.objectives.reads_short and all(e.context.short_length for e in frozen.encodings)
    if keeps_short and not recipe.lora.rank:
        raise ValueError(
            f"data.source={found}, which the adapter leaves as they are (objectives.short_share=0), so there is "
            "nothing to train; give longer captions, or set objectives.short_share=0.25"
        )
    logger.warning("%s; nothing can be learnt about the tokens after them", found)


# -- what comes out ------------------------------------------------------------------------------------------


def _write_made_for(folder: Path, made_for: dict[str, str]) -> None:
    write_atomically(folder / MADE_FOR, (json.dumps(made_for, indent=1) + "\n").encode())


def save_lora(unet: UNet2DConditionModel, lora_state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a LoRA of the UNet in diffusers' format; a file there before is replaced in one step."""
    layers = get_peft_model_state_dict(unet, {**unet.state_dict(), **lora_state})
    folder.mkdir(parents=True, exist_ok=True)
    save, layers = StableDiffusionPipeline.save_lora_weights, convert_state_dict_to_diffusers(layers)
    write_atomically(folder / LORA_WEIGHTS, lambda path: save(path.parent, layers, weight_name=path.name))


def sample_sheet(columns: Mapping[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """Pictures of several systems side by side, a prompt in each row."""
    images, labels = [], []
    for row, prompt in enumerate(prompts):
        for name, pictures in columns.items():
            images.append(torch.from_numpy(np.asarray(pictures[row].convert("RGB")).copy()).permute(2, 0, 1))
            labels.append(f"{name}\n{prompt[:24]}")
    return sheet(images, labels, columns=len(columns), side=max(192, images[0].shape[-1]))


def smoke_recipe(recipe: AdapterRecipe, folder: str | Path, batch_size: int = 2) -> AdapterRecipe:
    """The recipe with a handful of generated samples at half its size, and two steps: does it start, step and save?

    Models, adapter, weights of the objectives, optimizer and precision stay the recipe's; two steps are too few for a
    warm-up.
    """
    changes: dict[str, dict[str, Any]] = {
        "model": {"encoder": None, "encoder_2": None},
        "adapter": {"start_from": None, "transfer": False},
        # Captions with plain wordings: whatever the objectives, there is something to learn.
        "data": {**READ_SCENES, "source": "scenes-references", "stop": 2 * batch_size, "workers": 0},
        "captions": {"short_caption": "first_sentence", "filter_captions": False},
        "features": {"folder": None},
        # Half of a few draws: so that both kinds of captions have their turn.
        "objectives": {"short_share": 0.5 if recipe.objectives.reads_short else 0.0},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "epochs": 1, "batch_size": batch_size, "micro_batch_size": 1},
        "samples": {"prompts": recipe.samples.prompts[:1], "steps": 2},
        "output": {"folder": str(folder), "log_every": 1, "keep_last": 1, "trackers": []},
    }
    changes["data"]["resolution"] = max(64, (recipe.data.resolution or 512) // 2)
    return changed(recipe, changes)
