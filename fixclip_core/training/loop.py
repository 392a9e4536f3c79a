"""The training loop and its parts, which know nothing of what is trained: every training here is built of them."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fixclip_core.training.checkpoint import (
    find_resume,
    list_checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from fixclip_core.training.recipe import (
    OptimSection,
    OutputSection,
    RunSection,
    flatten,
    load_recipe,
    recipe_diff,
    recipe_yaml,
)

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"


@dataclass
class TrainState:
    """Where a run stands; saved with each checkpoint and equal in all processes.

    Attributes:
        step: optimiser steps taken, skipped ones included.
        skipped: steps skipped because their gradient was not finite.
        skipped_in_a_row: how many of those came last.
        best: the best evaluation so far.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float = -math.inf

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Run(Protocol):
    """What `start` and `take_steps` need of a run, whatever it trains; `model` and `optimizer` are prepared."""

    recipe: Any
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    ema: AveragedModel | None
    state: TrainState
    total_steps: int

    @property
    def folder(self) -> Path:
        """Where the run writes."""


def start(run: Run, resume: str) -> None:
    """Load the checkpoint to go on from, if any, and write the recipe beside the results.

    Raises:
        ValueError: the checkpoint is damaged or does not fit, or the folder holds another run's newer ones.
    """
    accelerator, folder = run.accelerator, run.folder
    checkpoints = folder / CHECKPOINTS
    path = find_resume(accelerator, resume, checkpoints)
    if path is not None:
        load_checkpoint(accelerator, path)
        if accelerator.is_main_process:
            logger.info("Resumed step %d from %s", run.state.step, path)
    newer = [other.name for step, other in list_checkpoints(checkpoints) if step > run.state.step]
    if newer and resume != "auto":
        raise ValueError(
            f"--resume {resume}: {checkpoints} holds newer checkpoints ({', '.join(newer)}); delete them or choose "
            "another output.folder"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove_unfinished(checkpoints)
        if path is not None and (folder / RECIPE).exists():
            _warn_of_changes(run.recipe, folder / RECIPE)
        (folder / RECIPE).write_text(recipe_yaml(run.recipe), encoding="utf-8")
    start_trackers(accelerator, run.recipe.output, run.recipe)


def _warn_of_changes(recipe: BaseModel, path: Path) -> None:
    try:
        before = load_recipe(type(recipe), path)
    except ValueError as error:
        logger.warning("The recipe that the run was started with cannot be compared: %s", error)
        return
    for key, now, then in recipe_diff(recipe, before):
        if not key.startswith("output."):
            logger.warning("%s was %r when this run started and is %r now", key, then, now)


def batches(loader: Any, step: int, total_steps: int) -> Iterator[Any]:
    """The batches of steps `step`..`total_steps`-1, epoch after epoch, of a `data.Loader` or one like it."""
    while step < total_steps:
        epoch, number = divmod(step, len(loader))
        for batch in loader.epoch(epoch, number):
            yield batch
            step += 1
            if step == total_steps:
                return


def make_accelerator(run: RunSection, output: OutputSection) -> Accelerator:
    """An Accelerator with the recipe's precision and trackers; the rest comes from Accelerate's own config.

    Raises:
        ValueError: a tracker is not installed (Accelerate would leave it out without a word), or the device cannot
            compute in this precision.
    """
    missing = [name for name in output.trackers if LoggerType(name) not in get_available_trackers()]
    if missing:
        raise ValueError(
            f"output.trackers={list(output.trackers)}: {', '.join(missing)} cannot be imported; install it"
        )
    return Accelerator(
        mixed_precision="no" if run.precision == "fp32" else run.precision,
        log_with=list(output.trackers) or None,
        project_dir=output.folder,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )


def start_trackers(accelerator: Accelerator, output: OutputSection, recipe: BaseModel) -> None:
    if output.trackers:
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(recipe).items()}
        accelerator.init_trackers(output.project, config=plain)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for one step, so what is drawn in it does not depend on the run's history."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def parameter_groups(
    model: nn.Module, is_new: Callable[[str], bool], no_decay: Callable[[str, nn.Parameter], bool], optim: OptimSection
) -> list[dict[str, Any]]:
    """AdamW's groups: pre-trained or new (their own learning rates), with or without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_new(name), no_decay(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr_new if new else optim.lr,
            "weight_decay": 0.0 if plain else optim.weight_decay,
        }
        for (new, plain), parameters in groups.items()
    ]


def make_optimizer(groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.AdamW:
    on_gpu = any(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=on_gpu or None)


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimSection, total_steps: int) -> LambdaLR:
    factor = partial(lr_factor, warmup=optim.warmup_steps, total=total_steps, schedule=optim.schedule)
    return LambdaLR(optimizer, factor)


def lr_factor(step: int, warmup: int, total: int, schedule: str) -> float:
    """Share of the peak learning rate at a step: linear up to 1 over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_ema(accelerator: Accelerator, model: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of the weights, registered for checkpoints; None without a decay.

    Raises:
        ValueError: the weights are sharded (FSDP, DeepSpeed), so no process could average them.
    """
    if decay is None:
        return None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"train.ema_decay={decay}: with {accelerator.distributed_type.value} it must be null")
    ema = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(decay))
    accelerator.register_for_checkpointing(ema)
    return ema


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
) -> tuple[float, bool]:
    """Clip and step, unless the gradient is not finite: then nothing changes.

    The norm is that of the gradient summed over the processes, so all of them decide alike. In fp16 the
    scaler must see the overflow to lower its scale; it leaves the weights alone by itself.

    Returns:
        The gradient's norm before clipping and whether the weights changed.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    grad_norm = 0.0 if norm is None else float(norm)  # DeepSpeed clips and steps inside backward
    finite = math.isfinite(grad_norm)
    if finite or accelerator.scaler is not None:
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm, finite and not accelerator.optimizer_step_was_skipped


def count_step(state: TrainState, applied: bool, limit: int) -> None:
    """Count a step, and stop the run when too many in a row were skipped.

    Raises:
        FloatingPointError: `limit` steps in a row had no finite gradient; checkpoints hold finite weights only.
    """
    state.step += 1
    state.skipped += not applied
    state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
    if state.skipped_in_a_row >= limit:
        raise FloatingPointError(
            f"step {state.step}: {limit} steps in a row without a finite gradient; the last checkpoint is whole. "
            "Lower the learning rate, use bf16 instead of fp16, or look at the data"
        )


class MetricsLog:
    """metrics.jsonl, the trackers and a plot of the loss curves, written by the main process."""

    def __init__(self, accelerator: Accelerator, folder: Path, start_step: int):
        self.accelerator = accelerator
        self.path = folder / METRICS
        self.window: list[dict[str, Tensor]] = []
        self.samples = 0
        self.seconds = 0.0
        self.since = time.perf_counter()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, start_step)

    def add(self, losses: dict[str, Tensor], samples: int, applied: bool) -> None:
        """Collect one step; the losses of a skipped one are not finite and would hide the others."""
        self.samples += samples
        self.seconds = time.perf_counter() - self.since
        if applied:
            self.window.append(losses)

    def flush(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Write the means since the last flush, over all processes, and return them."""
        names = sorted({name for losses in self.window for name in losses})
        means = {name: torch.stack([losses[name].float() for losses in self.window]).mean() for name in names}
        reduced = self.accelerator.reduce(means, reduction="mean") if means else {}
        values = {name: float(value) for name, value in reduced.items()}
        values |= extra | {"samples_per_second": self.samples / max(self.seconds, 1e-9)}
        self.window, self.samples, self.seconds, self.since = [], 0, 0.0, time.perf_counter()
        self.write(step, values)
        return values

    def restart_clock(self) -> None:
        """Leave out of samples per second what was not training."""
        self.since = time.perf_counter() - self.seconds

    def write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                strict = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": step, **strict}) + "\n")

    def plot(self) -> None:
        """Draw losses.png; a picture that fails must not cost the run."""
        if self.accelerator.is_main_process and self.path.exists():
            try:
                plot_losses(self.path, self.path.with_name("losses.png"))
            except (ImportError, OSError, ValueError) as error:
                logger.warning("The loss curves could not be drawn: %s", error)


def _drop_after(path: Path, step: int) -> None:
    """Forget what a resumed run is going to write again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (at := _step_of(line)) is not None and at <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return None


def plot_losses(metrics: Path, png: Path) -> None:
    """Draw every loss of a metrics.jsonl over the steps, and the recalls if there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = ("loss", "recall")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for name in sorted({key for row in rows for key in row if panel in key}):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(
                [step for step, _ in points],
                [value for _, value in points],
                label=name,
                marker="." if len(points) < 30 else None,
            )
        axis.set(xlabel="step", title=panel)
        if axis.lines:
            axis.legend(fontsize="x-small")
    figure.savefig(png, dpi=120)
    pyplot.close(figure)


def check_finite(model: nn.Module) -> None:
    """Refuse to save poisoned weights.

    Raises:
        FloatingPointError: a weight of this process is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a DTensor
        if not torch.isfinite(shard.detach()).all():
            raise FloatingPointError(f"{name} is not finite; nothing was saved, resume from the last checkpoint")


def take_steps(
    run: Run,
    inputs: Iterable[Any],
    forward_backward: Callable[[Any], dict[str, Tensor]],
    *,
    figures: Callable[[], dict[str, float]] = dict,
    evaluate: Callable[[MetricsLog], None] | None = None,
    evaluate_every: int = 1,
) -> None:
    """Take the steps that are left; log, evaluate and save as often as asked, and after the last one.

    Args:
        run: what is trained.
        inputs: one for each step that is left: a batch, or what one is made from once the step is seeded.
        forward_backward: an input's losses, detached, with their gradients left in the parameters.
        figures: what else belongs into a line of metrics; every process asks.
        evaluate: writes what it finds itself.
        evaluate_every: steps between two evaluations.

    Raises:
        FloatingPointError: too many steps in a row without a finite gradient, or weights that are not finite.
    """
    recipe, accelerator, state = run.recipe, run.accelerator, run.state
    log = MetricsLog(accelerator, run.folder, state.step)
    bar = tqdm(total=run.total_steps, initial=state.step, desc="steps", disable=not accelerator.is_main_process)
    run.model.train()
    for item in inputs:
        seed_step(recipe.seed, state.step, accelerator.process_index)
        losses = forward_backward(item)
        lr = run.optimizer.param_groups[0]["lr"]
        grad_norm, applied = optimizer_step(accelerator, run.model, run.optimizer, recipe.optim.max_grad_norm)
        run.schedule.step()
        if run.ema is not None and applied:
            run.ema.update_parameters(run.model)
        count_step(state, applied, recipe.train.max_skipped_steps)

        log.add(losses, recipe.train.batch_size, applied)
        last = state.step == run.total_steps
        if last or state.step % recipe.output.log_every == 0:
            extra = {"grad_norm": grad_norm, "lr": lr, "skipped_steps": state.skipped, **figures()}
            values = log.flush(state.step, extra)
            shown = [name for name in values if "loss" in name or name in ("samples_per_second", "skipped_steps")]
            bar.set_postfix({name.removeprefix("loss_"): f"{values[name]:.3g}" for name in shown})
        if evaluate is not None and (last or state.step % evaluate_every == 0):
            evaluate(log)
            log.restart_clock()
        if last or state.step % recipe.output.save_every == 0:
            check_finite(run.model)
            save_checkpoint(accelerator, run.folder / CHECKPOINTS, state.step, keep_last=recipe.output.keep_last)
            log.plot()
            log.restart_clock()
        bar.update()
    bar.close()


def device_memory(device: torch.device) -> int:
    """Bytes that the device has: all of a GPU's, what is free of the machine's otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def activation_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, the model's own tensors excepted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address could be given to another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
