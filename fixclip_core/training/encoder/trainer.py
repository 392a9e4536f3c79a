"""Training the encoder: build everything a recipe names, then step, log, evaluate, save.

What is trained on at step s is a function of (recipe, s) alone, so a resumed run repeats an uninterrupted one.

Shapes: B samples of this process, I images, T texts, E embedding.
"""

import logging
import math
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import Batch, Loader, build_loader
from fixclip_core.data.samples import describe_skipped
from fixclip_core.evaluation.retrieval import retrieval_metrics
from fixclip_core.model.config import FINE_TUNE, LONG_CLIP
from fixclip_core.model.fixclip import MAX_LOG_SCALE, FixClip
from fixclip_core.training.checkpoint import check_folder, list_checkpoints, training_state_bytes
from fixclip_core.training.encoder.task import ContrastiveTask, forward_backward, make_alignment, split_batch
from fixclip_core.training.loop import (
    CHECKPOINTS,
    MetricsLog,
    TrainState,
    activation_bytes,
    batches,
    check_finite,
    device_memory,
    make_accelerator,
    make_ema,
    make_optimizer,
    make_schedule,
    parameter_groups,
    start,
    take_steps,
)
from fixclip_core.training.recipe import EncoderRecipe
from fixclip_core.weights.read import find_fixclip, load_fixclip

logger = logging.getLogger(__name__)

MODEL = "model"
BEST = "best"
_GIB = 2**30


@dataclass
class Run:
    """Everything that a recipe needs to run; `model` and `optimizer` are prepared, `clip` is the bare model."""

    recipe: EncoderRecipe
    accelerator: Accelerator
    clip: FixClip
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    ema: AveragedModel | None
    task: ContrastiveTask
    loader: Loader
    eval_loader: Loader | None
    state: TrainState
    total_steps: int

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output.folder)


def train(recipe: EncoderRecipe, *, resume: str = "auto") -> Path:
    """Train as the recipe says and return the folder of the final model, which `FixClip.from_pretrained` reads.

    Args:
        recipe: what to do.
        resume: "auto" goes on from the newest whole checkpoint in the output folder, if any; "none" starts over;
            a path goes on from there.

    Raises:
        ValueError: the recipe, data, weights, folder or checkpoint cannot be used.
        FloatingPointError: too many steps in a row without a finite gradient.
    """
    run = prepare(recipe)
    start(run, resume)
    fit(run)
    save_model(run, run.folder / MODEL)
    run.accelerator.end_training()
    return run.folder / MODEL


# -- building ------------------------------------------------------------------------------------------------


def prepare(recipe: EncoderRecipe) -> Run:
    """Build model, data, optimizer and schedule, and check folder and disk before the first step.

    Raises:
        ValueError: see `train`.
    """
    accelerator = make_accelerator(recipe.train, recipe.output)
    batch_size = _local_batch_size(recipe, accelerator)
    if accelerator.is_main_process:
        check_folder(Path(recipe.output.folder), 0)
    torch.manual_seed(recipe.seed)
    with accelerator.local_main_process_first():  # the others find its download
        clip = build_model(recipe)
    loader = _loader(data_config(recipe, batch_size), clip, accelerator, augment=True)
    eval_loader = None
    if recipe.eval.source is not None:
        eval_loader = _loader(eval_data_config(recipe), clip, accelerator, augment=False)
    if accelerator.is_main_process:
        check_folder(Path(recipe.output.folder), needed_disk(recipe, clip))
    new = clip.new_parameters()
    if recipe.train.weight_states and find_fixclip(recipe.model.name) is not None:
        raise ValueError(
            f"train.weight_states={recipe.train.weight_states}: {recipe.model.name} is a FixClip, whose text tower is "
            "trained already; start from the CLIP whose hidden states the image generator reads"
        )
    alignment = make_alignment(recipe.train, clip, accelerator.device)
    if accelerator.state.deepspeed_plugin is not None:  # it cannot ask a loader that it does not prepare
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
    if accelerator.distributed_type == DistributedType.FSDP:  # it cannot shard a scalar; `save_model` undoes this
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
    groups = parameter_groups(clip, new.__contains__, _no_decay, recipe.optim)
    model, optimizer = accelerator.prepare(clip, make_optimizer(groups, recipe.optim))
    clip = accelerator.unwrap_model(model)
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import register_fsdp_forward_method

        for name in ("encode_image", "encode_text"):
            register_fsdp_forward_method(clip, name)
    total_steps = recipe.train.steps or recipe.train.epochs * len(loader)
    schedule = make_schedule(optimizer, recipe.optim, total_steps)
    state = TrainState()
    accelerator.register_for_checkpointing(state, schedule)
    ema = make_ema(accelerator, model, recipe.train.ema_decay)
    task = ContrastiveTask.from_recipe(recipe.train, clip.config, alignment)
    return Run(
        recipe, accelerator, clip, model, optimizer, schedule, ema, task, loader, eval_loader, state, total_steps
    )


def build_model(recipe: EncoderRecipe) -> FixClip:
    """The recipe's base, stretched, with its method's modules; weights are fp32, whatever the precision.

    Raises:
        ValueError: the base is unknown, cannot be loaded, or does not fit the modules.
    """
    section, fields = recipe.model, model_fields(recipe)
    if Path(section.name).exists():
        clip = load_local(section.name, fields).float()
    else:
        clip = FixClip.from_open_clip(section.name, section.pretrained, cache_dir=section.cache_dir, **fields).float()
    clip.set_grad_checkpointing(recipe.train.gradient_checkpointing)
    if recipe.train.compile:
        clip.compile_blocks()
    return clip


def load_local(name: str, fields: dict[str, Any]) -> FixClip:
    """Start from weights on disk: any CLIP that `fixclip convert` knows, or a FixClip with the recipe's modules.

    Raises:
        ValueError: the weights cannot be read, or a FixClip has other modules than the recipe wants.
    """
    folder = find_fixclip(name)
    if folder is None:
        return load_fixclip(name, **fields)
    clip = FixClip.from_pretrained(folder)
    others = [
        f"{key}={getattr(clip.config, key)!r}, not {value!r}"
        for key, value in fields.items()
        if getattr(clip.config, key) != value
    ]
    if others:
        raise ValueError(
            f"model.name={name}: this FixClip has {'; '.join(others)}: set the recipe's model section to it"
        )
    return clip


def model_fields(recipe: EncoderRecipe) -> dict[str, Any]:
    """The fields of FixClipConfig that the recipe decides; a baseline's method overrides its modules."""
    fields = recipe.model.model_dump(exclude={"name", "pretrained", "cache_dir"})
    return fields | {"fixclip": {}, "longclip": LONG_CLIP, "finetune": FINE_TUNE}[recipe.method]


def data_config(recipe: EncoderRecipe, batch_size: int) -> DataConfig:
    fields = recipe.data.model_dump() | recipe.captions.model_dump()
    return DataConfig(**fields, batch_size=batch_size, seed=recipe.seed)


def eval_data_config(recipe: EncoderRecipe) -> DataConfig:
    """Held-out pairs in their order, whole long captions, nothing filtered."""
    fields: dict[str, Any] = recipe.eval.model_dump(exclude={"every"})
    fields |= recipe.data.model_dump(include={"workers", "max_bad_share", "cache_dir", "cache_gb", "draft"})
    fields["short_caption"] = "given" if recipe.captions.short_caption == "given" else "first_sentence"
    return DataConfig(**fields, shuffle=False, last_batch="wrap")


def _loader(config: DataConfig, clip: FixClip, accelerator: Accelerator, *, augment: bool) -> Loader:
    size = clip.config.preprocess.get("size")
    return build_loader(
        config,
        transform=clip.preprocess(train=augment),
        tokenizer=clip.tokenizer(),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        image_size=max(size) if isinstance(size, list | tuple) else size,
        pin_memory=accelerator.device.type == "cuda",
    )


def _local_batch_size(recipe: EncoderRecipe, accelerator: Accelerator) -> int:
    size, rest = divmod(recipe.train.batch_size, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"train.batch_size={recipe.train.batch_size}: it must be a multiple of the number of processes, "
            f"{accelerator.num_processes}"
        )
    if recipe.train.micro_batch_size is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"train.micro_batch_size={recipe.train.micro_batch_size}: DeepSpeed steps at every backward pass; "
            "set it to null, or use FSDP"
        )
    return size


def _no_decay(name: str, parameter: nn.Parameter) -> bool:
    """Biases, norms and the logit scale have fewer than 2 dimensions; tokens and positions are no matrices either."""
    return parameter.ndim < 2 or "position" in name or name == "visual.prompts"


def needed_disk(recipe: EncoderRecipe, clip: FixClip) -> int:
    """Bytes the run will still write at most: checkpoints and two models, one of each twice while it is replaced."""
    folder = Path(recipe.output.folder)
    checkpoint = training_state_bytes(clip, ema=recipe.train.ema_decay is not None)
    weights = sum(p.numel() * p.element_size() for p in clip.parameters())
    present = min(len(list_checkpoints(folder / CHECKPOINTS)), recipe.output.keep_last)
    return (recipe.output.keep_last + 1 - present) * checkpoint + 3 * weights


# -- the loop ------------------------------------------------------------------------------------------------


def fit(run: Run) -> None:
    """Take the steps that are left."""
    recipe, accelerator, loader, task = run.recipe, run.accelerator, run.loader, run.task
    device, size = accelerator.device, recipe.train.micro_batch_size
    if run.total_steps <= recipe.optim.warmup_steps and accelerator.is_main_process:
        logger.warning("The learning rate is still warming up at the end of the run: %s", short_run(run))
    take_steps(
        run,
        batches(loader, run.state.step, run.total_steps),
        lambda batch: forward_backward(accelerator, run.model, batch.to(device, non_blocking=True), task, size),
        figures=lambda: {
            "logit_scale": math.exp(_whole(run.clip.logit_scale).item()),
            "unusable_samples": len(loader.skipped),
        },
        evaluate=None if run.eval_loader is None else partial(evaluate_and_keep, run, run.eval_loader),
        evaluate_every=recipe.eval.every,
    )
    if loader.skipped:
        logger.warning("Samples that could not be used: %s", describe_skipped(loader.skipped.values()))


def _whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP may have sharded; every process must ask."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


# -- evaluation and saving -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run: Run, loader: Loader) -> dict[str, float]:
    """Retrieval among the held-out pairs, with long and with short captions, by the averaged weights if any."""
    accelerator = run.accelerator
    model = best_weights(run)
    model.eval()
    parts: dict[str, list[Tensor]] = {"position": [], "image": [], "long": [], "short": []}
    for number, batch in enumerate(tqdm(loader.epoch(0), "evaluating", len(loader), leave=False, disable=None)):
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            parts["image"].append(model.encode_image(batch.image).float())
            parts["long"].append(model.encode_text(batch.long_ids).float())
            parts["short"].append(model.encode_text(batch.short_ids).float())
        parts["position"].append(torch.tensor(_usable_positions(loader, number), device=accelerator.device))
    run.model.train()
    whole = {name: accelerator.gather(torch.cat(tensors)) for name, tensors in parts.items()}
    chosen_I = _first_of_each(whole["position"])
    image_IE, long_TE, short_TE = (whole[name][chosen_I] for name in ("image", "long", "short"))
    own_T = torch.arange(len(chosen_I), device=chosen_I.device)
    return {
        f"{name}_{metric}": value
        for name, text_TE in (("long", long_TE), ("short", short_TE))
        for metric, value in retrieval_metrics(image_IE, text_TE, own_T).items()
    }


def _usable_positions(loader: Loader, number: int) -> list[int]:
    """Where the samples of a batch stand in the epoch; -1 for one that was replaced, as it occurs elsewhere too."""
    positions, _ = loader.batches.positions(number)
    order = loader.batches.order
    return [-1 if order.index(0, position) in loader.skipped else position for position in positions]


def _first_of_each(position_I: Tensor) -> Tensor:
    """Indices of the first occurrence of each position that is not -1: the last batch wraps around."""
    first = {int(position): index for index, position in reversed(list(enumerate(position_I.tolist())))}
    return torch.tensor([first[p] for p in sorted(first) if p >= 0], device=position_I.device)


def best_weights(run: Run) -> FixClip:
    """The averaged weights if the recipe averages, else the trained ones."""
    return run.clip if run.ema is None else cast(FixClip, run.ema.module)


def evaluate_and_keep(run: Run, loader: Loader, log: MetricsLog) -> None:
    """Evaluate, and save the model if it is the best so far by the mean of long R@1 in both directions."""
    values = evaluate(run, loader)
    log.write(run.state.step, values)
    score = (values["long_image_to_text_recall_at_1"] + values["long_text_to_image_recall_at_1"]) / 2
    if score > run.state.best:
        run.state.best = score
        save_model(run, run.folder / BEST)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if name.endswith("_at_1"))
    tqdm.write(f"step {run.state.step}: {shown}")


def save_model(run: Run, folder: Path) -> None:
    """Write the model, averaged if the recipe averages, as a FixClip folder.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    accelerator = run.accelerator
    check_finite(run.model)
    clip = best_weights(run)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        weights = accelerator.get_state_dict(run.model)
        if accelerator.is_main_process:
            with torch.device("meta"):
                clip = FixClip.from_config(run.clip.config)
            weights["logit_scale"] = weights["logit_scale"].reshape(()).clamp(max=MAX_LOG_SCALE)
            clip.load_state_dict(weights, assign=True)
    if accelerator.is_main_process:
        clip.save_pretrained(folder)
    accelerator.wait_for_everyone()


# -- plan and smoke ------------------------------------------------------------------------------------------


def plan(run: Run) -> str:
    """What the run would do and need, in a few lines; reads one batch and runs a few of its samples."""
    recipe, accelerator = run.recipe, run.accelerator
    batch = next(batches(run.loader, 0, 1)).to(accelerator.device)
    tokens = (batch.long_ids != 0).sum(1).float().mean().item()
    total = sum(p.numel() for p in run.clip.parameters())
    new = sum(p.numel() for name, p in run.clip.named_parameters() if name in run.clip.new_parameters())
    state, activations = memory_estimate(run, batch)
    local = len(batch.image)
    have = device_memory(accelerator.device)
    fits = "" if state + activations < have else "; DOES NOT FIT, see docs/training.md"
    micro = min(recipe.train.micro_batch_size or local, local)
    config = run.clip.config
    named_only = ":" not in recipe.model.name
    weights = recipe.model.pretrained or ("random weights" if named_only else "its own weights")
    lines = {
        "method": f"{recipe.method}: {config.num_prompts} prompts ({config.prompt_flow}), short branch "
        f"{config.short_branch}, masking {config.masking}, {config.num_groups} groups",
        "model": f"{recipe.model.name} ({weights}), {config.context_length} tokens",
        "parameters": f"{total / 1e6:.1f}M, of which new {new / 1e6:.2f}M",
        "data": f"{len(run.loader.batches.order)} samples, {len(run.loader)} batches an epoch, "
        f"{tokens:.0f} tokens a long caption in the first",
        "batch": f"{recipe.train.batch_size} = {accelerator.num_processes} process(es) x {local}, {micro} at a time",
        "steps": f"{run.total_steps} ({run.total_steps / len(run.loader):.2f} epochs), "
        f"warm-up {recipe.optim.warmup_steps}, lr {recipe.optim.lr:g}, new parameters {recipe.optim.lr_new:g}",
        "precision": f"{recipe.train.precision} on {accelerator.device.type}",
        "memory": f"about {(state + activations) / _GIB:.1f} GiB a process of {have / _GIB:.1f}: {state / _GIB:.1f} "
        f"weights, gradients and AdamW, {activations / _GIB:.1f} activations (of a few samples, scaled up){fits}",
        "disk": f"{needed_disk(recipe, run.clip) / _GIB:.1f} GiB for checkpoints and models in {run.folder}",
    }
    if run.total_steps <= recipe.optim.warmup_steps:
        lines["warning"] = f"the learning rate is still warming up at the end: {short_run(run)}"
    return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())


def short_run(run: Run) -> str:
    return f"{run.total_steps} steps, optim.warmup_steps={run.recipe.optim.warmup_steps}"


def memory_estimate(run: Run, batch: Batch, probe: int = 4) -> tuple[int, int]:
    """Bytes a process needs for the training state, and for the activations of a pass.

    Activations are measured on half a probe and a whole one, and extrapolated along a line: what does not grow
    with the samples, such as low-precision copies of the weights, counts once. Gradient checkpointing adds the
    layer that is being recomputed.
    """
    recipe, clip = run.recipe, run.clip
    weights = sum(p.numel() * p.element_size() for p in clip.parameters())
    trained = sum(p.numel() * p.element_size() for p in clip.parameters() if p.requires_grad)
    state = weights * (2 if run.ema is not None else 1) + 3 * trained
    samples = min(recipe.train.micro_batch_size or len(batch.image), len(batch.image))
    probe = min(probe, samples)

    def extrapolated() -> float:
        half = max(1, probe // 2)
        whole, less = (_activations(run, split_batch(batch, count)[0]) for count in (probe, half))
        return whole + (samples - probe) * (whole - less) / max(1, probe - half)

    activations = extrapolated()
    if recipe.train.gradient_checkpointing:
        clip.set_grad_checkpointing(False)
        activations += extrapolated() / sum(1 for _ in clip.visual.transformer["resblocks"].children())
        clip.set_grad_checkpointing(True)
    return state, math.ceil(activations)


def _activations(run: Run, batch: Batch) -> int:
    """DistributedDataParallel is left out, as it would wait for the backward pass; FSDP must gather the weights."""
    model = run.model if run.accelerator.distributed_type == DistributedType.FSDP else run.clip
    return activation_bytes(lambda: run.task.batch_losses(model, batch, run.accelerator.autocast), run.clip)


def smoke(recipe: EncoderRecipe) -> None:
    """Train `smoke_recipe` in a temporary folder."""
    process = PartialState()
    folder = broadcast_object_list([tempfile.mkdtemp() if process.is_main_process else None])[0]
    try:
        train(smoke_recipe(recipe, folder), resume="none")
    finally:
        if process.is_main_process:
            shutil.rmtree(folder)


def smoke_recipe(recipe: EncoderRecipe, folder: str | Path, batch_size: int = 4) -> EncoderRecipe:
    """The recipe with random weights, generated samples and two steps: does it start, step, save and evaluate?

    Model size, modules, losses, optimizer and precision stay the recipe's.
    """
    micro = recipe.train.micro_batch_size and max(1, batch_size // 2)
    changes: dict[str, dict[str, Any]] = {
        "model": {"pretrained": None},
        "data": {"source": "scenes", "image_root": None, "start": 0, "stop": 2 * batch_size, "workers": 0},
        "captions": {"short_caption": "first_sentence", "filter_captions": False},
        "train": {"steps": 2, "batch_size": batch_size, "micro_batch_size": micro},
        "eval": {"source": "scenes", "image_root": None, "start": 0, "stop": batch_size, "batch_size": batch_size},
        "output": {"folder": str(folder), "log_every": 1, "keep_last": 1, "trackers": []},
    }
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update=sections)
