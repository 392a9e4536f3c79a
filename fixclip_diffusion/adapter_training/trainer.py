"""Training the adapter, and on demand a LoRA on the UNet's cross-attention, with everything else frozen.

What is trained on at step s is a function of (recipe, s) alone, so a resumed run repeats an uninterrupted one.
"""

import copy
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextConfig, CLIPTextModel

from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import Batch, Batches, Loader
from fixclip_core.data.samples import BadSampleError, describe_skipped
from fixclip_core.data.sources import open_source
from fixclip_core.files import write_atomically
from fixclip_core.scenes import sheet
from fixclip_core.training.checkpoint import check_folder, list_checkpoints, training_state_bytes
from fixclip_core.training.encoder.task import split_batch
from fixclip_core.training.loop import (
    CHECKPOINTS,
    TrainState,
    activation_bytes,
    batches,
    check_finite,
    make_accelerator,
    make_ema,
    make_optimizer,
    make_schedule,
    parameter_groups,
    start,
    take_steps,
)
from fixclip_diffusion import builtin, tiny
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.adapter_training.features import (
    MADE_FOR,
    CachedFeatures,
    CachedLatents,
    FeatureCache,
    FrozenModels,
    TokenIds,
    cache_key,
    check_made_for,
    empty_states,
    encode_batch,
    fingerprint,
    num_tokens,
    picture_transform,
    write_attention_out,
)
from fixclip_diffusion.adapter_training.objectives import Denoiser, Features, adapter_losses, noise_target
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe, BaseSection, ObjectivesSection
from fixclip_diffusion.pipeline import FixClipStableDiffusionPipeline
from fixclip_diffusion.text_encoder import CLIP_CONTEXT_LENGTH, FixClipTextEncoder, FixClipTokenizer

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
LORA = "lora"
SAMPLES = "samples"
CROSS_ATTENTION = r".*attn2\.(to_q|to_k|to_v|to_out\.0)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
_GIB = 2**30


class Trainable(nn.Module):
    """What is trained: the adapter, and the LoRA's parameters, which the UNet holds too.

    Frozen models are passed to `forward` and not registered here, so that checkpoints and averages stay small.
    """

    def __init__(self, adapter: TextAdapter, lora: Mapping[str, nn.Parameter]):
        super().__init__()
        self.adapter = adapter
        self.lora_names = tuple(lora)
        self.lora = nn.ParameterList(lora.values())

    def forward(self, features: Features, denoiser: Denoiser, objectives: ObjectivesSection) -> dict[str, Tensor]:
        return adapter_losses(self.adapter, features, denoiser, objectives)

    def lora_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in zip(self.lora_names, self.lora, strict=True)}


@dataclass
class Run:
    """Everything that a recipe needs to run; `model` and `optimizer` are prepared, `trainable` is the bare model."""

    recipe: AdapterRecipe
    accelerator: Accelerator
    frozen: FrozenModels
    denoiser: Denoiser
    trainable: Trainable
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    ema: AveragedModel | None
    loader: Loader
    state: TrainState
    total_steps: int
    resolution: int
    made_for: dict[str, str]
    references: dict[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output.folder)


def train(recipe: AdapterRecipe, *, resume: str = "auto", models: FrozenModels | None = None) -> Path:
    """Train as the recipe says and return the adapter's folder; a LoRA is beside it.

    Args:
        recipe: what to do.
        resume: "auto" goes on from the newest whole checkpoint in the output folder, if any; "none" starts over;
            a path goes on from there.
        models: in memory, instead of those that the recipe names.

    Raises:
        ValueError: the recipe, data, weights, cache, folder or checkpoint cannot be used.
        FloatingPointError: too many steps in a row without a finite gradient.
    """
    run = prepare(recipe, models)
    begin(run, resume)
    fit(run)
    save_outputs(run)
    run.accelerator.end_training()
    return run.folder / ADAPTER


# -- building ------------------------------------------------------------------------------------------------


def prepare(recipe: AdapterRecipe, models: FrozenModels | None = None) -> Run:
    """Build models, data, optimizer and schedule, and check all that can be checked before the first step.

    Raises:
        ValueError: see `train`.
    """
    accelerator = make_accelerator(recipe.train, recipe.output)
    batch_size, rest = divmod(recipe.train.batch_size, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"train.batch_size={recipe.train.batch_size}: it must be a multiple of the number of processes, "
            f"{accelerator.num_processes}"
        )
    if accelerator.is_main_process:
        check_folder(Path(recipe.output.folder), 0)
    with accelerator.local_main_process_first():  # the others find its download
        frozen = replace(models, long_prompt=recipe.model.long_prompt) if models else load_frozen(recipe.model)
    check_frozen(frozen, recipe)
    made_for = fingerprint(frozen.text_encoder, frozen.tokenizer)
    torch.manual_seed(recipe.seed)
    adapter = make_adapter(recipe, frozen, made_for)
    place(frozen, accelerator.device, DTYPES[recipe.train.precision])
    lora = add_lora(frozen.unet, recipe.lora.rank)
    if recipe.train.gradient_checkpointing:
        frozen.unet.enable_gradient_checkpointing()
    if recipe.train.compile:
        frozen.unet.compile_repeated_blocks()
    resolution = recipe.data.resolution or _own_resolution(frozen)
    loader = make_loader(recipe, frozen, accelerator, batch_size, resolution)
    warn_of_short_captions(loader.batches, frozen.tokenizer)

    trainable = Trainable(adapter, lora)
    if accelerator.is_main_process:
        check_folder(Path(recipe.output.folder), needed_disk(recipe, trainable))
    groups = parameter_groups(trainable, lambda name: name.startswith("lora"), _no_decay, recipe.optim)
    model, optimizer = accelerator.prepare(trainable, make_optimizer(groups, recipe.optim))
    total_steps = recipe.train.steps or recipe.train.epochs * len(loader)
    schedule = make_schedule(optimizer, recipe.optim, total_steps)
    state = TrainState()
    accelerator.register_for_checkpointing(state, schedule)
    ema = make_ema(accelerator, model, recipe.train.ema_decay)
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        frozen=frozen,
        denoiser=make_denoiser(frozen, bool(lora)),
        trainable=accelerator.unwrap_model(model),
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        loader=loader,
        state=state,
        total_steps=total_steps,
        resolution=resolution,
        made_for=made_for,
    )


def load_frozen(section: BaseSection) -> FrozenModels:
    """The base and the encoder to adapt, in float32.

    Raises:
        ValueError: see `FixClipStableDiffusionPipeline.from_pretrained`; the encoder's width is not the UNet's; the
            base is a whole model, with adapter and LoRA.
    """
    pipe = FixClipStableDiffusionPipeline.from_pretrained(
        builtin.resolve(section.base),
        encoder=section.encoder,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    encoder = pipe.text_encoder
    if encoder.adapter is not None:
        logger.warning("the text encoder carries an adapter, which is left out; adapter.start_from goes on from one")
        encoder.set_adapter_module(None)
    teacher = encoder
    if section.encoder is not None:
        teacher = FixClipTextEncoder.from_pretrained(section.base, subfolder="text_encoder")
        teacher.set_adapter_module(None)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    return FrozenModels(
        pipe.vae, encoder, teacher, pipe.unet, schedule, pipe.scheduler, pipe.tokenizer, section.long_prompt
    )


def check_frozen(frozen: FrozenModels, recipe: AdapterRecipe) -> None:
    """Refuse models that cannot be trained with as the recipe says.

    Raises:
        ValueError: an inpainting UNet, an unknown prediction type, a base without its own positions, or windows of
            77 tokens for an encoder without its original positions.
    """
    unet, vae = cast(Any, frozen.unet.config), cast(Any, frozen.vae.config)
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"base {recipe.model.base!r}: its UNet takes {unet.in_channels} channels, its VAE makes "
            f"{vae.latent_channels}: not a text-to-image model"
        )
    zeros = torch.zeros(1, 1, 1, 1)
    noise_target(frozen.scheduler, zeros, zeros, torch.zeros(1, dtype=torch.long))
    if recipe.objectives.is_taught and not frozen.teacher.short_context_length:
        raise ValueError(
            f"base {recipe.model.base!r}: its text encoder has no original positions, so it cannot teach; give a stock "
            "base, or set objectives.weight_prediction and objectives.weight_states to 0"
        )
    if recipe.objectives.reads_windows and frozen.teacher.short_context_length != CLIP_CONTEXT_LENGTH:
        raise ValueError(
            f"base {recipe.model.base!r}: its text encoder cannot read windows of {CLIP_CONTEXT_LENGTH} tokens, as it "
            f"has {frozen.teacher.short_context_length or 'none'} of its original positions; give a stock base, or set "
            "objectives.weight_windows to 0"
        )
    positions = frozen.text_encoder.short_context_length
    if frozen.in_windows and positions != CLIP_CONTEXT_LENGTH:
        raise ValueError(
            f"model.long_prompt={frozen.long_prompt} needs an encoder with its {CLIP_CONTEXT_LENGTH} original "
            f"positions, and {recipe.model.encoder or recipe.model.base!r} has {positions or 'none'}; set "
            "model.long_prompt=windows"
        )


def make_adapter(recipe: AdapterRecipe, frozen: FrozenModels, made_for: dict[str, str]) -> TextAdapter:
    """A new adapter, or the one to go on from.

    Raises:
        ValueError: sizes that do not fit, or an adapter that was made for another encoder or tokenizer.
    """
    section, encoder = recipe.adapter, frozen.text_encoder
    if section.start_from is None:
        sizes = section.model_dump(exclude={"start_from"})
        adapter = TextAdapter(encoder.config.hidden_size, max_tokens=encoder.context_length, **sizes)
    else:
        adapter = TextAdapter.from_pretrained(section.start_from)
        if adapter.config["width"] != encoder.config.hidden_size:
            raise ValueError(
                f"adapter.start_from={section.start_from!r}: an adapter of width {adapter.config['width']} on a text "
                f"encoder of width {encoder.config.hidden_size}"
            )
        check_made_for(Path(builtin.resolve(section.start_from)), made_for)
    return adapter


def place(frozen: FrozenModels, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze all models and move them; they are not trained, so they may as well be in the run's precision."""
    for module in frozen.modules:
        module.requires_grad_(False).eval().to(device)
        if next(module.parameters()).dtype != dtype:
            module.to(dtype)
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
    empty, empty_teacher = empty_states(frozen)
    return Denoiser(
        unet=frozen.unet,
        scheduler=frozen.scheduler,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.get("shift_factor") or 0.0),
        empty=empty,
        empty_teacher=empty_teacher,
        base_unet=without_lora if has_lora else nullcontext,
        window=CLIP_CONTEXT_LENGTH if frozen.in_windows else 0,
        joined=frozen.tokenizer.context_length if frozen.overlap else 0,
    )


def make_loader(
    recipe: AdapterRecipe, frozen: FrozenModels, accelerator: Accelerator, batch_size: int, resolution: int
) -> Loader:
    """Batches of pictures, or of cached features, which are made first where they are missing.

    Raises:
        ValueError: the data cannot be used, or the cache was made with something else.
    """
    section = recipe.data
    fields = section.model_dump(exclude={"resolution", "random_crop", "flip"}) | recipe.captions.model_dump()
    config = DataConfig(**fields, batch_size=batch_size, seed=recipe.seed)
    source = open_source(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    transform = picture_transform(resolution, section.random_crop, section.flip)
    draft_size = 2 * resolution if config.draft else None
    arguments = (source, config, transform, frozen.caption_ids, rank, world_size, draft_size)
    result = Batches(*arguments)
    if recipe.features.folder is not None:
        folder, key = Path(recipe.features.folder), cache_key(recipe, frozen, resolution)
        cache = FeatureCache(folder, key, source, config, recipe.features)
        accelerator.wait_for_everyone()  # all have seen the same files missing
        cache.build(result, frozen, rank, world_size, config.workers)
        accelerator.wait_for_everyone()
        result = (CachedFeatures if recipe.features.text else CachedLatents)(*arguments)
        result.cache = cache
    return Loader(result, pin_memory=accelerator.device.type == "cuda")


def warn_of_short_captions(loaded: Batches, tokenizer: FixClipTokenizer, looked_at: int = 256) -> None:
    """Warn where no caption among a few hundred is longer than what the base reads anyway."""
    total = len(loaded.order)
    positions = range(0, total, max(1, total // looked_at))
    longs = []
    for position in positions:
        try:
            longs.append(loaded.captions(0, loaded.order.index(0, position))[1])
        except BadSampleError:
            continue  # counted and reported when its turn comes
    if longs and int(num_tokens(TokenIds(tokenizer)(longs), tokenizer).max()) <= CLIP_CONTEXT_LENGTH:
        logger.warning(
            "%s: all of %d captions fit into %d tokens; nothing can be learnt about the tokens after them",
            loaded.config.source,
            len(longs),
            CLIP_CONTEXT_LENGTH,
        )


def _no_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or "position" in name


def needed_disk(recipe: AdapterRecipe, trainable: Trainable) -> int:
    """Bytes the run will still write at most: checkpoints, one of them twice while it is replaced, and the outputs."""
    folder = Path(recipe.output.folder)
    checkpoint = training_state_bytes(trainable, ema=recipe.train.ema_decay is not None)
    weights = sum(p.numel() * p.element_size() for p in trainable.parameters())
    present = min(len(list_checkpoints(folder / CHECKPOINTS)), recipe.output.keep_last)
    return (recipe.output.keep_last + 1 - present) * checkpoint + 2 * weights


# -- the loop ------------------------------------------------------------------------------------------------


def begin(run: Run, resume: str) -> None:
    """Load the checkpoint to go on from, if any, and write recipe and fingerprint beside the results.

    Raises:
        ValueError: see `fixclip_core.training.loop.start`; the run was begun with another encoder or tokenizer.
    """
    if list_checkpoints(run.folder / CHECKPOINTS):
        check_made_for(run.folder, run.made_for)
    run.accelerator.wait_for_everyone()
    start(run, resume)
    if run.accelerator.is_main_process:
        _write_made_for(run.folder, run.made_for)


def _write_made_for(folder: Path, made_for: dict[str, str]) -> None:
    write_atomically(folder / MADE_FOR, (json.dumps(made_for, indent=1) + "\n").encode())


def fit(run: Run) -> None:
    """Take the steps that are left."""
    device, samples = run.accelerator.device, run.recipe.samples
    take_steps(
        run,
        batches(run.loader, run.state.step, run.total_steps),
        lambda batch: forward_backward(run, batch.to(device, non_blocking=True)),
        evaluate=(lambda log: write_samples(run)) if samples.prompts else None,
        evaluate_every=samples.every,
    )
    if run.loader.skipped:
        logger.warning("Samples that could not be used: %s", describe_skipped(run.loader.skipped.values()))


def forward_backward(run: Run, batch: Batch | Features) -> dict[str, Tensor]:
    """One batch's losses, detached, with their gradients left in the parameters; exact whatever the micro batch."""
    size = min(run.recipe.train.micro_batch_size or len(batch), len(batch))
    parts = list(batch.split(size)) if isinstance(batch, Features) else split_batch(batch, size)
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        features = part if isinstance(part, Features) else encode_batch(run.frozen, part, run.recipe.objectives)
        share = len(features) / len(batch)
        last = number == len(parts) - 1
        with nullcontext() if last else run.accelerator.no_sync(run.model):
            losses = run.model(features, run.denoiser, run.recipe.objectives)
            run.accelerator.backward(share * losses["loss"])
        sums = {name: sums.get(name, 0) + share * loss.detach() for name, loss in losses.items()}
    return sums


# -- what comes out ------------------------------------------------------------------------------------------


def best_weights(run: Run) -> Trainable:
    """The averaged weights if the recipe averages, else the trained ones."""
    return run.trainable if run.ema is None else cast(Trainable, run.ema.module)


def save_outputs(run: Run) -> None:
    """Write adapter/ and, if one was trained, lora/, which stock `load_lora_weights` reads.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    check_finite(run.model)
    if run.accelerator.is_main_process:
        weights = best_weights(run)
        weights.adapter.save_pretrained(run.folder / ADAPTER)
        _write_made_for(run.folder / ADAPTER, run.made_for)
        if weights.lora_names:
            save_lora(run.frozen.unet, weights.lora_state(), run.folder / LORA)
    run.accelerator.wait_for_everyone()


def save_lora(unet: UNet2DConditionModel, lora_state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a LoRA of the UNet in diffusers' format; a file there before is replaced in one step."""
    layers = get_peft_model_state_dict(unet, {**unet.state_dict(), **lora_state})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial") as partial:
        StableDiffusionPipeline.save_lora_weights(partial, convert_state_dict_to_diffusers(layers))
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)


@contextmanager
def lora_weights(run: Run, weights: Trainable) -> Iterator[None]:
    """Let the UNet use these values of the LoRA for a while."""
    before = [parameter.detach().clone() for parameter in run.trainable.lora]
    with torch.no_grad():
        for parameter, value in zip(run.trainable.lora, weights.lora, strict=True):
            parameter.copy_(value)
        yield
        for parameter, value in zip(run.trainable.lora, before, strict=True):
            parameter.copy_(value)


def write_samples(run: Run) -> None:
    """One sheet of the recipe's prompts, a row each: stock | untuned | current; as PNG and to the trackers."""
    if run.accelerator.is_main_process:
        frozen, weights = run.frozen, best_weights(run)
        if not run.references:
            with run.denoiser.base_unet():
                if frozen.teacher.short_context_length:
                    run.references["stock"] = draw_samples(run, frozen.teacher, "truncate_77")
                run.references["untuned"] = draw_samples(run, frozen.text_encoder, frozen.long_prompt)
        try:
            # The encoder casts what it is given, and the adapter in training must stay in float32.
            frozen.text_encoder.set_adapter_module(copy.deepcopy(weights.adapter))
            with lora_weights(run, weights):
                current = draw_samples(run, frozen.text_encoder, frozen.long_prompt)
        finally:
            frozen.text_encoder.set_adapter_module(None)
        columns = {**run.references, "current": current}
        picture = sample_sheet(columns, run.recipe.samples.prompts)
        folder = run.folder / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step-{run.state.step:08d}.png")
        for tracker in run.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({SAMPLES: np.asarray(picture)[None]}, step=run.state.step, **options)
    run.accelerator.wait_for_everyone()


def draw_samples(run: Run, encoder: FixClipTextEncoder, long_prompt: str) -> list[Image.Image]:
    section, frozen = run.recipe.samples, run.frozen
    tokenizer = frozen.tokenizer
    if tokenizer.context_length != encoder.context_length:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.context_length = tokenizer.model_max_length = encoder.context_length
    pipe: Any = FixClipStableDiffusionPipeline(
        vae=frozen.vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=frozen.unet,
        scheduler=copy.deepcopy(frozen.sampler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        long_prompt=long_prompt,
    )
    pipe.set_progress_bar_config(disable=True)
    return [
        pipe(
            prompt=prompt,
            num_inference_steps=section.steps,
            guidance_scale=section.guidance_scale,
            width=run.resolution,
            height=run.resolution,
            generator=torch.Generator().manual_seed(section.seed + number),
        ).images[0]
        for number, prompt in enumerate(section.prompts)
    ]


def sample_sheet(columns: Mapping[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """Pictures of several systems side by side, a prompt in each row."""
    images, labels = [], []
    for row, prompt in enumerate(prompts):
        for name, pictures in columns.items():
            images.append(torch.from_numpy(np.asarray(pictures[row].convert("RGB")).copy()).permute(2, 0, 1))
            labels.append(f"{name}\n{prompt[:24]}")
    return sheet(images, labels, columns=len(columns), side=max(192, images[0].shape[-1]))


# -- plan and smoke ------------------------------------------------------------------------------------------


def plan(run: Run) -> str:
    """What the run would do and need, in a few lines; reads one batch and runs a few of its samples."""
    recipe, accelerator, frozen = run.recipe, run.accelerator, run.frozen
    batch = next(batches(run.loader, 0, 1)).to(accelerator.device)
    micro = min(recipe.train.micro_batch_size or len(batch), len(batch))
    fixed = sum(
        p.numel() * p.element_size()
        for module in {id(m): m for m in frozen.modules}.values()
        for p in module.parameters()
    )
    trained = sum(p.numel() for p in run.trainable.parameters())
    state = trained * 4 * (5 if run.ema is not None else 4)
    activations = _activations(run, batch, micro)
    cache = "none" if recipe.features.folder is None else recipe.features.folder
    lines = {
        "base": f"{recipe.model.base}, {cast(Any, frozen.scheduler.config).prediction_type}",
        "encoder": f"{recipe.model.encoder or 'the base encoder'}, "
        + ("overlapping " if frozen.overlap else "")
        + (f"windows of {CLIP_CONTEXT_LENGTH}" if frozen.in_windows else f"{frozen.text_encoder.context_length}")
        + " tokens",
        "trained": f"{trained / 1e6:.2f}M parameters: {recipe.adapter.kind} adapter"
        + (f", LoRA of rank {recipe.lora.rank}" if recipe.lora.rank else ""),
        "data": f"{len(run.loader.batches.order)} samples, {len(run.loader)} batches an epoch, {run.resolution} px",
        "cache": f"{cache}{', with text states' if recipe.features.text and recipe.features.folder else ''}",
        "batch": f"{recipe.train.batch_size} = {accelerator.num_processes} process(es) x {len(batch)}, {micro} a pass",
        "steps": f"{run.total_steps} ({run.total_steps / len(run.loader):.2f} epochs), warm-up "
        f"{recipe.optim.warmup_steps}, lr {recipe.optim.lr:g}",
        "precision": f"{recipe.train.precision} on {accelerator.device.type}",
        "memory": f"about {(fixed + state + activations) / _GIB:.1f} GiB a process: frozen models {fixed / _GIB:.1f}, "
        f"training state {state / _GIB:.2f}, activations {activations / _GIB:.1f}",
        "disk": f"{needed_disk(recipe, run.trainable) / _GIB:.2f} GiB for checkpoints and outputs in {run.folder}",
    }
    return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())


def _activations(run: Run, batch: Batch | Features, micro: int) -> int:
    """Bytes that autograd keeps of a pass, measured on one and two samples and extrapolated along a line."""

    def measured(count: int) -> int:
        part = next(batch.split(count)) if isinstance(batch, Features) else split_batch(batch, count)[0]
        features = part if isinstance(part, Features) else encode_batch(run.frozen, part, run.recipe.objectives)
        # The frozen weights are counted on their own, so they must not count as what a pass keeps.
        holder = nn.ModuleList([run.trainable, run.frozen.unet])
        return activation_bytes(lambda: run.model(features, run.denoiser, run.recipe.objectives), holder)

    one = measured(1)
    if micro == 1:
        return one
    return math.ceil(one + (micro - 1) * (measured(2) - one))


def smoke(recipe: AdapterRecipe) -> None:
    """Train `smoke_recipe` in a temporary folder; a base that is no local folder is replaced by random weights."""
    process = PartialState()
    folder = broadcast_object_list([tempfile.mkdtemp() if process.is_main_process else None])[0]
    models = None
    if not Path(builtin.resolve(recipe.model.base)).is_dir():
        models = random_stable_diffusion(DTYPES[recipe.train.precision], recipe.seed)
    try:
        train(smoke_recipe(recipe, folder), resume="none", models=models)
    finally:
        if process.is_main_process:
            shutil.rmtree(folder)


def smoke_recipe(recipe: AdapterRecipe, folder: str | Path) -> AdapterRecipe:
    """The recipe with a handful of generated samples at half its size, and two steps: does it start, step and save?

    Models, adapter, weights of the objectives, optimizer and precision stay the recipe's.
    """
    resolution = max(64, (recipe.data.resolution or 512) // 2)
    changes: dict[str, dict[str, Any]] = {
        "model": {"encoder": None},
        "adapter": {"start_from": None},
        "data": {"source": "scenes", "image_root": None, "start": 0, "stop": 4, "workers": 0, "resolution": resolution},
        "captions": {"short_caption": "first_sentence", "filter_captions": False},
        "features": {"folder": None},
        # Half of a few draws: so that both kinds of captions have their turn.
        "objectives": {"short_share": 0.5 if recipe.objectives.reads_short else 0.0},
        "train": {"steps": 2, "batch_size": 2, "micro_batch_size": 1},
        "samples": {"prompts": recipe.samples.prompts[:1], "steps": 2},
        "output": {"folder": str(folder), "log_every": 1, "keep_last": 1, "trackers": []},
    }
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update=sections)


def random_stable_diffusion(dtype: torch.dtype = torch.float32, seed: int = 0) -> FrozenModels:
    """Models of Stable Diffusion 1.5's sizes with random weights: 1.07 billion of them."""
    from fixclip_core.weights.write import clip_tokenizer

    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)  # made in float32 and cast, the UNet alone would take 5 GB for a while
        unet = UNet2DConditionModel(**SD15_UNET)
        vae = AutoencoderKL(**SD15_VAE)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
                eos_token_id=2,
            )
        )
        encoder = FixClipTextEncoder.from_clip(text)
    finally:
        torch.set_default_dtype(default)
    plain = clip_tokenizer()
    tokenizer = FixClipTokenizer(vocab=plain.get_vocab(), merges=plain._merges)
    sampler = tiny.scheduler()
    schedule = DDPMScheduler.from_config(sampler.config)
    return FrozenModels(vae, encoder, encoder, unet, schedule, sampler, tokenizer)
