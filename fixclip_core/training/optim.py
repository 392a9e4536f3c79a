"""AdamW's parameter groups, the learning rate's schedule, the average of the weights, and one guarded step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fixclip_core.training.recipe import OptimSection


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


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a recipe decides of each parameter group: the peak learning rate, betas, eps and weight decay."""
    names = ("initial_lr", "betas", "eps", "weight_decay")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]


def set_hyperparameters(optimizer: torch.optim.Optimizer, schedule: LambdaLR, values: list[dict[str, Any]]) -> None:
    """Give the parameter groups these hyperparameters at the schedule's current step, as a loaded checkpoint
    brings those that it was saved with."""
    schedule.base_lrs = [value["initial_lr"] for value in values]
    for group, value, factor in zip(optimizer.param_groups, values, schedule.lr_lambdas, strict=True):
        group.update(value, lr=value["initial_lr"] * factor(schedule.last_epoch))


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


def check_finite(model: nn.Module) -> None:
    """Refuse to save poisoned weights.

    Raises:
        FloatingPointError: a weight of this process is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a DTensor
        if not torch.isfinite(shard.detach()).all():
            raise FloatingPointError(f"{name} is not finite, so it was not saved")
